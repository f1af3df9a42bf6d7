"""Grouping against the float64 reference, and what users of the slots rely on."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.grouping import Grouping, occupied, pool_slots, prototype_scores
from tests.reference import grouping as reference

Shape = tuple[int, int, int, int, int]
shapes = st.tuples(*(st.integers(1, top) for top in (3, 16, 8, 4, 6)))
"""B, D, K, H, W."""
seeds = st.integers(0, 2**32 - 1)


def draw(shape: Shape, seed: int) -> tuple[Tensor, Tensor]:
    """Features (B, D, H, W) that are off center and of uneven length, and prototypes (K, D)."""
    B, D, K, H, W = shape
    rng = np.random.default_rng(seed)
    features = (rng.standard_normal((B, D, H, W)) + 0.3) * rng.uniform(0.1, 10, (B, 1, H, W))
    return torch.from_numpy(features), torch.from_numpy(rng.standard_normal((K, D)))


@given(shape=shapes, seed=seeds, temperature=st.sampled_from([0.07, 0.5]))
@settings(max_examples=30)
def test_scores_and_slots_match_reference(shape: Shape, seed: int, temperature: float) -> None:
    features, prototypes = draw(shape, seed)
    module = Grouping(shape[2], shape[1], temperature).double()
    with torch.no_grad():
        module.slot_embed.weight.copy_(prototypes)
        slots, scores = module(features)
        assert module(features, scores).scores is scores
    expected = reference.cosine_scores(features.numpy(), prototypes.numpy())
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(slots, reference.slots(features.numpy(), expected, temperature), rtol=1e-9, atol=1e-9)


@given(shape=shapes, seed=seeds)
@settings(max_examples=30)
def test_occupied_slots_match_reference_and_are_at_most_the_positions(shape: Shape, seed: int) -> None:
    B, _, K, H, W = shape
    scores = np.random.default_rng(seed).uniform(-1, 1, (B, K, H, W))
    mask = occupied(torch.from_numpy(scores))
    np.testing.assert_array_equal(mask, reference.occupied(scores))
    assert ((mask.sum(dim=1) >= 1) & (mask.sum(dim=1) <= min(K, H * W))).all()


@given(shape=shapes, seed=seeds, scale=st.floats(0.01, 100))
@settings(max_examples=20)
def test_scores_are_scale_invariant_and_slots_scale_with_features(shape: Shape, seed: int, scale: float) -> None:
    features, prototypes = draw(shape, seed)
    scores = prototype_scores(features, prototypes)
    torch.testing.assert_close(prototype_scores(features * scale, prototypes / scale), scores, rtol=0, atol=1e-12)
    expected = pool_slots(features, scores, 0.07) * scale
    torch.testing.assert_close(pool_slots(features * scale, scores, 0.07), expected, rtol=0, atol=1e-10)


def test_zero_feature_scores_zero_and_has_a_finite_gradient() -> None:
    features, prototypes = draw((1, 4, 3, 2, 2), 7)
    features[0, :, 1, 1] = 0
    scores = prototype_scores(features.requires_grad_(), prototypes)
    assert (scores[0, :, 1, 1] == 0).all()
    pool_slots(features, scores, 0.07).square().sum().backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()
    assert (features.grad != 0).any()


def test_grouping_is_computed_in_float32_under_autocast() -> None:
    features, prototypes = (tensor.float() for tensor in draw((2, 8, 6, 3, 3), 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = prototype_scores(features, prototypes)
        slots = pool_slots(features, scores, 0.07)
    assert scores.dtype == slots.dtype == torch.float32
    # Cosines round by some 8 terms x 6e-8; the softmax multiplies a score's rounding by 1 / 0.07, features reach 40.
    torch.testing.assert_close(
        scores.double(), prototype_scores(features.double(), prototypes.double()), rtol=0, atol=2e-6
    )
    torch.testing.assert_close(slots.double(), pool_slots(features.double(), scores.double(), 0.07), rtol=0, atol=1e-4)
