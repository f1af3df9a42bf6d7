"""models/slotfa.py and models/augmentation.py: against the float64 reference, and what a user of SlotFA relies on."""

import copy
import functools
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import main_pretrain
from models import build_method
from models.augmentation import Chance, SlotAugmentation
from tests.reference import augmentation as reference
from tests.reference import heads
from tests.reference.compare import relative_error
from tests.reference.grouping import cosine_scores
from tests.test_distributed import make_batch, on_two_ranks, share
from tests.test_losses import APART, compose, doubled, inputs_of, slotcon, slotcon_args, views_of
from utils import distributed
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


@functools.cache
def weights() -> dict[str, Tensor]:
    """As in mid-training: a teacher that lags, a center, and features that differ among places."""
    return slotcon(1).state_dict()


def build(method: str, *flags: str) -> nn.Module:
    """A method with those weights; it spends no time on others of its own."""
    with torch.device("meta"):
        built = build_method(slotcon_args("--method", method, *flags))
    built.to_empty(device="cpu").load_state_dict(weights())
    return built.train()


def slotfa(*flags: str) -> nn.Module:
    return build("slotfa", *flags)


def batch_of(seed: int, **facts: Any) -> Batch:
    """Four images, one of which has views that do not meet, at a step in the middle of a run."""
    return replace(views_of(seed), step=17, seed=5, **facts)


# The augmentation

WIDE = SlotAugmentation(64, 48, sigma_scale=0.5, sigma_shift=2.0)
EVERYWHERE = torch.arange(64).view(1, 8, 8)  # each of 64 slots at one position
SIZES = [(1, 1, 1, 1, 1), (2, 3, 5, 4, 6), (3, 16, 7, 3, 2), (1, 2, 256, 7, 5), (2, 33, 2, 1, 9)]  # B, D, K, H, W


CPU = torch.device("cpu")


def draw(module: Any, assignment: Tensor, seed: int, step: int, view: int) -> tuple[Tensor, Tensor]:
    """The factors and shifts of a view's slots."""
    return module.factors(assignment, module.chance(seed, step, view, CPU))


class Case(NamedTuple):
    """An augmentation, its two inputs, and the seed, step and view that it is asked for."""

    module: SlotAugmentation
    features: Tensor
    assignment: Tensor
    when: tuple[int, int, int]

    def found(self) -> Tensor:
        return self.module(self.features, self.assignment, self.module.chance(*self.when, CPU))

    def expected(self) -> Array:
        alpha, beta = draw(self.module, self.assignment, *self.when)
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
    alpha, beta = draw(case.module, case.assignment, *case.when)
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
    draws = [draw(WIDE, EVERYWHERE, 0, step, step % 2) for step in range(100)]
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
        alpha, beta = draw(WIDE, EVERYWHERE, seed, step, view)
        return *alpha.flatten()[:4].tolist(), *beta.flatten()[:4].tolist()

    moments = [(seed, step, view) for seed in (0, 1, 2, 10**6) for step in (0, 1, 2, 400_000) for view in (0, 1)]
    numbers = [number for moment in moments for number in first(*moment)]
    assert len(set(numbers)) == len(numbers)
    assert numbers == [number for moment in moments for number in first(*moment)]


def test_the_draws_do_not_depend_on_what_is_augmented() -> None:
    few, many = torch.zeros(1, 2, 2, dtype=torch.int64), EVERYWHERE.repeat(3, 1, 1)
    for found, expected in zip(draw(WIDE, few, 1, 2, 0), draw(WIDE, many, 1, 2, 0)):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("sigma_scale", "sigma_shift"), [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0)])
def test_a_deviation_of_zero_leaves_factor_one_and_shift_zero(sigma_scale: float, sigma_shift: float) -> None:
    module = SlotAugmentation(8, 6, sigma_scale, sigma_shift)
    features, assignment = torch.randn(2, 6, 3, 3), torch.randint(8, (2, 3, 3))
    alpha, beta = draw(module, assignment, 0, 0, 0)
    assert bool((alpha == 1).all()) == (sigma_scale == 0)
    assert bool((beta == 0).all()) == (sigma_shift == 0)
    same = torch.equal(module(features, assignment, module.chance(0, 0, 0, CPU)), features)
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
    alpha, _ = draw(case.module, case.assignment, *case.when)
    assert features.grad is not None
    torch.testing.assert_close(features.grad, alpha[case.assignment].movedim(-1, 1))


