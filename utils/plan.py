"""What follows from the arguments: effective batch, learning rate, steps."""

import argparse
from dataclasses import dataclass

from utils.errors import UsageError
from utils.schedules import cosine_momentum, warmup_cosine


@dataclass(frozen=True)
class Plan:
    """The numbers of a run, all functions of the global optimizer step."""

    images: int
    batch_size: int
    """Images on all GPUs at once."""
    accum_steps: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    peak_lr: float
    warmup_multiplier: float
    teacher_momentum: float

    @property
    def effective_batch(self) -> int:
        """Images an optimizer step."""
        return self.batch_size * self.accum_steps

    def lr(self, step: int) -> float:
        """Learning rate of a step."""
        return warmup_cosine(step, self.total_steps, self.peak_lr, self.warmup_steps, self.warmup_multiplier)

    def momentum(self, step: int) -> float:
        """Teacher momentum of a step."""
        return cosine_momentum(step, self.total_steps, self.teacher_momentum)

    def epoch(self, step: int) -> float:
        """How many epochs are done before a step."""
        return step / self.steps_per_epoch


def make_plan(args: argparse.Namespace, images: int, world_size: int) -> Plan:
    """Work the run out.

    Raises:
        UsageError: the batch does not divide among the GPUs, or there are fewer images than one batch takes.
    """
    batch_size, effective = args.batch_size, args.batch_size * args.accum_steps
    if batch_size % world_size:
        raise UsageError(
            f"--batch-size {batch_size}: cannot be shared out among {world_size} processes; use a multiple"
        )
    if images < effective:
        taken = f"--batch-size {batch_size}" + (f" x --accum-steps {args.accum_steps}" if args.accum_steps > 1 else "")
        raise UsageError(f"{taken}: more than the {images} images of --data-dir {args.data_dir}; use a smaller batch")
    if batch_size == 1 and args.image_size <= args.output_stride:
        raise UsageError(f"--batch-size 1 with --image-size {args.image_size}: batch norm needs more; use a larger one")
    if args.start_epoch > args.epochs:
        raise UsageError(
            f"--start-epoch {args.start_epoch}: beyond --epochs {args.epochs}; nothing would be left to do"
        )
    steps_per_epoch = images // effective
    return Plan(
        images=images,
        batch_size=batch_size,
        accum_steps=args.accum_steps,
        steps_per_epoch=steps_per_epoch,
        total_steps=steps_per_epoch * args.epochs,
        warmup_steps=steps_per_epoch * args.warmup_epoch,
        peak_lr=args.base_lr * effective / 256,
        warmup_multiplier=args.warmup_multiplier,
        teacher_momentum=args.teacher_momentum,
    )
