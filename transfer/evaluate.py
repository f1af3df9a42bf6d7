"""Fine-tune a checkpoint on every dataset that is linked, and write one table of the metrics."""

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
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transfer.encoders import EncoderWeights, read_encoder
from transfer.finetuning import FINE_TUNINGS, PUBLISHED, TRANSFER
from transfer.formats import write_converted
from transfer.results import write_json
from transfer.verify import load_image, verify
from utils import distributed
from utils.config import at_least, make_parser
from utils.errors import UsageError
from utils.files import atomic_write_text, check_writable

_CONVERTED = {"detection": ("detectron2", "detectron2.pkl"), "segmentation": ("mmseg", "mmseg.pth")}
"""Task -> the format of `transfer.formats`, and the file in --out."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exit with status 0, with 1 if a fine-tuning failed, with 2 after a usage error."""
    args = _parse_args(argv)
    signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        complete = evaluate(args)
    except UsageError as error:
        distributed.exit_with_error(str(error))
    except (KeyboardInterrupt, _Terminated):
        distributed.exit_with_error("interrupted; run the same command again to resume", status=130)
    sys.exit(0 if complete else 1)


class _Terminated(BaseException):
    """The process received SIGTERM, which batch systems send."""


def _raise_terminated(*_: object) -> NoReturn:
    raise _Terminated


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("Fine-tune a checkpoint on every dataset that is linked, and write one table of the metrics.")
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", type=Path, help="any checkpoint that transfer/convert.py reads")
    add("--out", type=Path, help="folder of runs and tables (default: output/evaluation/, named after CKPT)")
    add(
        "--only",
        nargs="+",
        choices=tuple(FINE_TUNINGS),
        metavar="NAME",
        help=f"fine-tunings to run (default: all): {', '.join(FINE_TUNINGS)}",
    )
    add(
        "--seeds",
        type=at_least(1),
        default=1,
        help="number of runs of each fine-tuning, with the seeds 0, 1, ...; the table shows mean and standard "
        "deviation",
    )
    add("--gpus", type=at_least(0), default=torch.cuda.device_count(), help="number of GPUs, 0 for the CPU")
    add(
        "--encoder",
        choices=("teacher", "student"),
        help="which encoder to use (default: the teacher, if there are two)",
    )
    add(
        "--detection-options",
        metavar="OPTIONS",
        default="",
        help="more arguments of train_net.py, such as 'SOLVER.MAX_ITER 900' or --detection-options=--auto-scale",
    )
    add(
        "--segmentation-options",
        metavar="OPTIONS",
        default="",
        help="overrides for mmsegmentation's --cfg-options, such as 'train_cfg.max_iters=900'",
    )
    args = parser.parse_args(argv)
    args.out = args.out or Path("output/evaluation") / f"{args.checkpoint.resolve().parent.name}_{args.checkpoint.stem}"
    return args


def evaluate(args: argparse.Namespace) -> bool:
    """Run every fine-tuning that has not finished yet, and update the tables after each.

    Returns:
        Whether all fine-tunings that are available on this machine have finished.

    Raises:
        UsageError: the checkpoint or an option cannot be used, or --out contains the evaluation of another.
    """
    _check_detection_options(args.detection_options)
    encoder = read_encoder(args.checkpoint, args.encoder)
    unavailable = {name: FINE_TUNINGS[name].why_unavailable(encoder.arch) for name in args.only or FINE_TUNINGS}
    available = [name for name, reason in unavailable.items() if not reason]
    if not available:
        raise UsageError(f"nothing can run here: {'; '.join(sorted(set(unavailable.values())))}")
    _prepare_folder(args, encoder)
    _convert(args, encoder, {FINE_TUNINGS[name].task for name in available})
    runs = [(name, seed) for name in available for seed in range(args.seeds)]
    failed = []
    for number, (name, seed) in enumerate(runs, start=1):
        folder = _run_folder(args, name, seed)
        if not (folder / "done.json").exists():
            print(f"[{number}/{len(runs)}] {FINE_TUNINGS[name].title}, seed {seed}: {folder}/log.txt", flush=True)
            if _fine_tune(args, name, seed, encoder):
                failed.append((name, seed))
            _write_tables(args, unavailable, failed, encoder)
    print(_write_tables(args, unavailable, failed, encoder))
    print(f"written to {args.out}/results.md and results.json")
    return not failed


