"""Training from photographs to the step, beside the same run's step fed from memory."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from data.loader import EpochSampler, build_loader
from utils.benchmark.configurations import BATCHES, Configuration
from utils.benchmark.photographs import folder_dataset, photographs
from utils.benchmark.rows import fill
from utils.benchmark.stepping import Block, Stepper, memory_batch
from utils.benchmark.table import Row, Spread, Table
from utils.benchmark.timing import blocks
from utils.device import loader_workers

COLUMNS = {
    "method": "method",
    "batch_size": "batch",
    "switches": "switches",
    "workers": "workers",
    "images_per_second": "images/s",
    "step_alone_images_per_second": "step alone images/s",
    "percent_of_step_alone": "% of alone",
    "percent_waiting": "% waiting",
}
NOTES = (
    "step alone: the same run fed from memory, half of its blocks before the workers start and half after they ended",
    "waiting: share of the time that the host waits for data, as in metrics.jsonl; a GPU may be busy meanwhile",
)


def benchmark_end_to_end(options: argparse.Namespace, found: Sequence[Configuration]) -> Table:
    """A row for each configuration."""
    images = options.data_dir or "rendered stand-ins"
    title = f"Training on {images}, end to end: median, lowest..highest of {blocks(options)}"
    table = Table(title, COLUMNS, notes=list(NOTES))
    with photographs(found[0].args, options.data_dir) as root:
        fill(table, found, lambda configuration: _measure(configuration.args, options, root, table))
    return table


def _measure(args: argparse.Namespace, options: argparse.Namespace, root: Path, table: Table) -> Row:
    """The measured cells of a row; what a user should know of the run goes to the table's notes."""
    dataset = folder_dataset(args, root, BATCHES * args.batch_size * args.accum_steps)
    batch, workers = memory_batch(args), loader_workers(args.num_workers)
    stepper = Stepper(args, batch, images=len(dataset))
    for note in stepper.run.notes:
        table.note(note)
    rounds = options.steps // options.block

    alone = _timed(stepper, options, (rounds + 1) // 2)
    sampler = EpochSampler(stepper.run.plan, stepper.taken, args.seed)
    loader = build_loader(dataset, sampler, workers, pin_memory=stepper.device.type == "cuda")
    stepper.feed(loader, dataset.recipes)
    whole = _timed(stepper, options, rounds)
    stepper.feed_from_memory(batch)
    alone += _timed(stepper, options, (rounds + 1) // 2)

    images = stepper.run.plan.effective_batch
    rate, rate_alone = (Spread.of([each.seconds for each in part]).under(images) for part in (whole, alone))
    return {
        "workers": workers,
        "images_per_second": rate,
        "step_alone_images_per_second": rate_alone,
        "percent_of_step_alone": 100 * rate.median / rate_alone.median,
        "percent_waiting": Spread.of([100 * each.data_wait for each in whole]),
        "compiled": args.compile,
        "precision": args.amp,
    }


def _timed(stepper: Stepper, options: argparse.Namespace, rounds: int) -> list[Block]:
    """So many blocks, after a warm-up: the first batches come from workers that are still starting."""
    stepper.take(options.warm_up)
    return [stepper.take(options.block) for _ in range(rounds)]
