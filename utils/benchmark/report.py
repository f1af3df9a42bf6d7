"""Where a benchmark's table goes, and the facts that stand above it."""

import argparse
import json
import os
import platform
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from utils import resume
from utils.benchmark.table import Table
from utils.errors import UsageError
from utils.files import atomic_write_text

FORMATS = (".md", ".json")


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """The flags of what is written."""
    group.add_argument(
        "--out", type=Path, action="append", metavar="FILE", help="table to write, .md or .json; repeatable"
    )
    group.add_argument("--overwrite", action="store_true", help="write over what is there")


def check(options: argparse.Namespace) -> None:
    """Before minutes of measuring rather than after.

    Raises:
        UsageError: a file or folder cannot be written, or is there already.
    """
    for path in options.out or []:
        if path.suffix not in FORMATS:
            raise UsageError(f"--out {path}: tables are written as {' or '.join(FORMATS)}")
        if path.is_dir():
            raise UsageError(f"--out {path}: is a folder; name a file")
        _check_place("--out", path, options.overwrite)
    folder = getattr(options, "profile", None)  # the loader has none
    if folder is not None:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"--profile {folder}: is a file; name a folder")
        _check_place("--profile", folder, options.overwrite)


def _check_place(flag: str, path: Path, overwrite: bool) -> None:
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"{flag} {path}: nothing can be written to {parent}; use another folder")
    if (any(path.iterdir()) if path.is_dir() else path.exists()) and not overwrite:
        raise UsageError(f"{flag} {path}: is there already; use another name, or --overwrite")


def facts(command: str, device: torch.device) -> dict[str, str]:
    """What a number means nothing without: machine, versions, code, command."""
    versions = resume.versions()
    return {
        "device": device_name(device),
        "threads": f"{torch.get_num_threads()} on {len(os.sched_getaffinity(0))} cores",
        "versions": ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "torchvision")),
        "code": resume.git_revision() or "not in a git checkout",
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "command": command,
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def publish(table: Table, about: dict[str, str], files: Sequence[Path]) -> None:
    """The table on the screen, and in files with the facts above it.

    Raises:
        UsageError: a file cannot be written.
    """
    width = shutil.get_terminal_size().columns
    print(f"{about['device']}, {about['versions']}\n\n{table.text(width)}", flush=True)
    for path in files:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(path, content(table, about, path.suffix))
        except OSError as error:
            raise UsageError(f"--out {path}: cannot be written ({error.strerror})") from None


def content(table: Table, about: dict[str, str], suffix: str) -> str:
    """What a file of this suffix holds."""
    if suffix == ".json":
        return json.dumps({"facts": about, **table.numbers()}, indent=1) + "\n"
    facts = [f"- {name}: {f'`{fact}`' if name == 'command' else fact}" for name, fact in about.items()]
    return "\n".join([table.title, "", *facts, "", table.markdown()])
