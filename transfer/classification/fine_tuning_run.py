"""Build a fine-tuning: the defaults that follow from its encoder, the training plan, model and optimizer."""

import argparse
import hashlib
import math
from collections.abc import Sequence

import torch
from torch import nn

from models.backbones import is_vit
from transfer.classification.image_classifier import (
    build_classifier,
    build_fine_tuning_optimizer,
    load_encoder_weights,
)
from transfer.encoders import EncoderWeights
from utils import distributed
from utils.config import TrainingPlan
from utils.errors import UsageError
from utils.run import Run

Classification = Run[nn.Module]

_LAYER_DECAY = {"vit": 0.65, "resnet": 1.0}
_DROP_PATH = {"vit": 0.1, "resnet": 0.0}


def resolve_defaults(args: argparse.Namespace, encoder: EncoderWeights, classes: Sequence[str]) -> None:
    """Set the arguments that follow from the encoder and the data, and are saved with the others."""
    kind = "vit" if is_vit(encoder.arch) else "resnet"
    args.arch, args.pretrained = encoder.arch, encoder.provenance["source_sha256"][:12]
    args.classes = identify_classes(classes)
    args.layer_decay = _LAYER_DECAY[kind] if args.layer_decay is None else args.layer_decay
    args.drop_path = _DROP_PATH[kind] if args.drop_path is None else args.drop_path


def identify_classes(classes: Sequence[str]) -> str:
    """Return the number of classes, and a checksum of their names."""
    return f"{len(classes)}, names {hashlib.sha256(repr(list(classes)).encode()).hexdigest()[:8]}"


def build_run(
    args: argparse.Namespace, device: torch.device, encoder: EncoderWeights, num_images: int, num_classes: int
) -> Classification:
    """Build a run that starts from the weights of an encoder; the same on all ranks.

    Raises:
        UsageError: the arguments do not fit to each other, to the encoder or to the number of images.
    """
    plan = make_fine_tuning_plan(args, num_images)
    torch.manual_seed(args.seed)
    model = build_classifier(args.arch, num_classes, args.image_size, args.global_pool, args.drop_path)
    load_encoder_weights(model, encoder.weights)
    model = model.to(device).to(memory_format=torch.channels_last)
    optimizer = build_fine_tuning_optimizer(model, args.weight_decay, args.layer_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    return Classification(args, plan, device, model, optimizer, scaler, [])


def make_fine_tuning_plan(args: argparse.Namespace, num_images: int) -> TrainingPlan:
    """Derive batch, steps and learning rate from the arguments.

    Raises:
        UsageError: the batch does not divide over the processes, is odd, or larger than the dataset; or the warm-up
            is as long as the training.
    """
    batch_size, ranks = args.batch_size, distributed.world_size()
    if batch_size % ranks:
        raise UsageError(f"--batch-size {batch_size}: not divisible by {ranks} processes; use a multiple")
    if (args.mixup or args.cutmix) and batch_size // ranks % 2:
        raise UsageError(
            f"--batch-size {batch_size}: mixup and cutmix need an even number of images per process; "
            f"use a multiple of {2 * ranks}"
        )
    if batch_size == ranks and not is_vit(args.arch):
        raise UsageError(f"--batch-size {batch_size}: batch norm needs at least two images per process; use more")
    if num_images < batch_size:
        raise UsageError(
            f"--batch-size {batch_size}: more than the {num_images} training images of --data-dir {args.data_dir}; "
            "use a smaller batch"
        )
    if args.warmup_epoch is not None and args.warmup_epoch >= args.epochs:
        raise UsageError(f"--warmup-epoch {args.warmup_epoch}: not less than --epochs {args.epochs}; use fewer")
    steps_per_epoch = num_images // batch_size
    warmup_epochs = min(5, args.epochs / 10) if args.warmup_epoch is None else args.warmup_epoch
    return TrainingPlan(
        num_images=num_images,
        batch_size=batch_size,
        accum_steps=1,
        steps_per_epoch=steps_per_epoch,
        total_steps=steps_per_epoch * args.epochs,
        warmup_steps=round(steps_per_epoch * warmup_epochs),
        peak_lr=args.base_lr * batch_size / 256,
        warmup_multiplier=math.inf,
        lr_schedule="cosine",
        weight_decay=args.weight_decay,
        weight_decay_end=args.weight_decay,
        teacher_momentum=1.0,  # there is no teacher
    )


def describe(run: Classification, encoder: EncoderWeights, num_val_images: int) -> str:
    """Summarize the run in a few lines."""
    args, plan = run.args, run.plan
    lines = {
        "encoder": f"{args.arch} from {encoder.provenance['source']}, all {len(encoder.weights)} tensors loaded",
        "images": f"{plan.num_images} for training, {num_val_images} for validation in {args.data_dir}",
        "classes": args.classes.split(",")[0],
        "device": f"{distributed.world_size()} x {args.device}, mixed precision {args.amp}",
        "learning rate": f"{plan.peak_lr:g} = {args.base_lr:g} x {plan.batch_size} / 256, "
        f"layer decay {args.layer_decay:g}",
        "steps": f"{plan.total_steps} = {args.epochs} epochs x {plan.steps_per_epoch}, {plan.warmup_steps} of warm-up",
    }
    return "\n".join(f"{name:<16}  {value}" for name, value in lines.items())
