"""Checkpoints of random weights for the tests of readers and converters."""

import argparse
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

Weights = dict[str, Tensor]

RELEASED_GTSA = {
    "base_encoder": "encoder_q",
    "momentum_encoder": "encoder_k",
    "base_projector": "projector_q",
    "momentum_projector": "projector_k",
    "base_predictor": "predictor",
    "rot_predictor": "rotation_head",
}
"""The parts of a released checkpoint of GTSA, and their names here."""


class CodeInPickle:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def random_weights(shapes: dict[str, torch.Size], seed: int) -> Weights:
    """Draw weights as a trained network has them: nothing is 0 or 1, or without effect on the features.

    All are half-precision numbers, so that a half-precision file, which is faster to read, keeps them unchanged.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            value = torch.randint(1, 60_000, (), generator=generator)
        elif len(shape) > 1:
            value *= (2 / shape[1:].numel()) ** 0.5
        else:
            value = 0.2 * value if name.endswith(("bias", "mean")) else 0.5 + value.abs() / 2
        weights[name] = value.half().float() if value.is_floating_point() else value
    return weights


@cache
def resnet18_weights(seed: int) -> Weights:
    """Return a state dict of torchvision's resnet18, with its classifier."""
    with torch.device("meta"):
        network = torchvision.models.resnet18()
    return random_weights({name: value.shape for name, value in network.state_dict().items()}, seed)


@cache
def vit_weights(seed: int, patch_size: int = 16) -> Weights:
    """Return a state dict of timm's vit_tiny_patch16_224, also with other patches, with its classifier."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        network = timm.create_model("vit_tiny_patch16_224", patch_size=patch_size)
    return random_weights({name: value.shape for name, value in network.state_dict().items()}, seed)


def without_classifier(weights: Weights) -> Weights:
    return {name: value for name, value in weights.items() if not name.startswith(("fc.", "head."))}


def add_prefix(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}{name}": value for name, value in weights.items()}


def to_half(weights: Weights) -> Weights:
    return {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}


def released_checkpoint(teacher: Weights, student: Weights) -> dict[str, Any]:
    """Return a checkpoint as the authors released theirs: a Namespace, DDP's prefix, heads and optimizer state."""
    heads = {"center": torch.zeros(1, 8), "projector_q.mlp.0.weight": torch.ones(4, 4), "fc.weight": torch.ones(2)}
    model = add_prefix("module.", heads | add_prefix("encoder_q.", student) | add_prefix("encoder_k.", teacher))
    args = argparse.Namespace(arch="resnet50", dataset="COCO", epochs=800, teacher_momentum=0.99)
    optimizer = {"state": {0: {"mu": torch.ones(3)}}, "param_groups": [{"lr": 1.0, "params": [0]}]}
    return {"args": args, "model": model, "optimizer": optimizer, "scheduler": {}, "epoch": 800, "scaler": {}}


def assert_equal(weights: Weights, expected: Weights) -> None:
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert weights[name].shape == value.shape, name
        assert torch.equal(weights[name], value), name


def is_equal(loaded: Any, written: Any) -> bool:
    """Return whether everything that was written was loaded, bit by bit."""
    if isinstance(written, Tensor):
        same = isinstance(loaded, Tensor) and (loaded.dtype, loaded.shape) == (written.dtype, written.shape)
        return same and loaded.numpy().tobytes() == written.numpy().tobytes()
    if isinstance(written, dict):
        return loaded.keys() == written.keys() and all(is_equal(loaded[name], written[name]) for name in written)
    if isinstance(written, list):
        return len(loaded) == len(written) and all(map(is_equal, loaded, written))
    return type(loaded) is type(written) and loaded == written


def damaged_copies(content: bytes, count: int) -> Iterator[bytes]:
    """Yield `count` copies with one to three changed bytes, and `count` truncated copies."""
    generator = random.Random(0)
    for _ in range(count):
        copy = bytearray(content)
        for position in generator.sample(range(len(content)), generator.choice((1, 1, 3))):
            copy[position] ^= generator.randrange(1, 256)
        yield bytes(copy)
    for length in generator.choices(range(len(content)), k=count):
        yield content[:length]
