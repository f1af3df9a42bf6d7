"""Estimate how long a fine-tuning takes on this machine's CPU, from its arithmetic and a measured speed."""

import time
from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from models.backbones import build_encoder

_ENCODER_SIZE = 224
_UNITS = {"day": 86400, "hour": 3600, "minute": 60}


@dataclass(frozen=True)
class RunLength:
    """The length of a fine-tuning. One iteration takes one batch, over all GPUs."""

    iterations: int
    batch_size: int = 16
    eval_period: int = 0
    """Iterations from one evaluation to the next; 0 for a single evaluation, at the end."""
    precise_bn: int = 0
    """Batches from which the batch-norm statistics are computed again before each evaluation."""
    max_val_images: int = 0
    """Largest number of images of an evaluation; 0 for all."""
    epochs: int = 0
    """Passes over the training images, which the iterations follow from; 0 for a recipe in iterations."""

    @property
    def evaluations(self) -> int:
        """The number of evaluations, the last of which is at the end."""
        return -(-self.iterations // (self.eval_period or max(self.iterations, 1)))


@dataclass(frozen=True)
class ImageFlops:
    """Floating-point operations per image, in GFLOP; a multiplication with addition counts as 2."""

    training: float
    """Forward and backward pass of an image at the size that the config trains on."""
    evaluation: float
    """Forward pass of an image at the size that the config evaluates on."""


def change_epochs(length: RunLength, epochs: int, batch_size: int) -> RunLength:
    """Return a length in epochs, with an evaluation after each, for another number of epochs and another batch."""
    images = length.iterations * length.batch_size / length.epochs
    steps = max(1, round(images / batch_size))
    return replace(length, iterations=epochs * steps, batch_size=batch_size, eval_period=steps, epochs=epochs)


def count_encoder_flops(arch: str) -> ImageFlops:
    """Count the operations of an encoder on an image of about 224 px, which a ViT's patches divide."""
    with torch.device("meta"):  # without memory and arithmetic
        network = build_encoder(arch)
        size = _ENCODER_SIZE // network.stride * network.stride
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.zeros(1, 3, size, size))
    forward = counter.get_total_flops() / 1e9
    return ImageFlops(training=3 * forward, evaluation=forward)  # a backward pass takes twice as much


def estimate_seconds(length: RunLength, flops: ImageFlops, val_images: int, throughput: float) -> float:
    """Return the time of training and of all evaluations, without loading of data.

    Args:
        val_images: number of images of an evaluation, at most `length.max_val_images`.
        throughput: speed in GFLOP/s, of `measure_throughput`.
    """
    training = length.iterations * length.batch_size * flops.training
    # A backward pass takes twice the arithmetic of a forward pass, which is all that batch-norm statistics need.
    precise_bn = length.precise_bn * length.batch_size * flops.training / 3
    return (training + length.evaluations * (precise_bn + val_images * flops.evaluation)) / throughput


def measure_throughput(seconds: float = 1.0) -> float:
    """Return the speed of this CPU in GFLOP/s: of a ResNet-50 that trains on an image of 256 px for `seconds`.

    The models of the fine-tunings reach 1 to 1.6 times this speed, because their images are larger.
    """
    network, image = build_encoder("resnet50"), torch.rand(1, 3, 256, 256)
    with FlopCounterMode(display=False) as counter:
        network(image).sum().backward()  # also warms up
    steps: list[float] = []
    end = time.perf_counter() + seconds
    while not steps or time.perf_counter() < end:
        start = time.perf_counter()
        network(image).sum().backward()
        steps.append(time.perf_counter() - start)
    return counter.get_total_flops() / 1e9 / min(steps)  # the step that other programs slowed down least


def format_duration(seconds: float) -> str:
    """Return a rounded duration, such as `about 40 days`, in the largest unit of which it has at least two."""
    for unit, length in _UNITS.items():
        if seconds >= 2 * length:
            return f"about {seconds / length:,.0f} {unit}s"
    return "about a minute" if seconds >= 30 else "less than a minute"