def _check_detection_options(options: str) -> None:
    """Check that all flags among the options are supported; others would break or repeat those of `build_command`.

    Raises:
        UsageError: one is not.
    """
    for option in shlex.split(options):
        if option.startswith("--") and option != "--auto-scale":
            raise UsageError(f"--detection-options: {option} is not supported; only --auto-scale and KEY VALUE pairs")


def _run_folder(args: argparse.Namespace, name: str, seed: int) -> Path:
    return args.out / name / f"seed_{seed}"


def _prepare_folder(args: argparse.Namespace, encoder: EncoderWeights) -> None:
    """Create --out, and record in `evaluated.json` which encoder and options it belongs to.

    Raises:
        UsageError: it cannot be written, or belongs to others.
    """
    check_writable("--out", args.out, overwrite=True, folder=True)
    record, options = args.out / "evaluated.json", ("detection_options", "segmentation_options")
    if record.exists():
        previous = json.loads(record.read_text())
        conflicts = [
            f"--{name.replace('_', '-')} '{previous[name]}'" for name in options if previous[name] != vars(args)[name]
        ]
        if any(previous["checkpoint"].get(key) != encoder.provenance[key] for key in ("source_sha256", "encoder")):
            conflicts = ["another checkpoint", *conflicts]
        if conflicts:
            raise UsageError(f"--out {args.out}: contains the evaluation of {conflicts[0]}; use another folder")
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(record, {"checkpoint": encoder.provenance} | {name: vars(args)[name] for name in options})


def _convert(args: argparse.Namespace, encoder: EncoderWeights, tasks: set[str]) -> None:
    """Convert the encoder for each task, and compare the features of the result with the checkpoint's.

    An existing file is compared as well, because the call that wrote it may have been interrupted before that.

    Raises:
        UsageError: a file cannot be written, or its features differ.
    """
    for target, name in (_CONVERTED[task] for task in sorted(tasks)):
        path = args.out / name
        if not path.exists():
            write_converted(path, encoder, target)
        print(f"{path}: {verify(args.checkpoint, path, args.encoder, load_image(), target)}", flush=True)


