"""From a checkpoint to one table of numbers: every fine-tuning that has its data linked, one after the other."""

import argparse
import json
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transfer.encoders import EncoderWeights, read_encoder
from transfer.formats import write
from transfer.tasks import FOLDER, PUBLISHED, TASKS
from transfer.verify import load_image, verify
from utils import config, distributed
from utils.errors import UsageError
from utils.files import atomic_write_text

_CONVERTED = {"detection": ("detectron2", "detectron2.pkl"), "segmentation": ("mmseg", "mmseg.pth")}


def main(argv: Sequence[str] | None = None) -> None:
    """The command: a user's mistake ends in one line and exit status 2, a fine-tuning that failed in status 1."""
    args = _parse_args(argv)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        complete = evaluate(args)
    except UsageError as error:
        distributed.exit_with_error(str(error))
    except (KeyboardInterrupt, _Terminated):
        distributed.exit_with_error("stopped; the same command goes on from here", status=130)
    sys.exit(0 if complete else 1)


class _Terminated(BaseException):
    """SIGTERM, as a batch system sends it."""


def _terminate(*_: object) -> NoReturn:
    raise _Terminated


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = config.make_parser("Fine-tune a checkpoint on all data that is linked, and gather the numbers.")
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="any that transfer/convert.py reads")
    said = "folder of runs and tables (output/evaluation/ and CKPT's folder and name)"
    parser.add_argument("--out", type=Path, help=said)
    said = f"of {', '.join(TASKS)} (all)"
    parser.add_argument("--only", nargs="+", choices=tuple(TASKS), metavar="TASK", help=said)
    said = "how often to fine-tune each; more than once gives mean and standard deviation"
    parser.add_argument("--seeds", type=int, default=1, help=said)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count(), help="0 is the CPU")
    said = "which of two encoders (the teacher if not said, where there are two)"
    parser.add_argument("--encoder", choices=("teacher", "student"), help=said)
    said = "more words for train_net.py, as in 'SOLVER.MAX_ITER 900' or --detection-options=--auto-scale"
    parser.add_argument("--detection-options", metavar="WORDS", default="", help=said)
    said = "more words for mmsegmentation's --cfg-options, as in 'train_cfg.max_iters=900'"
    parser.add_argument("--segmentation-options", metavar="WORDS", default="", help=said)
    args = parser.parse_args(argv)
    args.out = args.out or Path("output/evaluation") / f"{args.checkpoint.resolve().parent.name}_{args.checkpoint.stem}"
    return args


def evaluate(args: argparse.Namespace) -> bool:
    """Fine-tune what has not been fine-tuned yet, and write the tables after each.

    Returns:
        Whether all fine-tunings that were possible came to their end.

    Raises:
        UsageError: the checkpoint is of no use, or the folder holds the evaluation of another.
    """
    if args.seeds < 1 or args.gpus < 0:
        raise UsageError(f"--seeds {args.seeds} --gpus {args.gpus}: at least 1 seed, and 0 GPUs or more")
    encoder = read_encoder(args.checkpoint, args.encoder)
    skipped = {name: TASKS[name].missing(encoder.arch) for name in args.only or TASKS}
    if all(skipped.values()):
        raise UsageError(f"nothing can run here: {'; '.join(sorted(set(skipped.values())))}")
    _convert(args, encoder, {TASKS[name].framework for name, reason in skipped.items() if not reason})
    todo = [(name, seed) for name, reason in skipped.items() if not reason for seed in range(args.seeds)]
    failed = []
    for number, (name, seed) in enumerate(todo, start=1):
        folder = _folder(args, name, seed)
        if not (folder / "done.json").exists():
            print(f"[{number}/{len(todo)}] {TASKS[name].title}, seed {seed}: {folder}/log.txt", flush=True)
            failed += [(name, seed)] if _fine_tune(args, name, seed, encoder) else []
            _write_tables(args, skipped, failed, encoder)
    print(_write_tables(args, skipped, failed, encoder))
    print(f"written to {args.out}/results.md and results.json")
    return not failed


def _folder(args: argparse.Namespace, name: str, seed: int) -> Path:
    return args.out / name / f"seed_{seed}"


def _convert(args: argparse.Namespace, encoder: EncoderWeights, frameworks: set[str]) -> None:
    """The encoder in the formats of `frameworks`, compared with the checkpoint; what was there must be of it, too."""
    mark = args.out / "evaluated.json"
    facts: dict[str, Any] = {"checkpoint": encoder.provenance}
    facts |= {name: getattr(args, name) for name in ("detection_options", "segmentation_options")}
    before = json.loads(mark.read_text()) if mark.exists() else facts
    for name, value in facts.items():
        if before[name] != value:
            of = "another checkpoint" if name == "checkpoint" else f"--{name.replace('_', '-')} '{before[name]}'"
            raise UsageError(f"--out {args.out}: holds the evaluation of {of}; use another folder")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {args.out}: cannot be made ({error.strerror}); use another folder") from None
    _write_json(mark, facts)
    for target, file in (_CONVERTED[framework] for framework in sorted(frameworks)):
        if not (args.out / file).exists():
            write(args.out / file, encoder, target)
            print(
                f"{args.out / file}: {verify(args.checkpoint, args.out / file, args.encoder, load_image())}", flush=True
            )


