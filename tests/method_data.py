"""Methods, batches and gradients that the tests of SlotCon and SlotFA share, in float64."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from main_pretrain import parse_args
from tests.helpers import TINY, build_small_method
from tests.reference.grouping import Array
from tests.reference.methods import Geometry, Inputs
from utils.batch import Batch

APART = ((0, 0, 40, 40), (60, 50, 110, 100))
"""The crops of two views that do not intersect."""


def method_in_mid_training(*flags: str, seed: int = 0) -> Any:
    """A method with a teacher that lags behind, a center, and features that differ among positions."""
    torch.manual_seed(seed)
    method = build_small_method(parse_args([*TINY, *flags])).train()
    with torch.no_grad():
        for part in (method.projector_q, method.predictor_slot):
            for parameter in part.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.3)
        method.update_teacher(0.0)
        for name, parameter in method.named_parameters():
            if "_k." in name:
                parameter.add_(torch.randn_like(parameter) * parameter.std(correction=0).clamp(min=0.05) * 0.2)
        method.center.copy_(torch.randn_like(method.center) * 0.2)
    return method.double()


def random_batch(seed: int, num_images: int = 4, apart: Sequence[int] = (1,)) -> Batch:
    """Images in two random crops with random flips; the views of those numbered in `apart` do not intersect."""
    rng = np.random.default_rng(seed)
    center, reach = rng.uniform(50, 60, (num_images, 2, 2)), rng.uniform(10, 50, (num_images, 2, 4))
    crops = np.concatenate([center - reach[..., :2], center + reach[..., 2:]], axis=-1)
    crops[list(apart)] = APART
    return Batch(
        views=[torch.from_numpy(rng.standard_normal((num_images, 3, 32, 32))) for _ in range(2)],
        crops=torch.from_numpy(crops),
        flips=torch.from_numpy(rng.random((num_images, 2)) < 0.5),
        rotations=torch.zeros(num_images, 2, dtype=torch.int64),
        index=torch.arange(num_images),
        step=17,
        seed=5,
    )


def geometry_of(batch: Batch) -> Geometry:
    return Geometry(batch.crops.numpy(), batch.flips.numpy())


def to_array(tensor: Tensor | None) -> Array:
    assert tensor is not None
    return tensor.detach().numpy().copy()


def inputs_of(method: Any, batch: Batch) -> Inputs:
    """Compute the inputs of the references, each view on its own through copies of both networks."""
    method = copy.deepcopy(method).train()
    with torch.no_grad():
        student = [to_array(method.projector_q(method.encoder_q(view))) for view in batch.views]
        teacher = [to_array(method.projector_k(method.encoder_k(view))) for view in batch.views]
    return Inputs(
        student,
        teacher,
        to_array(method.grouping_q.slot_embed.weight),
        to_array(method.grouping_k.slot_embed.weight),
        {name: to_array(value) for name, value in method.predictor_slot.mlp.named_parameters()},
        to_array(method.center[0]),
    )


def record_projections(method: Any) -> list[Tensor]:
    """Return the list to which every output of the student's projector is appended, with its gradient retained."""
    projections: list[Tensor] = []

    def record(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        projections.append(output)

    method.projector_q.register_forward_hook(record)
    return projections


def assert_gradients_are_slopes(loss: Callable[[list[Array]], float], gradients: Sequence[Array]) -> None:
    """Compare gradients with central differences of `loss`, a function of one offset for each of its arguments."""
    rng, step = np.random.default_rng(7), 1e-6
    for number, gradient in enumerate(gradients):
        direction = rng.choice([-1.0, 1.0], gradient.shape) + np.sign(gradient)
        above, below = (
            loss([sign * step * direction if i == number else np.zeros(g.shape) for i, g in enumerate(gradients)])
            for sign in (1, -1)
        )
        # The difference of two losses near 5 rounds by about 1e-15 / 1e-6.
        assert float((gradient * direction).sum()) == pytest.approx((above - below) / (2 * step), rel=1e-6, abs=1e-8)
