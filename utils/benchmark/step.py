"""The whole training step, fed from memory: color, forward, backward, optimizer, teacher."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from utils.batch import Batch
from utils.benchmark.configurations import Configuration
from utils.benchmark.profiling import profile
from utils.benchmark.rows import fill
from utils.benchmark.stepping import Stepper, memory_batch, reference_stepper
from utils.benchmark.table import Row, Spread, Table
from utils.benchmark.timing import blocks, in_turns
from utils.run_log import memory_gib

COLUMNS = {
    "method": "method",
    "batch_size": "batch",
    "switches": "switches",
    "images_per_second": "images/s",
    "milliseconds_per_step": "ms a step",
    "peak_memory_gib": "peak GiB",
    "first_step_seconds": "first step s",
}
REFERENCE_COLUMNS = {"reference_images_per_second": "reference images/s", "speed_up": "speed-up"}


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """The step's own flags."""
    group.add_argument(
        "--reference", action="store_true", help="time each row in turn with the plain run: eager, in the layout NCHW"
    )
    group.add_argument(
        "--profile", type=Path, metavar="DIR", help="folder for a trace and a table of where the time goes"
    )


def benchmark_step(options: argparse.Namespace, found: Sequence[Configuration]) -> Table:
    """A row for each configuration."""
    columns = COLUMNS | (REFERENCE_COLUMNS if options.reference else {})
    table = Table(f"The training step, fed from memory: median, lowest..highest of {blocks(options)}", columns)

    def measure(configuration: Configuration) -> Row:
        folder = options.profile
        if folder is not None and len(found) > 1:
            folder /= configuration.slug()
        return _measure(configuration.args, options, folder, table)

    fill(table, found, measure)
    _explain(table, options, found)
    return table


def _measure(args: argparse.Namespace, options: argparse.Namespace, folder: Path | None, table: Table) -> Row:
    """The measured cells of a row; what a user should know of the run goes to the table's notes."""
    batch = memory_batch(args)
    began = time.perf_counter()
    fast = Stepper(args, batch)
    fast.take(1)
    row: Row = {"first_step_seconds": time.perf_counter() - began, "compiled": args.compile, "precision": args.amp}
    for note in fast.run.notes:
        table.note(note)
    fast.take(options.warm_up)
    row["peak_memory_gib"] = memory_gib(fast.device)
    seconds = _beside_reference(fast, batch, options) if options.reference else in_turns([fast], options)
    row |= _rates(fast, *seconds)
    if options.reference and "speed_up" not in row:
        table.note("no reference where the GPU's memory does not suffice for it beside the row's run")
    if folder is not None:
        print(profile(fast, folder), flush=True)
    return row


def _beside_reference(fast: Stepper, batch: Batch, options: argparse.Namespace) -> list[list[float]]:
    """Seconds of both runs' steps in turns; of the fast one's alone if the other does not fit beside it."""
    reference = None
    try:
        reference = reference_stepper(fast.run.args, batch)
        reference.take(1 + options.warm_up)
        return in_turns([fast, reference], options)
    except torch.OutOfMemoryError:
        pass  # the error holds the reference's memory as long as it is handled
    del reference
    return in_turns([fast], options)


def _rates(stepper: Stepper, quick: Sequence[float], slow: Sequence[float] | None = None) -> Row:
    """Cells from the seconds of a step, and of the reference's beside it."""
    images = stepper.run.plan.effective_batch
    row: Row = {"images_per_second": Spread.of(quick).under(images)}
    row["milliseconds_per_step"] = Spread.of(quick).times(1000)
    if slow is not None:
        row["reference_images_per_second"] = Spread.of(slow).under(images)
        row["speed_up"] = Spread.of([theirs / ours for ours, theirs in zip(quick, slow)])
    return row


def _explain(table: Table, options: argparse.Namespace, found: Sequence[Configuration]) -> None:
    """Say how columns are meant."""
    for row, configuration in list(zip(table.rows, found))[1:]:
        if configuration.args.device == "cpu":
            row["peak_memory_gib"] = None
            table.note("peak: on the CPU the whole process's, and so the first row's alone")
    if any(configuration.args.compile for configuration in found):
        table.note(
            "first step: from building the run to the end of its first step; what was compiled before comes from a "
            "cache, unless TORCHINDUCTOR_FORCE_DISABLE_CACHES=1"
        )
    if options.reference:
        table.note(
            "reference: the same run eager, all activations kept, in the layout NCHW, in turn with the row's; "
            "speed-up: its time over the row's, pair by pair"
        )
