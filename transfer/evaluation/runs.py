"""The runs of evaluate.py: the command of each, and how it ended."""

import argparse
import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from transfer.encoders import EncoderWeights
from transfer.evaluation.fine_tunings import FINE_TUNINGS, FineTuning
from transfer.evaluation.recipe_options import Options
from transfer.evaluation.recipe_records import has_checkpoint, make_record
from transfer.evaluation.training_time import RunLength
from transfer.frameworks import TRANSFER, data_root
from transfer.results import write_json

CONVERTED = {
    "detection": ("detectron2", "detectron2.pkl"),
    "segmentation": ("mmseg", "mmseg.pth"),
    "classification": ("timm", "timm.pth"),
}
"""Task -> the format of `transfer.formats`, and the file in --out."""

_EXCEPTION = re.compile(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)(?<!ChildFailedError)(:.*)?")
"""The last line of a traceback. torchrun's ChildFailedError only says that one of its processes failed."""

_USAGE_ERRORS = ("train.py: ", "train_net.py: ", "finetune.py: ")

_MAX_REASON = 120
"""Characters of the reason of a failure in the table."""


@dataclass(frozen=True)
class FineTuningRun:
    """One fine-tuning with one seed."""

    name: str
    seed: int
    folder: Path
    options: Options
    """Changes of the recipe."""
    length: RunLength
    """The length with these options."""

    @property
    def fine_tuning(self) -> FineTuning:
        """The entry of `FINE_TUNINGS`."""
        return FINE_TUNINGS[self.name]


def run_folder(out: Path, name: str, seed: int) -> Path:
    """Return the folder of a run: `log.txt`, `started.json`, `run/`, and in the end `done.json` or `failed.json`."""
    return out / name / f"seed_{seed}"


def find_run_folders(out: Path, name: str) -> list[Path]:
    """Return the folders of all runs of a fine-tuning, also of earlier calls, in the order of their seeds."""
    names = (path.name.removeprefix("seed_") for path in (out / name).glob("seed_*"))
    return [run_folder(out, name, seed) for seed in sorted(int(name) for name in names if name.isdecimal())]


def fine_tune(args: argparse.Namespace, run: FineTuningRun, encoder: EncoderWeights) -> bool:
    """Start or resume a run in a subprocess, and return whether it succeeded.

    Writes the recipe to `started.json`, and then also the results to `done.json` or the reason to `failed.json`.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "failed.json").unlink(missing_ok=True)
    command = build_command(args, run, encoder)
    record = make_record(run.fine_tuning, run.options) | {"command": shlex.join(command)}
    write_json(run.folder / "started.json", record)
    path, results = run.folder / "log.txt", run.folder / "run" / "results.json"
    start = path.stat().st_size if path.exists() else 0
    with path.open("a") as log:
        status = run_command(command, log)
    if status == 0 and results.exists():
        record["results"] = json.loads(results.read_text())
        write_json(run.folder / "done.json", record)
        return True
    reason = _find_reason(status, path.read_bytes()[start:].decode(errors="replace"))
    write_json(run.folder / "failed.json", record | {"reason": reason})
    print(f"  failed with exit status {status}: {reason}", flush=True)
    return False


def run_command(command: list[str], log: TextIO) -> int:
    """Run a command, and return its exit status. An exception, such as that of a signal, also ends the command."""
    process = None
    try:
        with _delayed_signals():  # an exception inside of Popen would leave a process that nobody knows
            process = subprocess.Popen(command, stdout=log, stderr=log)
        return process.wait()
    except BaseException:
        if process:
            process.terminate()  # it stops its own processes
            process.wait()
        raise


@contextmanager
def _delayed_signals() -> Iterator[None]:
    """Delay SIGINT and SIGTERM until the end of the `with` block."""
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, lambda signum, _: received.append(signum)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for signum in received:
            signal.raise_signal(signum)


def _find_reason(status: int, log: str) -> str:
    """Return why a command failed, in one short line.

    Args:
        status: its exit status; negative for a signal.
        log: what it printed.
    """
    if status == 0:
        return "no results.json was written"
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    lines = [line.strip() for line in log.splitlines() if re.search(r"\w", line)]
    usage_errors = [line for line in lines if line.startswith(_USAGE_ERRORS)]
    exceptions = [line for line in lines if _EXCEPTION.fullmatch(line)]
    reason = " ".join((usage_errors or exceptions or lines or ["no output"])[-1].split())
    if len(reason) <= _MAX_REASON:
        return reason
    half = (_MAX_REASON - 1) // 2
    return f"{reason[:half]}…{reason[-half:]}"  # the end may name a file


def build_command(args: argparse.Namespace, run: FineTuningRun, encoder: EncoderWeights) -> list[str]:
    """Return the published command of a fine-tuning, as a user would type it."""
    task = run.fine_tuning.task
    weights = str(args.out / CONVERTED[task][1])
    if task == "classification":
        return _classification_command(args.gpus, weights, run)
    method = "SlotFA" if encoder.provenance.get("method") == "slotfa" else "SlotCon"
    config = str(run.fine_tuning.config_path(method))
    return (_detection_command if task == "detection" else _segmentation_command)(args.gpus, config, weights, run)


def _detection_command(gpus: int, config: str, weights: str, run: FineTuningRun) -> list[str]:
    command = [sys.executable, str(TRANSFER / "detection" / "train_net.py"), "--config-file", config]
    command += ["--num-gpus", str(gpus), *_flags(run), *_resume(run)]
    command += ["MODEL.WEIGHTS", weights, "OUTPUT_DIR", str(run.folder / "run"), "SEED", str(run.seed)]
    return [*command, *(word for item in _overrides(run).items() for word in item)]


def _segmentation_command(gpus: int, config: str, weights: str, run: FineTuningRun) -> list[str]:
    command = ["bash", str(TRANSFER / "segmentation" / "mim_dist_train.sh"), config, weights, str(gpus)]
    command += ["--work-dir", str(run.folder / "run"), "--seed", str(run.seed), *_flags(run), *_resume(run)]
    overrides = [f"{key}={value}" for key, value in _overrides(run).items()]
    return [*command, "--cfg-options", *overrides] if overrides else command


def _classification_command(gpus: int, weights: str, run: FineTuningRun) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"] if gpus > 1 else []
    command = [sys.executable, *launcher, str(TRANSFER / "classification" / "finetune.py"), weights]
    dataset = run.fine_tuning.config
    command += ["--dataset", dataset, "--data-dir", str(data_root("classification") / dataset)]
    command += ["--output-dir", str(run.folder / "run"), "--seed", str(run.seed), "--auto-resume"]
    return [*command, "--device", "cuda" if gpus else "cpu", *_flags(run)]


def _flags(run: FineTuningRun) -> list[str]:
    """Return the options that are flags of the command, and their values."""
    return [word for item in run.options.items() if item[0].startswith("--") for word in item if word]


def _overrides(run: FineTuningRun) -> Options:
    """Return the options that are keys of the config."""
    return {key: value for key, value in run.options.items() if not key.startswith("--")}


def _resume(run: FineTuningRun) -> list[str]:
    return ["--resume"] if has_checkpoint(run.folder) else []