def _fine_tune(args: argparse.Namespace, name: str, seed: int, encoder: EncoderWeights) -> int:
    """One run, from where it stopped if it has begun; returns its exit status, and leaves `done.json` if that is 0."""
    folder = _folder(args, name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    command = _command(args, name, seed, encoder)
    with (folder / "log.txt").open("a") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            status = process.wait()
        except BaseException:
            process.terminate()  # it stops its own processes; leaving the block waits for it
            raise
    if status:
        print(f"  failed with exit status {status}: {_reason(folder / 'log.txt')}", flush=True)
    else:
        results = json.loads((folder / "run" / "results.json").read_text())
        _write_json(folder / "done.json", {"command": shlex.join(command), "results": results})
    return status


def _reason(log: Path) -> str:
    """The line in which a command of ours told its mistake, or else the last."""
    lines = log.read_text(errors="replace").strip().splitlines() or [""]
    told = [line for line in lines if line.startswith(("train.py: ", "train_net.py: "))]
    return (told or lines)[-1]


def _command(args: argparse.Namespace, name: str, seed: int, encoder: EncoderWeights) -> list[str]:
    """The published command of a task, as a user would type it."""
    task, run = TASKS[name], _folder(args, name, seed) / "run"
    method = "SlotFA" if encoder.provenance.get("method") == "slotfa" else "SlotCon"
    config = str(FOLDER / task.framework / "configs" / task.config.format(method=method))
    weights = str(args.out / _CONVERTED[task.framework][1])
    resume = ["--resume"] if (run / "last_checkpoint").exists() else []
    if task.framework == "detection":
        command = [sys.executable, str(FOLDER / "detection" / "train_net.py"), "--config-file", config]
        command += ["--num-gpus", str(args.gpus), *resume]
        more = shlex.split(args.detection_options)
        flags = [word for word in more if word.startswith("--")]
        values = [word for word in more if not word.startswith("--")]
        return [*command, *flags, "MODEL.WEIGHTS", weights, "OUTPUT_DIR", str(run), "SEED", str(seed), *values]
    command = ["bash", str(FOLDER / "segmentation" / "mim_dist_train.sh"), config, weights, str(args.gpus)]
    more = shlex.split(args.segmentation_options)
    return [*command, "--work-dir", str(run), "--seed", str(seed), *resume, *(["--cfg-options", *more] if more else [])]


def _write_tables(
    args: argparse.Namespace, skipped: dict[str, str], failed: list[tuple[str, int]], encoder: EncoderWeights
) -> str:
    """`results.json` and `results.md`; returns the latter."""
    rows = [row for name in skipped for row in _rows(args, name, skipped[name], failed)]
    _write_json(args.out / "results.json", {"checkpoint": encoder.provenance, "results": rows})
    options = [args.detection_options, args.segmentation_options]
    changed = f"\nNot the published recipe: `{' '.join(filter(None, options))}`\n" if any(options) else ""
    text = f"# {args.checkpoint} ({encoder.provenance['encoder']})\n{changed}\n{markdown(rows)}"
    atomic_write_text(args.out / "results.md", text)
    return text


def _rows(args: argparse.Namespace, name: str, reason: str, failed: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """A row for each metric of a task: its values by seed, their mean and deviation, or why there are none."""
    files = [_folder(args, name, seed) / "done.json" for seed in range(args.seeds)]
    found = [json.loads(file.read_text())["results"] for file in files if file.exists()]
    if not reason and len(found) < args.seeds:
        logs = [str(_folder(args, *run) / "log.txt") for run in failed if run[0] == name]
        reason = f"failed, see {', '.join(logs)}" if logs else "not finished"
    rows = []
    for metric, place in TASKS[name].metrics.items():
        values = [value for results in found if (value := _at(results, place)) is not None]
        row: dict[str, Any] = {"task": name, "title": TASKS[name].title, "metric": metric, "values": values}
        row |= {"runs": len(found), "mean": statistics.fmean(values) if values else None}
        row |= {"deviation": statistics.stdev(values) if len(values) > 1 else None}
        changed = args.detection_options if TASKS[name].framework == "detection" else args.segmentation_options
        published = None if changed else PUBLISHED.get((name, metric))
        note = reason or ("" if values else "nothing to score: the model predicts nothing")
        rows.append(row | {"published": published, "note": note})
    return rows


def _at(results: Any, place: str) -> float | None:
    for name in place.split("."):
        results = results[name]
    return results


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table; mean and sample standard deviation over seeds."""
    lines = [
        "| evaluation | metric | value | seeds | SlotCon, COCO 800 ep. | note |",
        "| --- " * 6 + "|",
    ]
    for row in rows:
        value = "" if row["mean"] is None else f"{row['mean']:.2f}"
        value += "" if row["deviation"] is None else f" ± {row['deviation']:.2f}"
        published = "" if row["published"] is None else f"{row['published']:.1f}"
        cells = (row["title"], row["metric"], value, str(row["runs"]), published, row["note"])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _write_json(path: Path, content: Any) -> None:
    atomic_write_text(path, json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
