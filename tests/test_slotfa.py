"""models/slotfa.py and models/augmentation.py: against the float64 reference, and what a user of SlotFA relies on."""

import copy
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models.augmentation import SlotAugmentation
from tests.reference import augmentation as reference
from tests.reference import heads
from tests.reference.compare import relative_error
from tests.reference.grouping import cosine_scores
from tests.test_losses import compose, doubled, inputs_of, slotcon, views_of
from utils.batch import Batch

Array = np.ndarray
Draw = tuple[Tensor, Tensor, Tensor]  # assignment (B,H,W), alpha (K,D), beta (K,D)

ROOT = Path(__file__).parents[1]
PAPER: list[str] = []
CONTRAST = ["--group-loss-weight", "0.5", "--fa-train-prototypes"]
RELEASED = ["--no-fa-gradient"]
PRESETS = {"paper": PAPER, "contrast": CONTRAST, "released": RELEASED}
LEVELS = ["projection", "encoder"]

presets = pytest.mark.parametrize("flags", PRESETS.values(), ids=PRESETS)
levels = pytest.mark.parametrize("level", LEVELS)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The networks here are so small that threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def slotfa(seed: int, *more: str) -> nn.Module:
    """A SlotFA as in mid-training: a teacher that lags, a centre, and features that differ among places."""
    return slotcon(seed, "--method", "slotfa", *more)


def batch_of(seed: int, **facts: Any) -> Batch:
    """Four images, one of which has views that do not meet, at a step in the middle of a run."""
    return replace(views_of(seed), step=17, seed=5, **facts)


# The augmentation

WIDE = SlotAugmentation(64, 48, sigma_scale=0.5, sigma_shift=2.0)
EVERYWHERE = torch.arange(64).view(1, 8, 8)  # each of 64 slots at one position
SIZES = [(1, 1, 1, 1, 1), (2, 3, 5, 4, 6), (3, 16, 7, 3, 2), (1, 2, 256, 7, 5), (2, 33, 2, 1, 9)]  # B, D, K, H, W


class Case(NamedTuple):
    """An augmentation, its two inputs, and the seed, step and view that it is asked for."""

    module: SlotAugmentation
    features: Tensor
    assignment: Tensor
    when: tuple[int, int, int]

    def found(self) -> Tensor:
        return self.module(self.features, self.assignment, *self.when)

    def expected(self) -> Array:
        alpha, beta = self.module.draw(self.assignment, *self.when)
        features = self.features.detach().float().numpy()
        return reference.augmented_map(features, self.assignment.numpy(), alpha.numpy(), beta.numpy())


def case_of(size: tuple[int, int, int, int, int], seed: int, ratio: float = 1.0) -> Case:
    B, D, K, H, W = size
    rng = np.random.default_rng(seed)
    return Case(
        SlotAugmentation(K, D, *rng.uniform(0.1, 2, 2), ratio),
        torch.from_numpy(rng.standard_normal((B, D, H, W)) * 3).float(),
        torch.from_numpy(rng.integers(0, K, (B, H, W))),
        (int(rng.integers(2**31)), int(rng.integers(10**6)), int(rng.integers(2))),
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_the_augmented_map_is_that_of_the_reference(size: tuple[int, int, int, int, int], ratio: float) -> None:
    case = case_of(size, 0, ratio)
    assert case.found().shape == case.features.shape
    assert relative_error(case.found(), case.expected()) < 1e-5


@settings(max_examples=60, deadline=None)
@given(st.tuples(*(st.integers(1, top) for top in (3, 9, 12, 5, 5))), st.integers(0, 2**32 - 1), st.booleans())
def test_every_position_gets_alpha_x_plus_beta_of_its_own_slot(
    size: tuple[int, int, int, int, int], seed: int, channels_last: bool
) -> None:
    case = case_of(size, seed)
    alpha, beta = case.module.draw(case.assignment, *case.when)
    assert alpha.shape == beta.shape == (size[2], size[1])
    if channels_last:
        case = case._replace(features=case.features.contiguous(memory_format=torch.channels_last))
    found = case.found()
    for b, h, w in np.ndindex(*case.assignment.shape):
        k = case.assignment[b, h, w]
        torch.testing.assert_close(found[b, :, h, w], alpha[k] * case.features[b, :, h, w] + beta[k])


@pytest.mark.parametrize("size", SIZES)
def test_positions_of_one_slot_share_factor_and_shift_in_all_images_and_slots_have_their_own(
    size: tuple[int, int, int, int, int],
) -> None:
    """By what comes out alone: zeros come out as the shift, ones as factor plus shift."""
    case = case_of(size, 1)
    shift = case._replace(features=torch.zeros_like(case.features)).found().movedim(1, -1)
    both = case._replace(features=torch.ones_like(case.features)).found().movedim(1, -1)
    seen: list[Tensor] = []
    for slot in case.assignment.unique():
        here = case.assignment == slot
        assert (shift[here] == shift[here][0]).all()
        assert (both[here] == both[here][0]).all()
        seen += [shift[here][0], both[here][0] - shift[here][0] - 1]
    numbers = torch.cat(seen)
    assert len(numbers.unique()) == len(numbers)


def test_factors_and_shifts_have_the_mean_and_the_standard_deviation_asked_for() -> None:
    draws = [WIDE.draw(EVERYWHERE, 0, step, step % 2) for step in range(100)]
    for number, (mean, deviation) in enumerate(((1.0, 0.5), (0.0, 2.0))):
        values = torch.stack([draw[number] for draw in draws]).double()
        z = (values - mean) / deviation
        assert abs(z.mean()) < 5 / len(z.flatten()) ** 0.5
        assert abs(z.std() - 1) < 0.01
        assert abs((z.abs() < 1).double().mean() - 0.6827) < 0.005  # of a normal distribution
        # Were slots, entries or steps drawn together, these means would scatter more than independent numbers' do.
        for axes in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2)):
            count = np.prod([z.shape[axis] for axis in axes])
            assert abs(z.mean(dim=axes).std() * count**0.5 - 1) < 0.4, axes
    alphas, betas = (torch.stack([draw[number] for draw in draws]).flatten() for number in (0, 1))
    assert abs(torch.corrcoef(torch.stack([alphas, betas]))[0, 1]) < 0.01