def test_other_random_numbers_are_left_alone() -> None:
    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]

    method, batch = slotfa("--fa-slot-ratio", "0.5"), batch_of(0)
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
    alpha, beta = draw(module, assignment, 0, step, 0)
    chosen = augmented_slots(alpha, beta)
    assert len(chosen) == reference.how_many(ratio, [assignment.numpy()])
    assert set(chosen) <= set(reference.occupied([assignment.numpy()]))
    every_alpha, every_beta = draw(SlotAugmentation(K, 3, 1.0, 1.0), assignment, 0, step, 0)
    assert torch.equal(alpha[chosen], every_alpha[chosen])
    assert torch.equal(beta[chosen], every_beta[chosen])


def test_every_occupied_slot_has_the_same_chance_to_be_augmented() -> None:
    module, assignment = SlotAugmentation(9, 1, 1.0, 1.0, 0.75), torch.tensor([[[1, 3, 4, 4, 8, 0, 1]]])
    counts = torch.zeros(9)
    for step in range(2000):
        counts[augmented_slots(*draw(module, assignment, 0, step, 1))] += 1
    assert counts[[2, 5, 6, 7]].sum() == 0
    assert (counts[[0, 1, 3, 4, 8]] / 2000 - 3 / 5).abs().max() < 0.05  # floor(0.75 x 5) = 3 of 5


# The whole method


def record_draws(method: nn.Module) -> list[Draw]:
    """What the method draws from now on."""
    draws: list[Draw] = []
    augmentation: Any = method.augmentation
    factors = augmentation.factors

    def recorded(assignment: Tensor, chance: Chance) -> tuple[Tensor, Tensor]:
        alpha, beta = factors(assignment, chance)
        draws.append((assignment, alpha, beta))
        return alpha, beta

    augmentation.factors = recorded
    return draws


class Expected(NamedTuple):
    """SlotFA from the references alone: its terms, and how many assignments the augmentation moved."""

    loss_group: float
    loss_augmented: float
    loss_contrast: float
    assignments_moved: float
    center: Array


def compose_slotfa(method: nn.Module, batch: Batch, level: str) -> Expected:
    """All that follows the networks' float32 maps in float64; at encoder level the projector, too."""
    method = copy.deepcopy(method).train()
    inputs = inputs_of(method, batch)
    students = [cosine_scores(z, inputs.prototypes_q) for z in inputs.student]
    teachers = [cosine_scores(z, inputs.prototypes_k) for z in inputs.teacher]
    projector = {name: doubled(value) for name, value in method.projector_q.mlp.named_parameters()}
    augmented = []
    for number, view in enumerate(batch.views):
        assigned = reference.assignment(students[number])
        alpha, beta = draw(method.augmentation, torch.from_numpy(assigned), batch.seed, batch.step, number)
        with torch.no_grad():
            source = inputs.student[number] if level == "projection" else doubled(method.encoder_q(view))
        features = reference.augmented_map(source, assigned, doubled(alpha), doubled(beta))
        augmented.append(features if level == "projection" else heads.mlp_on_maps(features, projector))
    facts = batch.crops.numpy(), batch.flips.numpy()
    slotcon_terms = compose(inputs, batch)
    return Expected(
        slotcon_terms["loss_group"],
        reference.augmented_loss(augmented, inputs.prototypes_q, teachers, inputs.center, *facts),
        slotcon_terms["loss_contrast"],
        reference.share_moved(students, [cosine_scores(z, inputs.prototypes_q) for z in augmented]),
        slotcon_terms["center"],
    )


