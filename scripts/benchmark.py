"""Measure the speed and memory of a training run: its step, its data loader, or both together."""

import argparse
import gc
import itertools
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in main_pretrain.py: before torch is imported
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler logs its own progress
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import main_pretrain
from scripts.benchmark_loader import benchmark_loader, folder_dataset
from scripts.benchmark_table import Row, report
from scripts.benchmark_training import benchmark_end_to_end, benchmark_step
from utils import distributed
from utils.compiler import resolve_compile
from utils.config import at_least, make_parser
from utils.device import choose_device
from utils.errors import UsageError
from utils.files import check_writable

COMMANDS = {
    "step": (benchmark_step, "the training step, fed with one batch from memory"),
    "loader": (benchmark_loader, "the parts of loading and augmenting images, and the DataLoader"),
    "end-to-end": (benchmark_end_to_end, "training from image files, compared with the step alone"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a wrong call, or code that does not compile, ends it with one line and exit status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    own_flags = argv[: argv.index("--")] if "--" in argv else argv
    options = build_parser().parse_args(own_flags)
    try:
        configurations = parse_configurations(options, argv[len(own_flags) + 1 :])
        device = choose_device(configurations[0][1])
        distributed.initialize(device)
        rows = measure_rows(options, configurations)
        if distributed.is_main_process():
            report(rows, device, shlex.join(["scripts/benchmark.py", *argv]), options.out or [])
    except (UsageError, OSError) as error:
        distributed.exit_with_error(str(error))
    distributed.shutdown()


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the benchmark's own flags, which come before `--`."""
    parser = make_parser(__doc__ or "")
    count: dict[str, Any] = {"type": at_least(1), "metavar": "N"}
    style: dict[str, Any] = {"formatter_class": parser.formatter_class, "allow_abbrev": False}
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, (_, summary) in COMMANDS.items():
        description = f"Measure {summary}. Flags of main_pretrain.py for all rows follow --, as in: -- --amp off"
        add = commands.add_parser(name, help=summary, description=description, **style).add_argument
        add("--methods", nargs="+", metavar="M", help="measure each of these methods in a row of its own")
        add("--batch-sizes", nargs="+", **count, help="measure each of these batch sizes in a row of its own")
        add("--switch", type=shlex.split, action="append", help="add a row with these flags: --switch='--amp off'")
        add("--out", type=Path, action="append", help="also write the table to this .md or .json file; repeatable")
        add("--overwrite", action="store_true", help="replace existing files")
        if name == "step":
            add("--reference", action="store_true", help="also time the baseline: eager, NCHW, all activations kept")
            add("--profile", type=Path, metavar="DIR", help="folder for tables by operator and Chrome traces")
        else:
            add("--data-dir", type=Path, metavar="DIR", required=True, help="folder of images")
        if name == "loader":
            add("--images", **count, default=64, help="number of images for the measurement of the parts")
            add("--workers", nargs="+", type=at_least(0), help="numbers of workers (default: 0 and --num-workers)")
        else:
            add("--steps", **count, default=100, help="timed optimizer steps")
            add("--warm-up", **count, default=10, help="untimed optimizer steps before the timed ones")
    return parser


def parse_configurations(options: argparse.Namespace, flags: Sequence[str]) -> list[tuple[Row, argparse.Namespace]]:
    """Return labels and arguments of each row; raise a `UsageError` for a row that cannot run or an unusable output."""
    for path in options.out or []:
        if path.suffix not in (".md", ".json"):
            raise UsageError(f"--out {path}: the name has to end in .md or .json")
        check_writable("--out", path, options.overwrite)
    if getattr(options, "profile", None):
        check_writable("--profile", options.profile, options.overwrite, folder=True)
    methods = [["--method", method] for method in options.methods or []] or [[]]
    sizes = [["--batch-size", str(size)] for size in options.batch_sizes or []] or [[]]
    configurations = []
    for method, size, switch in itertools.product(methods, sizes, options.switch or [[]]):
        args = main_pretrain.parse_args([*flags, *method, *size, *switch])
        if (messages := resolve_compile(args, choose_device(args))) and not args.compile:
            raise UsageError(f"{messages[0]}; add --no-compile to measure that")
        if options.command != "step":
            folder_dataset(args, options.data_dir)
        labels = {"method": args.method, "batch": args.batch_size, "amp": args.amp, "switch": " ".join(switch)}
        configurations.append((labels, args))
    return configurations


def measure_rows(options: argparse.Namespace, configurations: Sequence[tuple[Row, argparse.Namespace]]) -> list[Row]:
    """Return all rows of the table; a run that needs more memory than one GPU has does not end the others."""
    rows: list[Row] = []
    for labels, args in configurations:
        name = re.sub(r"[^\w.=-]+", "_", f"{labels['method']} {labels['batch']} {labels['switch']}".strip())
        if distributed.is_main_process():
            print(f"{name} ({len(rows)} rows done)", file=sys.stderr, flush=True)
        try:
            rows += [labels | cells for cells in COMMANDS[options.command][0](args, options, name)]
        except torch.OutOfMemoryError:
            if distributed.world_size() > 1:  # the other ranks wait for this one
                raise UsageError(f"{name}: out of GPU memory; use a smaller batch") from None
            rows.append(labels | {"images/s": "out of memory"})
        torch.compiler.reset()  # the next row compiles its own code and has the memory to itself
        gc.collect()
        torch.cuda.empty_cache()
    return rows


if __name__ == "__main__":
    main()
