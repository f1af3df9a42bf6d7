"""Start a run: from scratch, from other weights, or from its last checkpoint; and save checkpoints."""

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
from utils.files import link_or_copy, write_output
from utils.integrity import ADVICE
from utils.run import Run

# Arguments that select how a run starts.
_START = {"allow_changes", "auto_resume", "dry_run", "init", "output_dir", "resume", "start_epoch"}
# Arguments that do not affect the result.
_NO_EFFECT = {"data_dir", "num_workers", "print_freq", "save_freq", "probe_dataset", "probe_dir", "probe_freq"}
_NO_EFFECT |= {"compile", "cuda_graphs", "activation_budget"}
# Arguments that determine the state of the method and of the optimizer, and cannot change.
_FIXED = {"method", "optimizer"}


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """Return the checkpoint to resume from, or None.

    With --auto-resume it is the newest one of the run folder, if there is one; else that of --resume.

    Raises:
        UsageError: a file is missing, both --resume and --init are given, or the folder holds a run and nothing asks
            to resume it.
    """
    folder = Path(args.output_dir)
    for flag, path in (("--resume", args.resume), ("--init", args.init)):
        if path and not Path(path).is_file():
            raise UsageError(f"{flag} {path}: no such file")
    if args.resume and args.init:
        raise UsageError("--resume continues a run and --init starts a new one: use only one of them")
    if args.auto_resume and (newest := _newest(folder)):
        return newest
    in_folder = args.resume and Path(args.resume).resolve().parent == folder.resolve()
    holds_run = (folder / "metrics.jsonl").exists() or any(folder.glob("*.pth"))
    if holds_run and not args.auto_resume and not in_folder:
        raise UsageError(f"--output-dir {folder}: holds a run; add --auto-resume, or use another folder")
    return Path(args.resume) if args.resume else None


def _newest(folder: Path) -> Path | None:
    """Return `current.pth`, or if it is missing the checkpoint of the last epoch."""
    if (folder / "current.pth").exists():
        return folder / "current.pth"
    epochs = sorted((int(path.stem.rsplit("_", 1)[1]), path) for path in folder.glob("ckpt_epoch_*[0-9].pth"))
    return epochs[-1][1] if epochs else None


def check_changes(old: dict[str, Any], new: dict[str, Any], allow: bool) -> list[str]:
    """Compare the metadata of a checkpoint with that of this run.

    Returns:
        A message for each change.

    Raises:
        UsageError: a change affects the result and `allow` is false, or it is not possible at all.
    """
    shared = [name for name in new if name in old and name not in _START]  # flags differ between versions
    changes = {name: f"{_flag(name)} {old[name]} -> {new[name]}" for name in shared if old[name] != new[name]}
    for name in sorted(_FIXED & changes.keys()):
        raise UsageError(f"{changes[name]}: cannot change; use --init to start a new run from these weights")
    relevant = [text for name, text in changes.items() if name not in _NO_EFFECT]
    if relevant and not allow:
        raise UsageError(f"changes that affect the result: {', '.join(relevant)}; undo them, or add --allow-changes")
    return [f"changed: {text}" for text in changes.values()]


def _flag(name: str) -> str:
    return name if name in ("images", "processes") else f"--{name.replace('_', '-')}"


def init_or_resume(run: Run) -> tuple[int, list[str]]:
    """Load the state or the weights that the arguments ask for into a freshly initialized run.

    Returns:
        The step to start from, and messages for the user.

    Raises:
        UsageError: a checkpoint is missing, does not fit, or was made with other arguments.
    """
    args, start = run.args, run.plan.steps_per_epoch * (run.args.start_epoch - 1)
    if path := find_checkpoint(args):
        start, messages = restore(run, path)
        if args.resume and path != Path(args.resume):
            messages.append(f"--resume {args.resume} is not used")
        return start, [f"resumed after epoch {start // run.plan.steps_per_epoch} from {path}", *messages]
    if args.init:
        reasons = checkpoint.initialize_from(run.method, args.init)
        copied = [name for name, reason in reasons.items() if not reason]
        random = [f"{name} ({reason})" for name, reason in reasons.items() if reason]
        suffix = f"; randomly initialized: {', '.join(random)}" if random else ""
        return start, [f"initialized from {args.init}: {', '.join(copied)}{suffix}"]
    if (Path(args.output_dir) / "metrics.jsonl").exists():
        return start, [f"no checkpoint in {args.output_dir} yet: starting from scratch"]
    return start, []


def save(run: Run, step: int, epoch: int) -> None:
    """Write `ckpt_epoch_N.pth` into the run folder, and make `current.pth` the same file."""
    path = Path(run.args.output_dir) / f"ckpt_epoch_{epoch}.pth"
    state = {
        "args": run.metadata,
        "epoch": epoch,
        "step": step,
        "model": run.method.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "versions": versions(),
    }
    checkpoint.save(path, state)
    current = path.with_name("current.pth")
    try:
        link_or_copy(current, path)
    except OSError as error:
        raise UsageError(f"--output-dir: {current} cannot be written ({error.strerror}); {path} is intact") from None


def restore(run: Run, path: Path) -> tuple[int, list[str]]:
    """Load the state of a checkpoint into a run.

    Returns:
        The step to continue with, and a message for each changed argument.

    Raises:
        UsageError: the file is not a checkpoint of this project, does not fit, or was made with other arguments.
    """
    flag = "--resume" if run.args.resume and path == Path(run.args.resume) else "--auto-resume"
    auto_advice = "replace --auto-resume by --resume with an earlier ckpt_epoch_N.pth"
    state = checkpoint.load(path, flag, ADVICE if flag == "--resume" else auto_advice)
    types = {"args": dict, "model": dict, "optimizer": dict, "scaler": dict, "epoch": int}
    if not all(isinstance(state.get(name), kind) for name, kind in types.items()):
        raise UsageError(f"{flag} {path}: not a checkpoint of this project; use --init to start from its weights")
    try:
        messages = check_changes(state["args"], run.metadata, run.args.allow_changes)
        checkpoint.load_strict(run.method, state["model"], "model")
        checkpoint.check_finite(state["model"], "model")
        _restore_optimizer(run, state["optimizer"])
    except UsageError as error:
        raise UsageError(f"{flag} {path}: {error}") from None
    if state["scaler"] and run.scaler.is_enabled():
        run.scaler.load_state_dict(state["scaler"])
    return state["epoch"] * run.plan.steps_per_epoch, messages


def _restore_optimizer(run: Run, saved: dict[str, Any]) -> None:
    groups = run.optimizer.state_dict()["param_groups"]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved.get("param_groups", [])]:
        raise UsageError("its optimizer has other parameters; use --init to start a new run from its weights")
    # Learning rate, weight decay and momentum are those of this run.
    run.optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def write_config(folder: Path, run: Run) -> None:
    """Write `config.json`: all arguments, the plan that follows from them, versions and git revision.

    Raises:
        UsageError: the file cannot be written.
    """
    plan = asdict(run.plan) | {
        "effective_batch": run.plan.effective_batch,
        "processes": distributed.world_size(),
    }
    config = {"command": sys.argv, "args": vars(run.args), "plan": plan, "versions": versions(), "git": git_revision()}
    text = json.dumps(config, indent=2) + "\n"
    write_output("--output-dir", folder / "config.json", lambda file: file.write(text.encode()))


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }


def git_revision() -> str:
    """Return the commit of this code, with `-dirty` if files differ from it; empty outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