@levels
@pytest.mark.parametrize(
    ("flags", "weight", "weight_augmented"),
    [
        (PAPER, 1.0, 1.0),
        (CONTRAST, 0.5, 1.0),
        (RELEASED, 1.0, 1.0),
        (["--group-loss-weight", "0.3", "--fa-loss-weight", "0.7"], 0.3, 0.7),
        (["--fa-loss-weight", "2.5", "--fa-slot-ratio", "0.75", "--fa-sigma-scale", "0.5"], 1.0, 2.5),
    ],
    ids=[*PRESETS, "weighted", "share"],
)
def test_slotfa_is_the_composition_of_the_references(
    flags: list[str], weight: float, weight_augmented: float, level: str
) -> None:
    method, batch = slotfa(*flags, "--fa-level", level), batch_of(1)
    expected = compose_slotfa(method, batch, level)
    found = method(batch)
    terms = ["loss_group", "loss_augmented", "assignments_moved", *(["loss_contrast"] if weight < 1 else [])]
    for name in terms:
        assert relative_error(found[name], getattr(expected, name)) < 1e-5, name
    total = reference.total(*expected[:3], weight, weight_augmented)
    assert relative_error(found["loss"].detach(), total) < 1e-5
    assert relative_error(method.center[0], expected.center) < 1e-5
    assert 0 < expected.assignments_moved < 1
    assert abs(expected.loss_augmented / expected.loss_group - 1) > 1e-3


@presets
def test_images_whose_views_do_not_meet_leave_the_augmented_loss(flags: list[str]) -> None:
    """One of four does in the comparison with the references; here none is left, and the loss is 0."""
    method = slotfa(*flags)
    nowhere = replace(batch_of(2), crops=torch.tensor(APART).float().repeat(4, 1, 1))
    found = method(nowhere)
    assert found["loss_augmented"] == found["loss_group"] == 0
    found["loss"].backward()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


@levels
def test_without_deviation_the_augmented_loss_is_the_original_one_and_no_assignment_moves(level: str) -> None:
    method = slotfa("--fa-sigma-scale", "0", "--fa-sigma-shift", "0", "--fa-level", level)
    found = method(batch_of(3))
    assert found["assignments_moved"] == 0
    assert found["loss_group"] > 0
    assert relative_error(found["loss_augmented"], found["loss_group"]) < 1e-6


@presets
def test_only_the_loss_carries_a_gradient_and_every_term_is_logged(flags: list[str]) -> None:
    found = slotfa(*flags)(batch_of(4))
    contrast = {"loss_contrast"} if flags == CONTRAST else set()
    assert {name for name in found if name.startswith("loss")} == {"loss", "loss_group", "loss_augmented"} | contrast
    assert found.pop("slot_positions").shape == (8,)
    assert {"assignments_moved", "positives", "slots_per_image"} <= found.keys()
    assert [name for name, value in found.items() if value.requires_grad] == ["loss"]
    assert all(value.ndim == 0 and value.dtype == torch.float32 for value in found.values())


@levels
def test_a_batchs_seed_and_step_and_the_views_number_decide_the_draws(level: str) -> None:
    method, batch = slotfa("--fa-level", level), batch_of(5)
    draws = record_draws(method)
    for moment in (batch, batch, replace(batch, step=18), replace(batch, seed=6)):
        method(moment)
    alphas = [alpha for _, alpha, _ in draws]
    assert torch.equal(alphas[0], alphas[2])
    assert torch.equal(alphas[1], alphas[3])
    different = [alphas[i] for i in (0, 1, 4, 5, 6, 7)]
    assert len(torch.stack(different)[:, 0, 0].unique()) == 6


@levels
def test_the_augmented_losses_are_float32_under_autocast(level: str) -> None:
    flags = ["--fa-level", level, "--fa-sigma-scale", "0.2", "--fa-sigma-shift", "0.2"]
    method, batch = slotfa(*flags), batch_of(6)
    whole = copy.deepcopy(method)(batch)["loss_augmented"]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = method(batch)
    assert mixed["loss_augmented"].dtype == torch.float32
    assert relative_error(mixed["loss_augmented"], whole) < 0.05
    mixed["loss"].backward()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


