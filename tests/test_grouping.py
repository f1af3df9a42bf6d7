"""models/grouping.py against the float64 reference, and what a user of the slots relies on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.grouping import Grouping, occupied, prototype_scores, slots
from tests.reference import grouping as reference
from tests.reference.compare import relative_error

SHAPES = [(1, 2, 1, 1, 1), (2, 3, 5, 4, 6), (3, 16, 7, 3, 2), (2, 8, 32, 2, 5)]  # B, D, K, H, W

shapes = st.tuples(*(st.integers(1, top) for top in (2, 6, 6, 4, 4)))
seeds = st.integers(0, 2**32 - 1)


def draw(shape: tuple[int, int, int, int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (B,D,H,W) that are off center and of uneven length, and prototypes (K,D)."""
    B, D, K, H, W = shape
    rng = np.random.default_rng(seed)
    length = rng.uniform(0.1, 10, (B, 1, H, W))
    features = (rng.standard_normal((B, D, H, W)) + 0.3) * length
    return torch.from_numpy(features).float(), torch.from_numpy(rng.standard_normal((K, D))).float()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_scores_are_the_cosines_of_the_reference(shape: tuple[int, int, int, int, int], seed: int) -> None:
    features, prototypes = draw(shape, seed)
    scores = prototype_scores(features, prototypes)
    assert scores.dtype == torch.float32
    assert relative_error(scores, reference.cosine_scores(features.numpy(), prototypes.numpy())) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_slots_are_those_of_the_reference(shape: tuple[int, int, int, int, int], temperature: float) -> None:
    features, prototypes = draw(shape, 2)
    scores = prototype_scores(features, prototypes)
    expected = reference.slots(features.numpy(), scores.numpy(), temperature)
    assert relative_error(slots(features, scores, temperature), expected) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_the_module_groups_with_its_own_prototypes(shape: tuple[int, int, int, int, int]) -> None:
    features, prototypes = draw(shape, 3)
    module = Grouping(shape[2], shape[1], 0.07)
    with torch.no_grad():
        module.slot_embed.weight.copy_(prototypes)
    found, scores = module(features)
    expected_scores = reference.cosine_scores(features.numpy(), prototypes.numpy())
    assert relative_error(scores.detach(), expected_scores) < 1e-5
    # The soft-max at 0.07 magnifies the rounding of float32 scores, so the slots start from the same ones.
    expected = reference.slots(features.numpy(), scores.detach().numpy(), 0.07)
    assert relative_error(found.detach(), expected) < 1e-5


def test_a_slot_that_nothing_attends_to_is_the_mean_of_the_map() -> None:
    features, _ = draw((1, 3, 2, 3, 3), 4)
    scores = torch.ones(1, 2, 3, 3)
    scores[:, 1] = -1
    found = slots(features, scores, 0.07)
    assert relative_error(found[0, 1], features.double().mean(dim=(2, 3))[0]) < 1e-5
    assert relative_error(found, reference.slots(features.numpy(), scores.numpy())) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [5, 6])
def test_occupied_slots_are_those_of_the_reference(shape: tuple[int, int, int, int, int], seed: int) -> None:
    scores = prototype_scores(*draw(shape, seed))
    found = occupied(scores)
    assert found.dtype == torch.bool
    np.testing.assert_array_equal(found.numpy(), reference.occupied(scores.numpy()))


@given(shape=shapes, seed=seeds)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_every_image_occupies_at_least_one_slot_and_no_more_than_it_has_positions(
    shape: tuple[int, int, int, int, int], seed: int
) -> None:
    _, _, K, H, W = shape
    count = occupied(prototype_scores(*draw(shape, seed))).sum(dim=1)
    assert (count >= 1).all()
    assert (count <= min(K, H * W)).all()


@given(shape=shapes, seed=seeds, scale=st.floats(0.01, 100))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_scores_ignore_the_length_of_features_and_slots_keep_it(
    shape: tuple[int, int, int, int, int], seed: int, scale: float
) -> None:
    features, prototypes = draw(shape, seed)
    scores = prototype_scores(features, prototypes)
    longer = prototype_scores(features * scale, prototypes / scale)
    torch.testing.assert_close(longer, scores, rtol=0, atol=1e-5)
    expected = slots(features, scores, 0.07) * scale
    assert relative_error(slots(features * scale, scores, 0.07), expected) < 1e-5


def test_an_all_zero_feature_scores_zero_and_breaks_no_gradient() -> None:
    features, prototypes = draw((1, 4, 3, 2, 2), 7)
    features[0, :, 1, 1] = 0
    features.requires_grad_(True)
    scores = prototype_scores(features, prototypes)
    assert (scores[0, :, 1, 1] == 0).all()
    slots(features, scores, 0.07).square().sum().backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()
    assert (features.grad != 0).any()


def test_autocast_does_not_lower_the_precision_of_the_grouping() -> None:
    features, prototypes = draw((2, 8, 6, 3, 3), 8)
    module = Grouping(6, 8, 0.07)
    with torch.no_grad():
        module.slot_embed.weight.copy_(prototypes)
        full_slots, full_scores = module(features)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed_slots, mixed_scores = module(features)
    assert mixed_slots.dtype == mixed_scores.dtype == torch.float32
    assert relative_error(mixed_scores, full_scores) < 1e-6
    assert relative_error(mixed_slots, full_slots) < 1e-6