def _fine_tune(args: argparse.Namespace, name: str, seed: int, encoder: EncoderWeights) -> int:
    """Start or resume one run in a subprocess, write `done.json` if it succeeds, and return its exit status."""
    folder = _run_folder(args, name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    command = build_command(args, name, seed, encoder)
    with (folder / "log.txt").open("a") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            status = process.wait()
        except BaseException:
            process.terminate()  # it stops its own processes; leaving the `with` block waits for it
            raise
    if status:
        print(f"  failed with exit status {status}: {_find_error(folder / 'log.txt')}", flush=True)
    else:
        results = json.loads((folder / "run" / "results.json").read_text())
        write_json(folder / "done.json", {"command": shlex.join(command), "results": results})
    return status


def _find_error(log: Path) -> str:
    """Return the last usage error of this project's commands in a log, or else its last line."""
    lines = log.read_text(errors="replace").strip().splitlines() or [""]
    errors = [line for line in lines if line.startswith(("train.py: ", "train_net.py: "))]
    return (errors or lines)[-1]


def build_command(args: argparse.Namespace, name: str, seed: int, encoder: EncoderWeights) -> list[str]:
    """Return the published command of a fine-tuning, as a user would type it."""
    fine_tuning, run = FINE_TUNINGS[name], _run_folder(args, name, seed) / "run"
    method = "SlotFA" if encoder.provenance.get("method") == "slotfa" else "SlotCon"
    config = str(TRANSFER / fine_tuning.task / "configs" / fine_tuning.config.format(method=method))
    weights = str(args.out / _CONVERTED[fine_tuning.task][1])
    resume = ["--resume"] if (run / "last_checkpoint").exists() else []
    if fine_tuning.task == "detection":
        command = [sys.executable, str(TRANSFER / "detection" / "train_net.py"), "--config-file", config]
        command += ["--num-gpus", str(args.gpus), *resume]
        options = shlex.split(args.detection_options)
        flags = [option for option in options if option.startswith("--")]
        pairs = [option for option in options if not option.startswith("--")]
        return [*command, *flags, "MODEL.WEIGHTS", weights, "OUTPUT_DIR", str(run), "SEED", str(seed), *pairs]
    command = ["bash", str(TRANSFER / "segmentation" / "mim_dist_train.sh"), config, weights, str(args.gpus)]
    command += ["--work-dir", str(run), "--seed", str(seed), *resume]
    overrides = shlex.split(args.segmentation_options)
    return [*command, "--cfg-options", *overrides] if overrides else command


def _write_tables(
    args: argparse.Namespace, unavailable: dict[str, str], failed: list[tuple[str, int]], encoder: EncoderWeights
) -> str:
    """Write `results.json` and `results.md`, and return the text of the latter."""
    rows = [row for name, reason in unavailable.items() for row in _collect_rows(args, name, reason, failed)]
    write_json(args.out / "results.json", {"checkpoint": encoder.provenance, "results": rows})
    options = " ".join(filter(None, [args.detection_options, args.segmentation_options]))
    changed = f"\nNot the published recipe: `{options}`\n" if options else ""
    text = f"# {args.checkpoint} ({encoder.provenance['encoder']})\n{changed}\n{format_table(rows)}"
    atomic_write_text(args.out / "results.md", text)
    return text


def _collect_rows(
    args: argparse.Namespace, name: str, reason: str, failed: list[tuple[str, int]]
) -> list[dict[str, Any]]:
    """Return a row for each metric: its values by seed, mean and standard deviation, or why there are none.

    Args:
        reason: why the fine-tuning is unavailable; empty if it is available.
    """
    files = [_run_folder(args, name, seed) / "done.json" for seed in range(args.seeds)]
    results = [json.loads(file.read_text())["results"] for file in files if file.exists()]
    if not reason and len(results) < args.seeds:
        logs = [str(_run_folder(args, *run) / "log.txt") for run in failed if run[0] == name]
        reason = f"failed, see {', '.join(logs)}" if logs else "not finished"
    fine_tuning = FINE_TUNINGS[name]
    changed = args.detection_options if fine_tuning.task == "detection" else args.segmentation_options
    rows = []
    for metric, keys in fine_tuning.metrics.items():
        values = [value for result in results if (value := _look_up(result, keys)) is not None]
        row: dict[str, Any] = {"task": name, "title": fine_tuning.title, "metric": metric, "values": values}
        row |= {"runs": len(results), "mean": statistics.fmean(values) if values else None}
        row |= {"std": statistics.stdev(values) if len(values) > 1 else None}
        note = reason or ("" if values else "no value, because the model has no predictions")
        rows.append(row | {"published": None if changed else PUBLISHED.get((name, metric)), "note": note})
    return rows


def _look_up(results: Any, keys: str) -> float | None:
    """Return the value at `keys`, joined by dots, in nested dicts; None if there is none."""
    for key in keys.split("."):
        results = results.get(key) if results else None
    return results


def format_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table, with the mean and the sample standard deviation over the seeds."""
    cells = []
    for row in rows:
        mean = "" if row["mean"] is None else f"{row['mean']:.2f}"
        std = "" if row["std"] is None else f" ± {row['std']:.2f}"
        published = "" if row["published"] is None else f"{row['published']:.1f}"
        cells.append((row["title"], row["metric"], mean + std, row["runs"], published, row["note"]))
    headers = ("fine-tuning", "metric", "mean ± std", "runs", "SlotCon paper, COCO 800 ep.", "note")
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True) + "\n"


if __name__ == "__main__":
    main()
