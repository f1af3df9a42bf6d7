"""Where a run starts: afresh, from other weights, or where an earlier one stopped."""

import argparse
import json
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision

from utils import checkpoint, distributed
from utils.errors import UsageError
from utils.run import Run

# Arguments that do not change what a run learns.
_HARMLESS = {
    "allow_changes",
    "auto_resume",
    "data_dir",
    "dry_run",
    "init",
    "num_workers",
    "output_dir",
    "print_freq",
    "resume",
    "save_freq",
    "start_epoch",
}
# Arguments that decide what the state of an optimiser and a method is.
_FIXED = {"method", "optimizer"}


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """The checkpoint to go on from: with --auto-resume the run folder's newest, else --resume, else none.

    Raises:
        UsageError: --resume is missing, or the folder holds a run that nobody asked to go on with.
    """
    newest = Path(args.output_dir) / "current.pth"
    if args.auto_resume and newest.exists():
        return newest
    if args.resume:
        if not Path(args.resume).is_file():
            raise UsageError(f"--resume {args.resume}: no such file")
        return Path(args.resume)
    if newest.exists():
        raise UsageError(
            f"--output-dir {args.output_dir}: holds a run; go on with --auto-resume, or use another folder"
        )
    return None


def check_changes(path: Path, old: dict[str, Any], new: dict[str, Any], allow: bool) -> list[str]:
    """Compare a checkpoint's facts with this run's.

    Returns:
        All that changed, as text.

    Raises:
        UsageError: something changed that changes the result, without `allow`; or what cannot change at all.
    """
    shared = [name for name in new if name in old]  # flags come and go between versions
    changed = {name: f"{name} {old[name]} -> {new[name]}" for name in shared if old[name] != new[name]}
    for name in sorted(_FIXED & changed.keys()):
        raise UsageError(f"--resume {path}: {changed[name]}; start from its weights with --init instead")
    grave = [text for name, text in changed.items() if name not in _HARMLESS]
    if grave and not allow:
        raise UsageError(f"--resume {path}: changes the result: {', '.join(grave)}; undo, or add --allow-changes")
    return [f"changed: {text}" for text in changed.values()]


def begin(run: Run) -> tuple[int, list[str]]:
    """Bring a fresh run to where it starts.

    Returns:
        The step to start with, and what a user should know of it.

    Raises:
        UsageError: a checkpoint is missing, does not fit, or was made with other arguments.
    """
    if path := find_checkpoint(run.args):
        start, changes = restore(run, path)
        return start, [f"going on after epoch {start // run.plan.steps_per_epoch} from {path}", *changes]
    start = run.plan.steps_per_epoch * (run.args.start_epoch - 1)
    if run.args.init:
        taken = checkpoint.initialise(run.method, run.args.init)
        return start, [f"started from {run.args.init}: {', '.join(taken)}"]
    return start, []


def save(run: Run, step: int, epoch: int) -> None:
    """Write `ckpt_epoch_N.pth` into the run folder and make `current.pth` the same file."""
    path = Path(run.args.output_dir) / f"ckpt_epoch_{epoch}.pth"
    state = {
        "args": run.facts,
        "epoch": epoch,
        "step": step,
        "model": run.method.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "versions": versions(),
    }
    checkpoint.save(path, state)
    checkpoint.point_to(path.with_name("current.pth"), path)


def restore(run: Run, path: Path) -> tuple[int, list[str]]:
    """Put a checkpoint's state back.

    Returns:
        The step to go on with, and the arguments that changed.

    Raises:
        UsageError: it is no checkpoint of this project, does not fit, or its arguments were others.
    """
    state = checkpoint.load(path, "--resume")
    if not isinstance(state.get("args"), dict) or "step" not in state:
        raise UsageError(f"--resume {path}: not a checkpoint of this project; start from its weights with --init")
    changes = check_changes(path, state["args"], run.facts, run.args.allow_changes)
    checkpoint.load_strict(run.method, state["model"], f"--resume {path}")
    # Learning rate, decay and momentum stay this run's.
    groups = run.optimizer.state_dict()["param_groups"]
    run.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
    if state["scaler"] and run.scaler.is_enabled():
        run.scaler.load_state_dict(state["scaler"])
    return state["epoch"] * run.plan.steps_per_epoch, changes


def write_config(folder: Path, run: Run) -> None:
    """`config.json`: all arguments, what they resolve to, versions and git revision."""
    plan = asdict(run.plan) | {
        "effective_batch": run.plan.effective_batch,
        "processes": distributed.world_size(),
    }
    config = {"command": sys.argv, "args": vars(run.args), "plan": plan, "versions": versions(), "git": git_revision()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Of Python and the libraries that a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }


def git_revision() -> str:
    """The commit of this code, with `-dirty` where files differ from it; empty outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
