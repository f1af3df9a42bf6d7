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
from utils.files import link_or_copy
from utils.run import Run

# Arguments that say how to start, and those that do not change what a run learns.
_CONTROL = {"allow_changes", "auto_resume", "dry_run", "init", "output_dir", "resume", "start_epoch"}
_HARMLESS = {"data_dir", "num_workers", "print_freq", "save_freq", "probe_dataset", "probe_dir", "probe_freq"}
_HARMLESS |= {"compile", "cuda_graphs", "activation_budget"}
# Arguments that decide what the state of an optimizer and a method is.
_FIXED = {"method", "optimizer"}


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """The checkpoint to go on from: with --auto-resume the run folder's newest, else --resume, else none.

    Raises:
        UsageError: a file is missing, two starts are asked for, or the folder holds a run that nobody asked to go on
            with.
    """
    folder = Path(args.output_dir)
    for flag, path in (("--resume", args.resume), ("--init", args.init)):
        if path and not Path(path).is_file():
            raise UsageError(f"{flag} {path}: no such file")
    if args.resume and args.init:
        raise UsageError("--resume goes on with a run, --init starts another: use one of them")
    if args.auto_resume and (newest := _newest(folder)):
        return newest
    in_folder = args.resume and Path(args.resume).resolve().parent == folder.resolve()
    holds_run = (folder / "metrics.jsonl").exists() or any(folder.glob("*.pth"))
    if holds_run and not args.auto_resume and not in_folder:
        raise UsageError(f"--output-dir {folder}: holds a run; go on with --auto-resume, or use another folder")
    return Path(args.resume) if args.resume else None


def _newest(folder: Path) -> Path | None:
    """`current.pth`, or where that is gone the checkpoint of the latest epoch."""
    if (folder / "current.pth").exists():
        return folder / "current.pth"
    epochs = sorted((int(path.stem.rsplit("_", 1)[1]), path) for path in folder.glob("ckpt_epoch_*[0-9].pth"))
    return epochs[-1][1] if epochs else None


def check_changes(old: dict[str, Any], new: dict[str, Any], allow: bool) -> list[str]:
    """Compare a checkpoint's facts with this run's.

    Returns:
        All that changed, as text.

    Raises:
        UsageError: something changed that changes the result, without `allow`; or what cannot change at all.
    """
    shared = [name for name in new if name in old and name not in _CONTROL]  # flags come and go between versions
    changed = {name: f"{_flag(name)} {old[name]} -> {new[name]}" for name in shared if old[name] != new[name]}
    for name in sorted(_FIXED & changed.keys()):
        raise UsageError(f"{changed[name]}: start from its weights with --init instead")
    grave = [text for name, text in changed.items() if name not in _HARMLESS]
    if grave and not allow:
        raise UsageError(f"changes the result: {', '.join(grave)}; undo, or add --allow-changes")
    return [f"changed: {text}" for text in changed.values()]


def _flag(name: str) -> str:
    return name if name in ("images", "processes") else f"--{name.replace('_', '-')}"


def begin(run: Run) -> tuple[int, list[str]]:
    """Bring a fresh run to where it starts.

    Returns:
        The step to start with, and what a user should know of it.

    Raises:
        UsageError: a checkpoint is missing, does not fit, or was made with other arguments.
    """
    args, start = run.args, run.plan.steps_per_epoch * (run.args.start_epoch - 1)
    if path := find_checkpoint(args):
        start, notes = restore(run, path)
        if args.resume and path != Path(args.resume):
            notes.append(f"--resume {args.resume} was not needed")
        return start, [f"going on after epoch {start // run.plan.steps_per_epoch} from {path}", *notes]
    if args.init:
        taken = checkpoint.initialize_from(run.method, args.init)
        fresh = [name for name, part in run.method.named_children() if part.state_dict() and name not in taken]
        rest = f"; freshly initialized: {', '.join(fresh)}" if fresh else ""
        return start, [f"started from {args.init}: {', '.join(taken)}{rest}"]
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
    link_or_copy(path.with_name("current.pth"), path)


def restore(run: Run, path: Path) -> tuple[int, list[str]]:
    """Put a checkpoint's state back.

    Returns:
        The step to go on with, and the arguments that changed.

    Raises:
        UsageError: it is no checkpoint of this project, does not fit, or its arguments were others.
    """
    flag = "--resume" if run.args.resume and path == Path(run.args.resume) else "--auto-resume"
    state = checkpoint.load(path, flag)
    kinds = {"args": dict, "model": dict, "optimizer": dict, "scaler": dict, "epoch": int}
    if not all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
        raise UsageError(f"{flag} {path}: not a checkpoint of this project; start from its weights with --init")
    try:
        changes = check_changes(state["args"], run.facts, run.args.allow_changes)
        checkpoint.load_strict(run.method, state["model"], "model")
        _restore_optimizer(run, state["optimizer"])
    except UsageError as error:
        raise UsageError(f"{flag} {path}: {error}") from None
    if state["scaler"] and run.scaler.is_enabled():
        run.scaler.load_state_dict(state["scaler"])
    return state["epoch"] * run.plan.steps_per_epoch, changes


def _restore_optimizer(run: Run, saved: dict[str, Any]) -> None:
    groups = run.optimizer.state_dict()["param_groups"]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved.get("param_groups", [])]:
        raise UsageError("its optimizer trained other parameters; start from its weights with --init")
    # Learning rate, decay and momentum stay this run's.
    run.optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


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
