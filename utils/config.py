"""The command line of a run: groups of flags, and the one-line way in which mistakes are told."""

import argparse
import math
from collections.abc import Callable
from typing import NoReturn

from utils.distributed import exit_with_error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        exit_with_error(f"{message} (--help lists the flags)")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=110)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return (
            action.help
            if action.default is None or action.default is False or action.default == ""
            else super()._get_help_string(action)
        )


def make_parser(description: str, add_help: bool = True) -> argparse.ArgumentParser:
    """A parser whose mistakes are one line on stderr and exit status 2, and whose help tells the defaults."""
    return _Parser(description=description, formatter_class=_HelpFormatter, allow_abbrev=False, add_help=add_help)


def at_least(minimum: float, kind: Callable[[str], float] = int) -> Callable[[str], float]:
    """An argparse type: a number not below `minimum`."""

    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not minimum <= value < math.inf:
            noun = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {noun} of at least {minimum}")
        return value

    return number


def between(low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number from `low` to `high`."""

    def number(text: str) -> float:
        value = at_least(low, float)(text)
        if value > high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low} to {high}")
        return value

    return number


def add_optimization(group: argparse._ArgumentGroup) -> None:
    """Batch, learning rate, precision."""
    group.add_argument("--batch-size", type=at_least(1), default=512, help="images at once, total over GPUs")
    group.add_argument("--accum-steps", type=at_least(1), default=1, help="batches to one optimizer step")
    group.add_argument("--optimizer", choices=("sgd", "lars", "adamw"), default="lars", help="optimizer")
    group.add_argument("--base-lr", type=at_least(0, float), default=1.0, help="learning rate for 256 images a step")
    group.add_argument("--warmup-epoch", type=at_least(0), default=5, help="epochs of linear warm-up")
    group.add_argument(
        "--warmup-multiplier", type=at_least(1, float), default=100, help="warm-up starts at the lr over this"
    )
    group.add_argument("--weight-decay", type=at_least(0, float), default=1e-5, help="none on biases and norms")
    group.add_argument("--momentum", type=between(0, 1), default=0.9, help="of sgd and lars")
    group.add_argument("--clip-grad", type=at_least(0, float), default=0.0, help="largest gradient norm; 0 for any")
    group.add_argument("--epochs", type=at_least(1), default=800, help="length of the run")
    group.add_argument("--start-epoch", type=at_least(1), default=1, help="first epoch, where nothing is resumed")
    group.add_argument(
        "--amp",
        choices=("bf16", "fp16", "off"),
        help="mixed precision; default bf16 where the GPU has it, CPU off",
    )
    group.add_argument("--fp16", action="store_const", const="fp16", dest="amp", help="the same as --amp fp16")


def add_run(group: argparse._ArgumentGroup) -> None:
    """Where results go, what is resumed, how much is said."""
    group.add_argument("--output-dir", default="./output", help="folder of the run")
    group.add_argument("--auto-resume", action="store_true", help="go on from --output-dir's current.pth, if there")
    group.add_argument("--resume", default="", metavar="CKPT", help="checkpoint of this project to go on from")
    group.add_argument("--allow-changes", action="store_true", help="resume though arguments changed the result")
    group.add_argument(
        "--init", default="", metavar="CKPT", help="start from these weights (ours, released, torchvision)"
    )
    group.add_argument("--print-freq", type=at_least(1), default=10, help="optimizer steps between reports")
    group.add_argument("--save-freq", type=at_least(1), default=50, help="epochs between checkpoints")
    group.add_argument("--seed", type=at_least(0), default=0, help="of weights, order, views and demo scenes")
    group.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: a GPU if there is one")
    group.add_argument("--dry-run", action="store_true", help="print what the run would be, and stop")
