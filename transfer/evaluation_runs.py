"""The runs of evaluate.py: the command of each, and how it ended."""

import argparse
import json
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from transfer.encoders import EncoderWeights
from transfer.finetuning import FINE_TUNINGS, TRANSFER, FineTuning
from transfer.recipe_options import Options, describe_recipe
from transfer.results import write_json
from transfer.training_time import Schedule

CONVERTED = {"detection": ("detectron2", "detectron2.pkl"), "segmentation": ("mmseg", "mmseg.pth")}
"""Task -> the format of `transfer.formats`, and the file in --out."""

_EXCEPTION = re.compile(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)(?<!ChildFailedError)(:.*)?")
"""The last line of a traceback. torchrun's ChildFailedError only says that one of its processes failed."""

_MAX_REASON = 120
"""Characters of the reason of a failure in the table."""


@dataclass(frozen=True)
class Run:
    """One fine-tuning with one seed."""

    name: str
    seed: int
    folder: Path
    options: Options
    """Changes of the recipe."""
    schedule: Schedule
    """The length with these options."""

    @property
    def fine_tuning(self) -> FineTuning:
        """The entry of `FINE_TUNINGS`."""
        return FINE_TUNINGS[self.name]


def run_folder(out: Path, name: str, seed: int) -> Path:
    """Return the folder of a run: `log.txt`, `run/` and, if it has ended, `done.json` or `failed.json`."""
    return out / name / f"seed_{seed}"


def fine_tune(args: argparse.Namespace, run: Run, encoder: EncoderWeights) -> bool:
    """Start or resume a run in a subprocess, write `done.json` or `failed.json`, and return whether it succeeded."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "failed.json").unlink(missing_ok=True)
    command = build_command(args, run, encoder)
    record = {"recipe": describe_recipe(run.fine_tuning, run.options), "command": shlex.join(command)}
    path, results = run.folder / "log.txt", run.folder / "run" / "results.json"
    start = path.stat().st_size if path.exists() else 0
    with path.open("a") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            status = process.wait()
        except BaseException:
            process.terminate()  # it stops its own processes; leaving the `with` block waits for it
            raise
    if status == 0 and results.exists():
        record["results"] = json.loads(results.read_text())
        write_json(run.folder / "done.json", record)
        return True
    reason = _find_reason(status, path.read_bytes()[start:].decode(errors="replace"))
    write_json(run.folder / "failed.json", record | {"reason": reason})
    print(f"  failed with exit status {status}: {reason}", flush=True)
    return False


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
    usage_errors = [line for line in lines if line.startswith(("train.py: ", "train_net.py: "))]
    exceptions = [line for line in lines if _EXCEPTION.fullmatch(line)]
    reason = " ".join((usage_errors or exceptions or lines or ["no output"])[-1].split())
    return reason if len(reason) <= _MAX_REASON else f"{reason[: _MAX_REASON - 1]}…"


def build_command(args: argparse.Namespace, run: Run, encoder: EncoderWeights) -> list[str]:
    """Return the published command of a fine-tuning, as a user would type it."""
    task, output = run.fine_tuning.task, run.folder / "run"
    method = "SlotFA" if encoder.provenance.get("method") == "slotfa" else "SlotCon"
    config = str(TRANSFER / task / "configs" / run.fine_tuning.config.format(method=method))
    weights = str(args.out / CONVERTED[task][1])
    resume = ["--resume"] if (output / "last_checkpoint").exists() else []
    if task == "detection":
        command = [sys.executable, str(TRANSFER / "detection" / "train_net.py"), "--config-file", config]
        command += ["--num-gpus", str(args.gpus), *resume]
        flags = [word for item in run.options.items() if item[0].startswith("--") for word in item if word]
        pairs = [word for item in run.options.items() if not item[0].startswith("--") for word in item]
        return [*command, *flags, "MODEL.WEIGHTS", weights, "OUTPUT_DIR", str(output), "SEED", str(run.seed), *pairs]
    command = ["bash", str(TRANSFER / "segmentation" / "mim_dist_train.sh"), config, weights, str(args.gpus)]
    command += ["--work-dir", str(output), "--seed", str(run.seed), *resume]
    overrides = [f"{key}={value}" for key, value in run.options.items()]
    return [*command, "--cfg-options", *overrides] if overrides else command