# What the augmented loss trains


def gradients_of(method: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Of the augmented loss alone; nothing where no gradient arrives."""
    weights: Any = method.weights
    weights.update(loss_group=0.0, loss_contrast=0.0, loss_augmented=1.0)
    loss = method(batch)["loss"]
    if loss.requires_grad:
        loss.backward()
    return {name: p.grad for name, p in method.named_parameters() if p.grad is not None and (p.grad != 0).any()}


def parts(gradients: dict[str, Tensor]) -> set[str]:
    return {name.split(".")[0] for name in gradients}


@levels
@pytest.mark.parametrize(
    ("flags", "trained"),
    [
        (PAPER, {"encoder_q", "projector_q"}),
        (CONTRAST, {"encoder_q", "projector_q", "grouping_q"}),
        (RELEASED, set()),
    ],
    ids=PRESETS,
)
def test_the_augmented_loss_trains_what_its_preset_says(flags: list[str], trained: set[str], level: str) -> None:
    gradients = gradients_of(slotfa(*flags, "--fa-level", level), batch_of(7))
    assert parts(gradients) == trained
    if trained:
        assert "encoder_q.conv1.weight" in gradients
        assert {f"projector_q.mlp.{layer}.weight" for layer in (0, 1, 3, 4, 6)} <= gradients.keys()


@pytest.mark.parametrize("flags", [PAPER, CONTRAST], ids=["paper", "contrast"])
def test_the_gradient_of_the_augmented_loss_is_the_slope_of_the_reference(flags: list[str]) -> None:
    method, batch = slotfa(*flags), batch_of(8)
    inputs, projections, draws = inputs_of(method, batch), [], record_draws(method)

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        projections.append(output)

    method.projector_q.register_forward_hook(keep)
    found = gradients_of(method, batch)
    teachers = [cosine_scores(z, inputs.prototypes_k) for z in inputs.teacher]
    fixed = [(assigned.numpy(), doubled(alpha), doubled(beta)) for assigned, alpha, beta in draws]

    def loss_along(steps: list[Array]) -> float:
        """The assignment takes no part in the gradient, and stays."""
        moved = [z + step for z, step in zip(inputs.student, steps)]
        augmented = [reference.augmented_map(z, *draw) for z, draw in zip(moved, fixed)]
        facts = batch.crops.numpy(), batch.flips.numpy()
        return reference.augmented_loss(augmented, inputs.prototypes_q + steps[2], teachers, inputs.center, *facts)

    gradients = [doubled(z.grad) for z in projections]
    if flags == CONTRAST:
        gradients.append(doubled(found["grouping_q.slot_embed.weight"]))
    for number, slope in enumerate(gradients):
        steps = [np.zeros(z.shape) for z in (*inputs.student, inputs.prototypes_q)]
        steps[number] = np.random.default_rng(8).choice([-1.0, 1.0], slope.shape) + np.sign(slope)
        above = loss_along([1e-6 * step for step in steps])
        below = loss_along([-1e-6 * step for step in steps])
        assert float((slope * steps[number]).sum()) == pytest.approx((above - below) / 2e-6, rel=1e-4)


@levels
def test_released_has_the_gradients_of_slotcon_with_lambda_1(level: str) -> None:
    ours = slotfa(*RELEASED, "--fa-level", level)
    theirs = build("slotcon", "--group-loss-weight", "1")
    for method in (ours, theirs):
        method(batch_of(9))["loss"].backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        grad, other = parameter.grad, expected[name].grad
        assert (grad is None and other is None) or torch.equal(grad, other), name


# What is off costs nothing


def fail(*_: Any) -> None:
    raise AssertionError("this does not run")


@pytest.mark.parametrize("flags", [PAPER, RELEASED, [*CONTRAST, "--group-loss-weight", "1.0"]])
def test_with_lambda_1_the_predictor_stays_without_gradient_and_does_not_run(flags: list[str]) -> None:
    method = slotfa(*flags)
    for module in method.predictor_slot.modules():
        module.register_forward_pre_hook(fail)
    found = method(batch_of(10))
    assert "loss_contrast" not in found
    assert not any(p.requires_grad for p in method.predictor_slot.parameters())
    found["loss"].backward()
    assert any(name.startswith("predictor_slot.") for name in method.state_dict())


def test_with_lambda_below_1_the_predictor_runs_and_learns() -> None:
    method = slotfa(*CONTRAST)
    method(batch_of(10))["loss"].backward()
    assert all((p.grad != 0).any() for p in method.predictor_slot.parameters() if p.ndim > 1)
    method.predictor_slot.register_forward_pre_hook(fail)
    with pytest.raises(AssertionError, match="does not run"):
        method(batch_of(10))


@levels
@pytest.mark.parametrize("flags", [["--fa-loss-weight", "0"], ["--group-loss-weight", "0"]])
def test_an_augmented_loss_of_weight_0_is_neither_drawn_nor_computed(flags: list[str], level: str) -> None:
    method, plain = slotfa(*flags, "--fa-level", level), build("slotcon")
    method.augmentation.chance = fail
    method.augmentation.register_forward_pre_hook(fail)
    runs: list[int] = []
    method.projector_q.register_forward_hook(lambda *_: runs.append(1))
    found, terms = method(batch_of(11)), plain(batch_of(11))
    assert len(runs) == 2
    assert not {"loss_augmented", "assignments_moved"} & found.keys()
    assert found["loss"] == terms["loss_group" if flags[0] == "--fa-loss-weight" else "loss_contrast"]


@levels
def test_checkpoints_have_slotcons_keys_and_shapes(level: str) -> None:
    ours, theirs = build("slotfa", "--fa-level", level).state_dict(), build("slotcon").state_dict()
    assert list(ours) == list(theirs)
    assert [tensor.shape for tensor in ours.values()] == [tensor.shape for tensor in theirs.values()]


# Two processes

RANKED = {
    "paper": PAPER,
    "contrast": [*CONTRAST, "--fa-slot-ratio", "0.6"],
    "encoder": ["--fa-level", "encoder", "--fa-slot-ratio", "0.5"],
}
HERE = ([0, 1, 2], [2, 5, 6, 7, 3])  # the slots that each rank sees, of 9
TIMES = 30


def steps_on_a_rank() -> dict[str, Any]:
    """Two steps of every kind of SlotFA under DDP, and draws for assignments of one's own."""
    result: dict[str, Any] = {}
    for name, flags in RANKED.items():
        method = slotfa(*flags)
        model = distributed.wrap_ddp(method, torch.device("cpu"))
        draws = record_draws(method)
        torch.manual_seed(100 + distributed.rank())  # chance elsewhere is each rank's own
        state = torch.get_rng_state()
        for step in range(2):  # DDP complains of unused parameters in the step that follows
            model.zero_grad()
            model(replace(share(make_batch()), step=step))["loss"].backward()
        trained = {name: p.grad for name, p in method.named_parameters() if p.requires_grad}
        result[name] = {
            "without": [name for name, gradient in trained.items() if gradient is None],
            "gradients": {name: gradient.sum() for name, gradient in trained.items() if gradient is not None},
            "draws": draws,
            "undisturbed": torch.equal(state, torch.get_rng_state()),
        }
    module = SlotAugmentation(9, 4, 1.0, 1.0, 0.75)
    assignment = torch.tensor([[HERE[distributed.rank()]]])
    result["chosen"] = [augmented_slots(*draw(module, assignment, 0, step, 0)) for step in range(TIMES)]
    return result


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_ranks(tmp_path_factory.mktemp("ranks"), steps_on_a_rank)


def test_under_ddp_every_trained_parameter_has_the_same_gradient_on_both_ranks(two_ranks: list[dict[str, Any]]) -> None:
    for name in RANKED:
        first, second = (rank[name] for rank in two_ranks)
        assert first["without"] == second["without"] == [], name
        for parameter, gradient in first["gradients"].items():
            assert torch.equal(gradient, second["gradients"][parameter]), (name, parameter)
        trains_predictor = any(parameter.startswith("predictor_slot") for parameter in first["gradients"])
        assert trains_predictor == (name == "contrast")


def test_ranks_draw_the_same_without_touching_their_other_random_numbers(two_ranks: list[dict[str, Any]]) -> None:
    for name in RANKED:
        first, second = (rank[name] for rank in two_ranks)
        assert len(first["draws"]) == len(second["draws"]) == 4, name  # two steps of two views
        for (assigned, *ours), (other_assigned, *theirs) in zip(first["draws"], second["draws"]):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs)), name
            assert not torch.equal(assigned, other_assigned)
        assert len(torch.stack([alpha.sum() for _, alpha, _ in first["draws"]]).unique()) == 4
        assert first["undisturbed"]
        assert second["undisturbed"]


