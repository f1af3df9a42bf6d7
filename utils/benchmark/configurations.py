"""Which runs are measured: every method at every batch size with every alternative of flags."""

import argparse
import itertools
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

import main_pretrain
from models import METHODS
from utils import compiler
from utils.config import at_least
from utils.benchmark.table import Row
from utils.device import choose_device
from utils.errors import UsageError
from utils.config import make_plan

BATCHES = 1000
"""That an epoch of a measured run has at least, so that its schedules are those of a run."""


@dataclass(frozen=True)
class Configuration:
    """A run to measure, as the flags of main_pretrain.py say it."""

    args: argparse.Namespace
    switches: str

    @property
    def row(self) -> Row:
        """The cells that name it."""
        return {"method": self.args.method, "batch_size": self.args.batch_size, "switches": self.switches}

    def __str__(self) -> str:
        return f"{self.args.method}, batch {self.args.batch_size}" + (f", {self.switches}" if self.switches else "")

    def slug(self) -> str:
        """The same as part of a file's name."""
        return re.sub(r"[^\w.]+", "_", str(self))


def add_arguments(group: argparse._ArgumentGroup, methods: bool) -> None:
    """The flags that span the table's rows, with methods or without."""
    if methods:
        group.add_argument(
            "--methods", nargs="+", choices=tuple(METHODS), metavar="METHOD", help="default: the flags' --method"
        )
    group.add_argument(
        "--batch-sizes", nargs="+", type=at_least(1), metavar="N", help="images a batch; default: the flags'"
    )
    group.add_argument(
        "--switch",
        action="append",
        dest="switches",
        metavar="FLAGS",
        help="flags for rows of their own, as in --switch='--no-compile' (mind the =); repeatable, with --switch='' "
        "for rows without any",
    )


def configurations(options: argparse.Namespace, flags: Sequence[str]) -> list[Configuration]:
    """All rows' runs.

    Raises:
        UsageError: one of them is none that main_pretrain.py takes.
    """
    methods = [["--method", method] for method in getattr(options, "methods", None) or []]
    sizes = [["--batch-size", str(size)] for size in options.batch_sizes or []]
    rows = itertools.product(methods or [[]], sizes or [[]], options.switches or [""])
    return [Configuration(_parse([*flags, *method, *size, *_words(text)]), text) for method, size, text in rows]


def _words(switches: str) -> list[str]:
    try:
        return shlex.split(switches)
    except ValueError as error:
        raise UsageError(f"--switch={switches}: {error}") from None


def _parse(flags: list[str]) -> argparse.Namespace:
    """The arguments of a run that would start: what would refuse it does so before anything is measured."""
    args = main_pretrain.parse_args(flags)
    device = choose_device(args)
    compiler.resolve(argparse.Namespace(**vars(args)), device)  # of a copy, so that the run has its notes
    make_plan(args, images=BATCHES * args.batch_size * args.accum_steps, world_size=1)
    return args
