"""How long a run's steps are timed, and several runs' steps in turns."""

import argparse
from collections.abc import Sequence

import torch

from utils.config import at_least
from utils.benchmark.stepping import Stepper
from utils.errors import UsageError


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """The flags that say how many steps are taken, and how they are timed."""
    count = at_least(1)
    group.add_argument("--steps", type=count, metavar="N", help="steps that are timed; default: 100, on the CPU 20")
    group.add_argument("--warm-up", type=count, metavar="N", help="steps before those; default: 10, on the CPU 3")
    group.add_argument(
        "--block",
        type=count,
        metavar="N",
        help="steps that are timed at once, without the host waiting in between; default: 10, on the CPU 1",
    )


def resolve(options: argparse.Namespace, device: torch.device) -> None:
    """Set what was left out to what fits the device.

    Raises:
        UsageError: the steps are not a number of whole blocks.
    """
    gpu = device.type == "cuda"
    options.block = options.block or (10 if gpu else 1)
    options.steps = options.steps or (10 if gpu else 20) * options.block
    options.warm_up = options.warm_up or (10 if gpu else 3)
    if options.steps % options.block:
        raise UsageError(f"--steps {options.steps}: not a multiple of --block {options.block}; use one")


def blocks(options: argparse.Namespace) -> str:
    """What the figures of a row come from."""
    return f"{options.steps // options.block} x {options.block} step{'s' if options.block > 1 else ''}"


def in_turns(steppers: Sequence[Stepper], options: argparse.Namespace) -> list[list[float]]:
    """Seconds of a step of each, block after block, A B A B ...: what slows the machine down slows all of them."""
    rounds = [[each.take(options.block).seconds for each in steppers] for _ in range(options.steps // options.block)]
    return [list(seconds) for seconds in zip(*rounds)]
