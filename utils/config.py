"""Command-line arguments shared by all methods, and the training plan derived from them."""

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from utils.distributed import exit_with_error
from utils.errors import UsageError
from utils.schedules import epoch_cosine, half_cosine, warmup_cosine

PROBE_DATASETS = ("folder", "demo", "coco-stuff-27", "ade20k", "voc", "cityscapes", "camvid")
"""The layouts of labeled images that `transfer.probe` reads."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        exit_with_error(f"{message} (--help lists the flags)")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=110)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        no_default = action.default is None or action.default is False or action.default == ""
        return action.help if no_default else super()._get_help_string(action)


def make_parser(description: str, add_help: bool = True) -> argparse.ArgumentParser:
    """Build a parser that reports errors in one line with exit status 2 and shows defaults in its help."""
    return _Parser(description=description, formatter_class=_HelpFormatter, allow_abbrev=False, add_help=add_help)


def at_least(minimum: float, kind: Callable[[str], float] = int) -> Callable[[str], float]:
    """Return an argparse type for finite numbers that are not below `minimum`."""

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
    """Return an argparse type for numbers from `low` to `high`."""

    def number(text: str) -> float:
        value = at_least(low, float)(text)
        if value > high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low} to {high}")
        return value

    return number


def _warmup_multiplier(text: str) -> float:
    return math.inf if text == "inf" else at_least(1, float)(text)


def add_optimization_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the arguments of batch, optimizer, schedules and precision."""
    add, non_negative = group.add_argument, at_least(0, float)
    add("--batch-size", type=at_least(1), default=512, help="images per batch over all GPUs")
    add("--accum-steps", type=at_least(1), default=1, help="gradient accumulation steps")
    add("--optimizer", choices=("sgd", "lars", "adamw"), default="lars", help="optimizer")
    add("--base-lr", type=non_negative, default=1.0, help="learning rate for an effective batch of 256")
    add(
        "--lr-schedule",
        choices=("cosine", "epoch-cosine"),
        default="cosine",
        help="cosine: half cosine by iteration; epoch-cosine: by whole epochs, down to 0",
    )
    add("--warmup-epoch", type=at_least(0), default=5, help="epochs of linear warm-up")
    add(
        "--warmup-multiplier",
        type=_warmup_multiplier,
        default=100,
        help="the warm-up starts at the learning rate divided by this; inf starts at 0",
    )
    add("--weight-decay", type=non_negative, default=1e-5, help="weight decay, not applied to biases and norms")
    add("--weight-decay-end", type=non_negative, help="final weight decay of a cosine schedule; default: constant")
    add("--momentum", type=between(0, 1), default=0.9, help="momentum of sgd and lars")
    add("--clip-grad", type=non_negative, default=0.0, help="max gradient norm; 0 disables clipping")
    add(
        "--clip-grad-per-parameter",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="clip the norm of each parameter on its own instead of the norm of all together",
    )
    add("--epochs", type=at_least(1), default=800, help="number of epochs")
    add(
        "--start-epoch",
        type=at_least(1),
        default=1,
        help="first epoch, counted from 1, of a run that starts from scratch or from --init",
    )
    add(
        "--amp",
        choices=("bf16", "fp16", "off"),
        help="mixed precision; default: bf16 on GPUs that support it, fp16 on older GPUs, off on CPUs",
    )
    add("--fp16", action="store_const", const="fp16", dest="amp", help="the same as --amp fp16")


def add_run_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the arguments of output, checkpoints and logging."""
    add = group.add_argument
    add("--output-dir", default="./output", help="folder of the run")
    add("--auto-resume", action="store_true", help="resume from current.pth in --output-dir if it exists")
    add("--resume", default="", metavar="CKPT", help="resume from a checkpoint of this project")
    add("--allow-changes", action="store_true", help="resume although arguments changed that affect the result")
    add("--init", default="", metavar="CKPT", help="initial weights: of this project, released, torchvision or timm")
    add("--print-freq", type=at_least(1), default=10, help="optimizer steps between reports")
    add("--save-freq", type=at_least(1), default=50, help="epochs between checkpoints")
    add("--seed", type=at_least(0), default=0, help="random seed of weights, order, views and demo scenes")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: a GPU if there is one")
    add("--dry-run", action="store_true", help="print a summary of the run and exit")


def add_probe_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the arguments of the linear probe during pre-training."""
    add = group.add_argument
    add(
        "--probe-freq", type=at_least(0), default=0, help="epochs between linear probes of the teacher; 0 disables them"
    )
    add("--probe-dir", default="", help="folder of labeled images; the probe trains on 100 and evaluates on 100 others")
    add("--probe-dataset", choices=PROBE_DATASETS, default="folder", help="layout of --probe-dir")