def test_the_share_is_of_the_slots_that_any_rank_occupies(two_ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["contrast"]["draws"] for rank in two_ranks)
    uneven = False
    for (assigned, alpha, beta), (other, _, _) in zip(first, second):
        here, there = assigned.numpy(), other.numpy()
        chosen = augmented_slots(alpha, beta)
        assert len(chosen) == reference.how_many(0.6, [here, there])
        assert set(chosen) <= set(reference.occupied([here, there]))
        uneven |= reference.how_many(0.6, [here, there]) != reference.how_many(0.6, [here])
    assert uneven


def test_ranks_that_see_other_slots_choose_the_same_ones(two_ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["chosen"] for rank in two_ranks)
    assert first == second
    occupied = set(HERE[0]) | set(HERE[1])
    assert all(len(chosen) == 5 and set(chosen) <= occupied for chosen in first)  # floor(0.75 x 7)
    assert set().union(*first) == occupied
    assert len({tuple(chosen) for chosen in first}) > TIMES / 3


# Whole runs


def weights_of_run(words: list[str], folder: Path) -> dict[str, Tensor]:
    """Train, and read the weights that the run ends with."""
    main_pretrain.main([*words, "--output-dir", str(folder)])
    return torch.load(folder / "current.pth", weights_only=True)["model"]