def test_views_steps_and_seeds_have_draws_of_their_own_that_come_again() -> None:
    def first(seed: int, step: int, view: int) -> tuple[float, ...]:
        alpha, beta = WIDE.draw(EVERYWHERE, seed, step, view)
        return *alpha.flatten()[:4].tolist(), *beta.flatten()[:4].tolist()

    moments = [(seed, step, view) for seed in (0, 1, 2, 10**6) for step in (0, 1, 2, 400_000) for view in (0, 1)]
    numbers = [number for moment in moments for number in first(*moment)]
    assert len(set(numbers)) == len(numbers)
    assert numbers == [number for moment in moments for number in first(*moment)]


def test_the_draws_do_not_depend_on_what_is_augmented() -> None:
    few, many = torch.zeros(1, 2, 2, dtype=torch.int64), EVERYWHERE.repeat(3, 1, 1)
    for found, expected in zip(WIDE.draw(few, 1, 2, 0), WIDE.draw(many, 1, 2, 0)):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("sigma_scale", "sigma_shift"), [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0)])
def test_a_deviation_of_zero_leaves_factor_one_and_shift_zero(sigma_scale: float, sigma_shift: float) -> None:
    module = SlotAugmentation(8, 6, sigma_scale, sigma_shift)
    features, assignment = torch.randn(2, 6, 3, 3), torch.randint(8, (2, 3, 3))
    alpha, beta = module.draw(assignment, 0, 0, 0)
    assert bool((alpha == 1).all()) == (sigma_scale == 0)
    assert bool((beta == 0).all()) == (sigma_shift == 0)
    same = torch.equal(module(features, assignment, 0, 0, 0), features)
    assert same == (sigma_scale == sigma_shift == 0)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_features_are_augmented_in_float32(autocast: bool) -> None:
    case = case_of((2, 16, 5, 4, 3), 2)
    case = case._replace(features=case.features.bfloat16())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = case.found()
    assert found.dtype == torch.float32
    assert relative_error(found, case.expected()) < 1e-6


def test_the_gradient_reaches_the_features_by_their_slots_factors() -> None:
    case = case_of((2, 5, 4, 3, 2), 3)
    features = case.features.requires_grad_(True)
    case.found().sum().backward()
    alpha, _ = case.module.draw(case.assignment, *case.when)
    assert features.grad is not None
    torch.testing.assert_close(features.grad, alpha[case.assignment].movedim(-1, 1))


def test_other_random_numbers_are_left_alone() -> None:
    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]

    method, batch = slotfa(0, "--fa-slot-ratio", "0.5"), batch_of(0)
    before = states()
    method(batch)
    assert states() == before


# A share of the slots