def set_recipe(parser: argparse.ArgumentParser, recipe: Mapping[str, Any]) -> None:
    """Set the published values of a method as the defaults of arguments, after all arguments were added.

    Raises:
        KeyError: the parser has no such argument.
    """
    unknown = recipe.keys() - {action.dest for action in parser._actions}
    if unknown:
        raise KeyError(f"a recipe sets unknown arguments: {', '.join(sorted(unknown))}")
    parser.set_defaults(**recipe)


@dataclass(frozen=True)
class TrainingPlan:
    """Batch sizes, step counts and schedules of a run; the schedules are functions of the global optimizer step."""

    num_images: int
    batch_size: int
    """Images per batch over all GPUs."""
    accum_steps: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    peak_lr: float
    warmup_multiplier: float
    lr_schedule: str
    weight_decay: float
    weight_decay_end: float
    teacher_momentum: float

    @property
    def effective_batch(self) -> int:
        """The number of images per optimizer step."""
        return self.batch_size * self.accum_steps

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step."""
        shape = (step, self.total_steps, self.peak_lr, self.warmup_steps)
        if self.lr_schedule == "epoch-cosine":
            return epoch_cosine(*shape, self.steps_per_epoch, self.warmup_multiplier)
        return warmup_cosine(*shape, self.warmup_multiplier)

    def weight_decay_at(self, step: int) -> float:
        """Return the weight decay of a step."""
        if self.weight_decay_end == self.weight_decay:
            return self.weight_decay
        return half_cosine(step, self.total_steps, self.weight_decay, self.weight_decay_end)

    def teacher_momentum_at(self, step: int) -> float:
        """Return the momentum of the EMA teacher of a step."""
        return half_cosine(step, self.total_steps, self.teacher_momentum, 1.0)

    def epoch(self, step: int) -> float:
        """Return the number of epochs completed before a step."""
        return step / self.steps_per_epoch


def make_plan(args: argparse.Namespace, num_images: int, world_size: int) -> TrainingPlan:
    """Derive the training plan of a run from its arguments.

    Raises:
        UsageError: the batch is not divisible by the number of processes, larger than the dataset, or too small for
            batch norm; or --start-epoch is beyond --epochs.
    """
    batch_size, effective = args.batch_size, args.batch_size * args.accum_steps
    if batch_size % world_size:
        raise UsageError(f"--batch-size {batch_size}: not divisible by {world_size} processes; use a multiple")
    if num_images < effective:
        product = f"--batch-size {batch_size}" + (
            f" x --accum-steps {args.accum_steps}" if args.accum_steps > 1 else ""
        )
        raise UsageError(
            f"{product}: more than the {num_images} images of --data-dir {args.data_dir}; use a smaller batch"
        )
    normalized_images = batch_size if args.device == "cuda" else batch_size // world_size
    if normalized_images == 1 and args.image_size <= args.output_stride:
        raise UsageError(
            f"--batch-size {batch_size} with --image-size {args.image_size}: batch norm needs more; increase one"
        )
    if args.start_epoch > args.epochs:
        raise UsageError(f"--start-epoch {args.start_epoch}: beyond --epochs {args.epochs}; use a lower one")
    steps_per_epoch = num_images // effective
    return TrainingPlan(
        num_images=num_images,
        batch_size=batch_size,
        accum_steps=args.accum_steps,
        steps_per_epoch=steps_per_epoch,
        total_steps=steps_per_epoch * args.epochs,
        warmup_steps=steps_per_epoch * args.warmup_epoch,
        peak_lr=args.base_lr * effective / 256,
        warmup_multiplier=args.warmup_multiplier,
        lr_schedule=args.lr_schedule,
        weight_decay=args.weight_decay,
        weight_decay_end=args.weight_decay if args.weight_decay_end is None else args.weight_decay_end,
        teacher_momentum=args.teacher_momentum,
    )


def plan_notes(args: argparse.Namespace) -> list[str]:
    """Return messages for the user about the schedule."""
    if args.warmup_epoch < args.epochs:
        return []
    return [f"the warm-up of {args.warmup_epoch} epochs takes the whole run; --warmup-epoch shortens it"]
