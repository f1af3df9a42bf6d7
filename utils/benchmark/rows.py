"""A table filled row by row: one run at a time, and a run that does not fit costs no more than its row."""

import gc
import sys
from collections.abc import Callable, Sequence

import torch

from utils.benchmark.configurations import Configuration
from utils.benchmark.table import Row, Table


def fill(table: Table, found: Sequence[Configuration], measure: Callable[[Configuration], Row]) -> None:
    """Add a row for each configuration, its measured cells by `measure`, which leaves nothing behind but them."""
    for number, configuration in enumerate(found):
        print(f"{number + 1} of {len(found)}: {configuration}", file=sys.stderr, flush=True)
        cells: Row = {}
        try:
            cells = measure(configuration)
        except torch.OutOfMemoryError:
            table.note(f"{configuration}: the GPU's memory does not suffice")
        table.rows.append(configuration.row | cells)
        _release(configuration)


def _release(configuration: Configuration) -> None:
    """Forget what the last run compiled and held, so that the next one's time and memory are its own."""
    if configuration.args.compile:
        torch.compiler.reset()
    gc.collect()
    if configuration.args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