def differing(some: dict[str, Tensor], others: dict[str, Tensor]) -> list[str]:
    assert some.keys() == others.keys()
    return [name for name in some if not torch.equal(some[name], others[name])]


def test_after_ten_steps_released_has_the_weights_of_slotcon_with_lambda_1_bit_for_bit(
    tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    ten = tiny("--epochs", "5", "--base-lr", "4", "--seed", "3")  # of two steps
    slotcon_1 = weights_of_run([*ten, "--method", "slotcon", "--group-loss-weight", "1"], tmp_path / "slotcon")
    released = weights_of_run([*ten, "--method", "slotfa", *RELEASED], tmp_path / "released")
    assert differing(released, slotcon_1) == []
    torch.manual_seed(3)
    fresh = build_method(main_pretrain.parse_args([*ten, "--method", "slotfa"])).state_dict()
    moved = {name.split(".")[0] for name in differing(released, fresh)}
    assert moved == {f"{part}_{side}" for part in ("encoder", "projector", "grouping") for side in "qk"} | {"center"}


def test_a_resumed_run_repeats_itself(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    words = tiny("--method", "slotfa", "--save-freq", "1", "--base-lr", "4", "--fa-slot-ratio", "0.5")
    whole = weights_of_run(words, tmp_path / "whole")
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "whole" / "ckpt_epoch_1.pth", tmp_path / "resumed" / "current.pth")
    resumed = weights_of_run([*words, "--auto-resume"], tmp_path / "resumed")
    first = torch.load(tmp_path / "whole" / "ckpt_epoch_1.pth", weights_only=True)["model"]
    assert differing(resumed, whole) == []
    assert "encoder_q.conv1.weight" in differing(first, whole)


# Launchers

LAUNCHERS: dict[str, tuple[dict[str, Any], str]] = {
    "slotfa_coco_r50_800ep": ({"group_loss_weight": 1.0}, "8"),
    "slotfa_coco_r50_800ep_contrast": ({"fa_train_prototypes": True}, "8"),
    "slotfa_coco_r50_800ep_released": ({"group_loss_weight": 1.0, "fa_gradient": False}, "4"),
    "SlotFA": ({"group_loss_weight": 1.0}, "4"),
}
"""Where a launcher differs from SlotCon's recipe with SlotFA's defaults added, and on how many GPUs it runs."""
FLAGS_OF_SLOTFA = {
    "fa_sigma_scale": 1.0,
    "fa_sigma_shift": 1.0,
    "fa_loss_weight": 1.0,
    "fa_slot_ratio": 1.0,
    "fa_level": "projection",
    "fa_gradient": True,
    "fa_train_prototypes": False,
}


def launched(launcher: str, folder: Path, *more: str, **environment: str) -> list[str]:
    """What a launcher hands to torchrun, by a copy of it beside a torchrun that only tells."""
    torchrun = folder / ".venv" / "bin" / "torchrun"
    if not torchrun.exists():
        shutil.copytree(ROOT / "scripts", folder / "scripts")
        torchrun.parent.mkdir(parents=True)
        torchrun.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
        torchrun.chmod(0o755)
    outside = {name: value for name, value in os.environ.items() if name not in ("DATA", "OUT", "GPUS")}
    command = [folder / "scripts" / f"{launcher}.sh", *more]
    finished = subprocess.run(command, capture_output=True, text=True, check=True, env=outside | environment)
    return finished.stdout.splitlines()


def recipe(words: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """What `main_pretrain.py` makes of a launcher's words, and torchrun's own flags."""
    split = next(number for number, word in enumerate(words) if word.endswith("main_pretrain.py"))
    return vars(main_pretrain.parse_args(words[split + 1 :])), dict(zip(words[:split:2], words[1:split:2]))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_launchers_start_slotcons_recipe_with_their_presets_flags(launcher: str, tmp_path: Path) -> None:
    differences, gpus = LAUNCHERS[launcher]
    slotcon_recipe, _ = recipe(launched("slotcon_coco_r50_800ep", tmp_path))
    found, torchrun = recipe(launched(launcher, tmp_path))
    expected = slotcon_recipe | FLAGS_OF_SLOTFA | {"method": "slotfa"} | differences
    assert found == expected | {"output_dir": f"output/{launcher}"}
    assert torchrun["--nproc_per_node"] == gpus


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_launchers_heed_data_out_gpus_and_more_flags(launcher: str, tmp_path: Path) -> None:
    words = launched(launcher, tmp_path, "--fa-level", "encoder", DATA="/my coco", OUT="/my run", GPUS="2")
    found, torchrun = recipe(words)
    assert (found["data_dir"], found["output_dir"], found["fa_level"]) == ("/my coco", "/my run", "encoder")
    assert torchrun["--nproc_per_node"] == "2"


def test_the_flags_defaults_are_the_paper_preset() -> None:
    args = vars(main_pretrain.parse_args(["--method", "slotfa"]))
    assert {name: value for name, value in args.items() if name.startswith("fa_")} == FLAGS_OF_SLOTFA
    assert args["group_loss_weight"] == 1.0


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_dry_run_of_a_launcher_says_what_the_run_would_be(
    launcher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train2017").mkdir()
    for number in range(600):
        (tmp_path / "train2017" / f"{number}.jpg").touch()
    words = launched(launcher, tmp_path, "--dry-run", "--device", "cpu", DATA=str(tmp_path), OUT=str(tmp_path / "run"))
    split = next(number for number, word in enumerate(words) if word.endswith("main_pretrain.py"))
    main_pretrain.main(words[split + 1 :])
    said = capsys.readouterr().out
    assert "method            slotfa, resnet50, output stride 32\n" in said
    assert f"images            600 of COCO in {tmp_path}\n" in said
    assert "effective batch   512 = 512 over all processes x 1\n" in said
    assert "steps             800 = 800 epochs x 1\n" in said
    assert f"parameters        {68.7 if 'contrast' in launcher else 49.8} M trained\n" in said
    assert not (tmp_path / "run").exists()