def augmented_slots(alpha: Tensor, beta: Tensor) -> list[int]:
    """The slots that are not left as they are."""
    return ((alpha != 1) | (beta != 0)).any(dim=1).nonzero().flatten().tolist()


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 12).flatmap(lambda K: st.tuples(st.just(K), st.lists(st.integers(0, K - 1), min_size=1))),
    st.sampled_from([0.0, 0.1, 0.25, 0.34, 0.5, 0.75, 0.99]),
    st.integers(0, 1000),
)
def test_the_share_of_the_occupied_slots_is_augmented_and_no_other(
    slots: tuple[int, list[int]], ratio: float, step: int
) -> None:
    K, here = slots
    assignment = torch.tensor(here).view(1, 1, -1)
    module = SlotAugmentation(K, 3, 1.0, 1.0, ratio)
    alpha, beta = module.draw(assignment, 0, step, 0)
    chosen = augmented_slots(alpha, beta)
    assert len(chosen) == reference.how_many(ratio, [assignment.numpy()])
    assert set(chosen) <= set(reference.occupied([assignment.numpy()]))
    every_alpha, every_beta = SlotAugmentation(K, 3, 1.0, 1.0).draw(assignment, 0, step, 0)
    assert torch.equal(alpha[chosen], every_alpha[chosen])
    assert torch.equal(beta[chosen], every_beta[chosen])


def test_every_occupied_slot_has_the_same_chance_to_be_augmented() -> None:
    module, assignment = SlotAugmentation(9, 1, 1.0, 1.0, 0.75), torch.tensor([[[1, 3, 4, 4, 8, 0, 1]]])
    counts = torch.zeros(9)
    for step in range(2000):
        counts[augmented_slots(*module.draw(assignment, 0, step, 1))] += 1
    assert counts[[2, 5, 6, 7]].sum() == 0
    assert (counts[[0, 1, 3, 4, 8]] / 2000 - 3 / 5).abs().max() < 0.05  # floor(0.75 x 5) = 3 of 5


# The whole method


def record_draws(method: nn.Module) -> list[Draw]:
    """What the method draws from now on."""
    draws: list[Draw] = []
    augmentation: Any = method.augmentation
    draw = augmentation.draw

    def recorded(assignment: Tensor, seed: int, step: int, view: int) -> tuple[Tensor, Tensor]:
        alpha, beta = draw(assignment, seed, step, view)
        draws.append((assignment, alpha, beta))
        return alpha, beta

    augmentation.draw = recorded
    return draws


class Augmented(NamedTuple):
    """SlotFA's part from the references alone."""

    loss_augmented: float
    assignments_moved: float
    students: list[Array]


def compose_augmented(method: nn.Module, batch: Batch, level: str) -> Augmented:
    """The augmented grouping loss of a batch from the networks' float32 maps, all that follows them in float64."""
    method = copy.deepcopy(method).train()
    inputs = inputs_of(method, batch)
    students = [cosine_scores(z, inputs.prototypes_q) for z in inputs.student]
    teachers = [cosine_scores(z, inputs.prototypes_k) for z in inputs.teacher]
    projector = {name: doubled(value) for name, value in method.projector_q.mlp.named_parameters()}
    augmented = []
    for number, view in enumerate(batch.views):
        assigned = reference.assignment(students[number])
        # Drawn with the batch's own seed and step, and the view's number.
        alpha, beta = method.augmentation.draw(torch.from_numpy(assigned), batch.seed, batch.step, number)
        with torch.no_grad():
            source = inputs.student[number] if level == "projection" else doubled(method.encoder_q(view))
        features = reference.augmented_map(source, assigned, doubled(alpha), doubled(beta))
        augmented.append(features if level == "projection" else heads.mlp_on_maps(features, projector))
    return Augmented(
        reference.augmented_loss(
            augmented, inputs.prototypes_q, teachers, inputs.centre, batch.crops.numpy(), batch.flips.numpy()
        ),
        reference.share_moved(students, [cosine_scores(z, inputs.prototypes_q) for z in augmented]),
        augmented,
    )


def check_against_composition(method: nn.Module, batch: Batch, level: str) -> Augmented:
    """All terms, the total by the method's own flags, the centre."""
    lambda_, loss_weight = method.weights["loss_group"], 1.0
    expected, augmented = compose(inputs_of(method, batch), batch), compose_augmented(method, batch, level)
    found = method(batch)
    assert relative_error(found["loss_group"], expected["loss_group"]) < 1e-5
    assert relative_error(found["loss_augmented"], augmented.loss_augmented) < 1e-5
    assert relative_error(found["assignments_moved"], augmented.assignments_moved) < 1e-5
    assert lambda_, loss_weight
    return augmented
