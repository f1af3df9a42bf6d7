"""Fine-tune a checkpoint on every dataset that is linked, and write one table of the metrics."""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transfer.encoders import EncoderWeights, read_encoder
from transfer.evaluation.fine_tunings import DEFAULT_NAMES, FINE_TUNINGS
from transfer.evaluation.plan import print_plan
from transfer.evaluation.recipe_options import (
    Options,
    add_max_val_images,
    change_length,
    describe_recipe,
    parse_options,
)
from transfer.evaluation.recipe_records import check_record, make_record
from transfer.evaluation.runs import CONVERTED, FineTuningRun, find_run_folders, fine_tune, run_folder
from transfer.evaluation.table import collect_rows, format_table
from transfer.formats import write_converted
from transfer.frameworks import PACKAGES, data_root, is_installed
from transfer.results import write_json
from transfer.verify import load_image, verify
from utils import distributed
from utils.config import at_least, make_parser
from utils.errors import UsageError
from utils.files import atomic_write_text, check_writable


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exit with status 0, with 1 if a fine-tuning failed, with 2 after a usage error."""
    args = _parse_args(argv)
    previous = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        complete = evaluate(args)
    except UsageError as error:
        distributed.exit_with_error(str(error))
    except (KeyboardInterrupt, _Terminated):
        distributed.exit_with_error("interrupted; run the same command again to resume", status=130)
    finally:
        signal.signal(signal.SIGTERM, previous)
    sys.exit(0 if complete else 1)


class _Terminated(BaseException):
    """The process received SIGTERM, which batch systems send."""


def _raise_terminated(*_: object) -> NoReturn:
    raise _Terminated


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("Fine-tune a checkpoint on every dataset that is linked, and write one table of the metrics.")
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="any checkpoint that transfer/convert.py reads")
    parser.add_argument(
        "--encoder",
        choices=("teacher", "student"),
        help="which encoder to use (default: the teacher, if there are two)",
    )
    parser.add_argument(
        "--out", type=Path, help="folder of runs and tables (default: output/evaluation/, named after CKPT)"
    )
    _add_run_arguments(parser.add_argument_group("runs"))
    _add_recipe_arguments(parser.add_argument_group("changes of the recipes"))
    args = parser.parse_args(argv)
    args.names = list(dict.fromkeys(args.only or DEFAULT_NAMES))
    args.out = (
        args.out or Path("output/evaluation") / f"{args.checkpoint.absolute().parent.name}_{args.checkpoint.stem}"
    )
    return args


def _add_run_arguments(group: argparse._ArgumentGroup) -> None:
    others = (name for name in FINE_TUNINGS if name not in DEFAULT_NAMES)
    group.add_argument(
        "--only",
        nargs="+",
        choices=tuple(FINE_TUNINGS),
        metavar="NAME",
        help=f"fine-tunings to run (default: {', '.join(DEFAULT_NAMES)}); also {', '.join(others)}",
    )
    group.add_argument(
        "--seeds",
        type=at_least(1),
        default=1,
        help="runs of each fine-tuning, with the seeds 0, 1, ...; the table shows mean and standard deviation",
    )
    group.add_argument(
        "--device",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="auto: the GPUs; without one, the runs are only listed, with estimates of their time",
    )
    group.add_argument("--gpus", type=at_least(0), help="number of GPUs (default: all)")


def _add_recipe_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-val-images",
        type=at_least(1),
        metavar="N",
        help="evaluate on N images only (default: all); cityscapes_instances always uses all",
    )
    group.add_argument(
        "--detection-options",
        metavar="OPTIONS",
        default="",
        help="more arguments of train_net.py: KEY VALUE pairs and --auto-scale, such as 'SOLVER.MAX_ITER 900'; "
        "--detection-options=--auto-scale needs the equals sign",
    )
    group.add_argument(
        "--segmentation-options",
        metavar="OPTIONS",
        default="",
        help="overrides for mmsegmentation's --cfg-options, such as 'train_cfg.max_iters=900'",
    )
    group.add_argument(
        "--classification-options",
        metavar="OPTIONS",
        default="",
        help="more flags of finetune.py; --classification-options='--epochs 1' needs the equals sign",
    )


def evaluate(args: argparse.Namespace) -> bool:
    """Run every fine-tuning that has not finished yet, and update the tables after each.

    Returns:
        Whether all fine-tunings that are available on this machine have finished.

    Raises:
        UsageError: the checkpoint, an option or --out cannot be used, no fine-tuning can run, or the runs need
            --device cpu.
    """
    options = _parse_options(args)
    args.gpus = _count_gpus(args)
    encoder = read_encoder(args.checkpoint, args.encoder)
    _check_folder(args, encoder, options)
    runs = _list_unfinished(args, options)
    skipped = {run.name: run.fine_tuning.why_unavailable(encoder.arch) for run in runs}
    if (args.out / "evaluated.json").exists():
        _write_tables(args, skipped, options, encoder)  # also if no fine-tuning can run
    _report_skipped(args, skipped, encoder.arch)
    runs = [run for run in runs if not skipped[run.name]]
    _report_all_images(args, runs)
    if runs and not args.gpus:
        print_plan(runs, encoder.arch)
        if args.device != "cpu":
            raise UsageError("no GPU found; add --device cpu to start these runs on the CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "evaluated.json", {"checkpoint": encoder.provenance})
    _convert(args, encoder, {run.fine_tuning.task for run in runs})
    table = _write_tables(args, skipped, options, encoder)
    complete = True
    for number, run in enumerate(runs, start=1):
        print(f"[{number}/{len(runs)}] {run.fine_tuning.title}, seed {run.seed}: {run.folder}/log.txt", flush=True)
        complete &= fine_tune(args, run, encoder)
        table = _write_tables(args, skipped, options, encoder)
    print(table)
    print(f"written to {args.out}/results.md and results.json")
    return complete


def _parse_options(args: argparse.Namespace) -> dict[str, Options]:
    """Return the options of each fine-tuning by its name.

    Raises:
        UsageError: an option is invalid.
    """
    by_task = {task: parse_options(task, vars(args)[f"{task}_options"]) for task in PACKAGES}
    return {
        name: add_max_val_images(fine_tuning, by_task[fine_tuning.task], args.max_val_images)
        for name, fine_tuning in FINE_TUNINGS.items()
    }


def _count_gpus(args: argparse.Namespace) -> int:
    """Return the number of GPUs to use; 0 for the CPU, and also if this machine has none.

    Raises:
        UsageError: there are fewer GPUs than --gpus, or --gpus contradicts --device.
    """
    available = torch.cuda.device_count()
    if args.gpus == 0 and args.device != "cpu":
        raise UsageError("--gpus 0: use --device cpu")
    if args.device == "cpu":
        if args.gpus:
            raise UsageError(f"--gpus {args.gpus}: --device cpu uses no GPU; omit one of the two")
        return 0
    if args.device == "cuda" and not available:
        raise UsageError("--device cuda: no GPU found; use --device cpu")
    if available and args.gpus and args.gpus > available:
        raise UsageError(f"--gpus {args.gpus}: this machine has {available}")
    return min(args.gpus or available, available)


def _check_folder(args: argparse.Namespace, encoder: EncoderWeights, options: dict[str, Options]) -> None:
    """Check that --out can be written, and that its runs have the same encoder and, if they are requested, options.

    Raises:
        UsageError: otherwise.
    """
    check_writable("--out", args.out, overwrite=True, folder=True)
    path = args.out / "evaluated.json"
    previous = json.loads(path.read_text())["checkpoint"] if path.exists() else encoder.provenance
    if any(previous.get(key) != encoder.provenance[key] for key in ("source_sha256", "encoder")):
        raise UsageError(f"--out {args.out}: contains the evaluation of another checkpoint; use another folder")
    for name in args.names:
        record = make_record(FINE_TUNINGS[name], options[name])
        for folder in find_run_folders(args.out, name):
            check_record(folder, record)


def _list_unfinished(args: argparse.Namespace, options: dict[str, Options]) -> list[FineTuningRun]:
    """Return the requested runs that have no result yet, in the order in which they start.

    Raises:
        UsageError: an option that sets the length is not a whole number.
    """
    runs = []
    for name in args.names:
        length = change_length(FINE_TUNINGS[name], options[name], processes=max(args.gpus, 1))
        for seed in range(args.seeds):
            runs.append(FineTuningRun(name, seed, run_folder(args.out, name, seed), options[name], length))
    return [run for run in runs if not (run.folder / "done.json").exists()]


def _report_skipped(args: argparse.Namespace, skipped: dict[str, str], arch: str) -> None:
    """Print why fine-tunings are skipped.

    Args:
        skipped: name of each fine-tuning with unfinished runs -> why it cannot run; empty if it can.
        arch: the architecture of the encoder.

    Raises:
        UsageError: none of the requested fine-tunings can run or has a result.
    """
    reasons = {name: reason for name, reason in skipped.items() if reason}
    results = [path for name in args.names for path in (args.out / name).glob("seed_*/done.json")]
    nothing_to_do = len(reasons) == len(args.names) and not results
    if nothing_to_do and len(set(reasons.values())) == 1:
        raise UsageError(f"no fine-tuning can run: {reasons[args.names[0]]}")
    for name, reason in reasons.items():
        print(f"skipped {name}: {reason}", flush=True)
    if nothing_to_do:
        tasks = dict.fromkeys(FINE_TUNINGS[name].task for name in reasons if FINE_TUNINGS[name].accepts_arch(arch))
        if not tasks:
            raise UsageError(f"no fine-tuning can run: none of these configs is for {arch}")
        missing = "; ".join(
            f"no complete dataset in {data_root(task)}" if is_installed(task) else f"{PACKAGES[task]} is not installed"
            for task in tasks
        )
        raise UsageError(f'no fine-tuning can run: {missing}; see "Install" and "Link the data" in transfer/README.md')


def _report_all_images(args: argparse.Namespace, runs: list[FineTuningRun]) -> None:
    """Print which fine-tunings ignore --max-val-images, if it is given."""
    names = dict.fromkeys(run.name for run in runs if args.max_val_images and run.fine_tuning.evaluates_all_images)
    for name in names:
        print(f"{name}: --max-val-images has no effect, because detectron2 evaluates Cityscapes on all images only")


def _convert(args: argparse.Namespace, encoder: EncoderWeights, tasks: set[str]) -> None:
    """Convert the encoder for each task, and compare the features of the result with the checkpoint's.

    An existing file is compared as well, because the call that wrote it may have been interrupted before that.

    Raises:
        UsageError: a file cannot be written, or its features differ.
    """
    for target, name in (CONVERTED[task] for task in sorted(tasks)):
        path = args.out / name
        if not path.exists():
            write_converted(path, encoder, target)
        print(f"{path}: {verify(args.checkpoint, path, args.encoder, load_image(), target)}", flush=True)


def _write_tables(
    args: argparse.Namespace, skipped: dict[str, str], options: dict[str, Options], encoder: EncoderWeights
) -> str:
    """Write `results.json` and `results.md` of all runs in --out, and return the text of the latter."""
    rows = []
    for name, fine_tuning in FINE_TUNINGS.items():
        recipe = describe_recipe(fine_tuning, options[name])
        seeds, reason = args.seeds if name in skipped else 0, skipped.get(name, "")
        rows += collect_rows(args.out, name, encoder.arch, seeds, reason, recipe)
    write_json(args.out / "results.json", {"checkpoint": encoder.provenance, "results": rows})
    text = f"# {args.checkpoint} ({encoder.provenance['encoder']})\n\n{format_table(rows)}"
    atomic_write_text(args.out / "results.md", text)
    return text


if __name__ == "__main__":
    main()
