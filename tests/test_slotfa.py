"""SlotFA: the augmentation and the whole method against the float64 reference, and its presets."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.slot_augmentation import SlotAugmentation
from tests.helpers import run_on_two_ranks, shard
from tests.method_data import (
    assert_gradients_are_slopes,
    geometry_of,
    inputs_of,
    method_in_mid_training,
    random_batch,
    record_projections,
    to_array,
)
from tests.reference import augmentation as reference
from tests.reference.grouping import cosine_scores
from tests.reference.heads import mlp_on_maps
from tests.reference.methods import augmented_loss, slotcon
from utils import distributed

CPU = torch.device("cpu")
PAPER: list[str] = []
CONTRAST = ["--group-loss-weight", "0.5", "--fa-train-prototypes"]
RELEASED = ["--no-fa-gradient"]
PRESETS = pytest.mark.parametrize("flags", [PAPER, CONTRAST, RELEASED], ids=["paper", "contrast", "released"])
LEVELS = pytest.mark.parametrize("level", ["projection", "encoder"])


def slotfa(*flags: str, seed: int = 1) -> Any:
    return method_in_mid_training("--method", "slotfa", *flags, seed=seed)


def augmented_slots(alpha: Tensor, beta: Tensor) -> list[int]:
    return ((alpha != 1) | (beta != 0)).any(dim=1).nonzero().flatten().tolist()


# The augmentation


@given(
    size=st.tuples(*(st.integers(1, top) for top in (3, 9, 12, 5, 5))),
    seed=st.integers(0, 2**32 - 1),
    ratio=st.sampled_from([1.0, 0.5]),
    memory_format=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
@settings(max_examples=40)
def test_augmented_map_matches_reference(
    size: tuple[int, int, int, int, int], seed: int, ratio: float, memory_format: torch.memory_format
) -> None:
    B, D, K, H, W = size
    rng = np.random.default_rng(seed)
    module = SlotAugmentation(K, D, *rng.uniform(0.1, 2, 2), ratio)
    features = torch.from_numpy(rng.standard_normal((B, D, H, W))).contiguous(memory_format=memory_format)
    assignment, noise = torch.from_numpy(rng.integers(0, K, (B, H, W))), module.draw_noise(seed, 3, 1, CPU)
    alpha, beta = (value.numpy() for value in module.scale_and_shift(assignment, noise))
    expected = reference.augmented_map(features.numpy(), assignment.numpy(), alpha, beta)
    np.testing.assert_allclose(module(features, assignment, noise), expected, rtol=0, atol=1e-12)


def test_noise_has_the_given_deviations_and_is_independent() -> None:
    module = SlotAugmentation(64, 48, sigma_scale=0.5, sigma_shift=2.0)
    draws = [module.draw_noise(0, step, step % 2, CPU) for step in range(100)]
    normal = torch.stack([torch.stack([(noise.alpha - 1) / 0.5, noise.beta / 2]) for noise in draws]).double()
    for z in (normal[:, 0], normal[:, 1]):  # 307,200 numbers: five standard errors
        assert abs(z.mean()) < 0.009
        assert abs(z.std() - 1) < 0.0064
        assert abs((z.abs() < 1).double().mean() - 0.6827) < 0.0042
    for axes in ((0,), (1,), (2,), (3,), (0, 1), (2, 3), (0, 3)):  # numbers drawn together would have other means
        count = np.prod([normal.shape[axis] for axis in axes])
        assert abs(normal.mean(dim=axes).std() * count**0.5 - 1) < 0.4, axes


def test_noise_depends_on_seed_step_and_view_alone() -> None:
    keys = [(seed, step, view) for seed in (0, 1, 10**6) for step in (0, 1, 400_000) for view in (0, 1)]

    def draw() -> Tensor:
        module = SlotAugmentation(8, 4, 1.0, 1.0)
        return torch.stack([torch.cat(module.draw_noise(*key, CPU)[:2]).flatten() for key in keys])

    states = torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()
    numbers = draw()
    assert len({tuple(row) for row in numbers.tolist()}) == len(keys)
    assert torch.equal(numbers, draw())
    assert states == (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate())


@given(
    slots=st.integers(1, 12).flatmap(lambda K: st.tuples(st.just(K), st.lists(st.integers(0, K - 1), min_size=1))),
    ratio=st.sampled_from([0.0, 0.1, 0.25, 0.34, 0.5, 0.75, 0.99, 1.0]),
    step=st.integers(0, 1000),
)
@settings(max_examples=50)
def test_share_of_the_occupied_slots_is_augmented(slots: tuple[int, list[int]], ratio: float, step: int) -> None:
    K, assigned = slots
    assignment, module = torch.tensor(assigned).view(1, 1, -1), SlotAugmentation(K, 3, 1.0, 1.0, ratio)
    noise = module.draw_noise(0, step, 0, CPU)
    alpha, beta = module.scale_and_shift(assignment, noise)
    selected = augmented_slots(alpha, beta)
    if ratio < 1:
        assert len(selected) == reference.selected_count(ratio, [assignment.numpy()])
        assert set(selected) <= reference.occupied([assignment.numpy()])
    assert torch.equal(alpha[selected], noise.alpha[selected])
    assert torch.equal(beta[selected], noise.beta[selected])


# The method


@LEVELS
@pytest.mark.parametrize(
    ("flags", "weight", "weight_augmented"),
    [
        (PAPER, 1.0, 1.0),
        (CONTRAST, 0.5, 1.0),
        (RELEASED, 1.0, 1.0),
        (["--group-loss-weight", "0.3", "--fa-loss-weight", "2.5", "--fa-slot-ratio", "0.75"], 0.3, 2.5),
        (["--fa-sigma-scale", "0", "--fa-sigma-shift", "0"], 1.0, 1.0),
    ],
    ids=["paper", "contrast", "released", "share", "no noise"],
)
def test_slotfa_matches_the_composition_of_the_references(
    flags: list[str], weight: float, weight_augmented: float, level: str
) -> None:
    method, batch = slotfa(*flags, "--fa-level", level), random_batch(1)
    inputs, augmented = inputs_of(method, batch), []
    scores = [cosine_scores(z, inputs.prototypes_q) for z in inputs.student]
    projector = {name: to_array(value) for name, value in method.projector_q.mlp.named_parameters()}
    for view, z, s, noise in zip(batch.views, inputs.student, scores, method.draw_noise(batch)):
        assignment = reference.assignment(s)
        alpha, beta = (
            to_array(value) for value in method.augmentation.scale_and_shift(torch.from_numpy(assignment), noise)
        )
        source = z if level == "projection" else to_array(method.encoder_q(view))
        features = reference.augmented_map(source, assignment, alpha, beta)
        augmented.append(features if level == "projection" else mlp_on_maps(features, projector))
    expected = slotcon(inputs, geometry_of(batch), weight)
    expected["loss/augmented"] = augmented_loss(augmented, inputs, geometry_of(batch))
    expected["loss"] += weight * weight_augmented * expected["loss/augmented"]
    moved = reference.share_moved(scores, [cosine_scores(z, inputs.prototypes_q) for z in augmented])
    expected["slots/assignments_moved"] = moved

    outputs = method(batch)
    assert ("loss/contrast" in outputs) == (weight < 1)
    for name in expected.keys() & outputs.keys():
        assert outputs[name].item() == pytest.approx(expected[name], rel=1e-7 if "slots" in name else 1e-9), name
    np.testing.assert_allclose(method.center[0], expected["center"], rtol=0, atol=1e-12)
    assert (moved > 0) == ("--fa-sigma-scale" not in flags)
    assert [name for name, value in outputs.items() if value.requires_grad] == ["loss"]


def augmented_gradients(method: Any, **changes: Any) -> dict[str, Tensor]:
    """Return the gradients of the augmented loss alone, where they are not zero."""
    method.loss_weights.update({"loss/group": 0.0, "loss/contrast": 0.0, "loss/augmented": 1.0})
    loss = method(random_batch(8, **changes))["loss"]
    if loss.requires_grad:
        loss.backward()
    gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    return {name: gradient for name, gradient in gradients.items() if (gradient != 0).any()}


@LEVELS
@PRESETS
def test_augmented_loss_trains_what_its_preset_says(flags: list[str], level: str) -> None:
    names = augmented_gradients(slotfa(*flags, "--fa-level", level)).keys()
    expected = {"encoder_q", "projector_q"} if flags != RELEASED else set()
    assert {name.split(".")[0] for name in names} == expected | ({"grouping_q"} if flags == CONTRAST else set())
    if expected:
        assert {"encoder_q.0.weight"} | {f"projector_q.mlp.{i}.weight" for i in (0, 1, 3, 4, 6)} <= names
    assert not augmented_gradients(slotfa(*flags, "--fa-level", level), apart=range(4))


@pytest.mark.parametrize("flags", [PAPER, CONTRAST], ids=["paper", "contrast"])
def test_gradient_of_the_augmented_loss_is_the_slope_of_the_reference(flags: list[str]) -> None:
    method, batch = slotfa(*flags), random_batch(8)
    inputs, projections = inputs_of(method, batch), record_projections(method)
    noise = [(to_array(noise.alpha), to_array(noise.beta)) for noise in method.draw_noise(batch)]
    assignments = [reference.assignment(cosine_scores(z, inputs.prototypes_q)) for z in inputs.student]
    prototypes = augmented_gradients(method).get("grouping_q.slot_embed.weight")

    def loss(offsets: list[np.ndarray]) -> float:
        """The assignment is constant, because it has no gradient."""
        moved = [z + offset for z, offset in zip(inputs.student, offsets)]
        augmented = [reference.augmented_map(z, a, *draw) for z, a, draw in zip(moved, assignments, noise)]
        offset = offsets[2] if len(offsets) > 2 else 0
        return augmented_loss(augmented, inputs._replace(prototypes_q=inputs.prototypes_q + offset), geometry_of(batch))

    gradients = [to_array(z.grad) for z in projections]
    assert_gradients_are_slopes(loss, gradients + ([] if prototypes is None else [to_array(prototypes)]))


@LEVELS
def test_released_preset_has_the_gradients_of_slotcon_without_contrast(level: str) -> None:
    ours, theirs = slotfa(*RELEASED, "--fa-level", level), method_in_mid_training("--group-loss-weight", "1", seed=1)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for method in (ours, theirs):
        method(random_batch(9))["loss"].backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-10, atol=1e-12)


@LEVELS
def test_augmented_loss_is_float32_under_autocast(level: str) -> None:
    method, batch = slotfa("--fa-level", level).float(), random_batch(6)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = method(replace(batch, views=[view.float() for view in batch.views], crops=batch.crops.float()))
    assert {value.dtype for value in outputs.values()} == {torch.float32}
    outputs["loss"].backward()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


@LEVELS
def test_terms_of_weight_zero_are_not_computed(level: str) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("must not run")

    for flags in (PAPER, RELEASED, [*CONTRAST, "--group-loss-weight", "1.0"]):
        method = slotfa(*flags, "--fa-level", level)
        method.predictor_slot.register_forward_pre_hook(fail)
        assert "loss/contrast" not in method(random_batch(10))
        assert not any(parameter.requires_grad for parameter in method.predictor_slot.parameters())
    for flags in (["--fa-loss-weight", "0"], ["--group-loss-weight", "0"]):
        method = slotfa(*flags, "--fa-level", level)
        method.augmentation.draw_noise = fail
        method.augmentation.register_forward_pre_hook(fail)
        projections = record_projections(method)
        assert not {"loss/augmented", "slots/assignments_moved"} & method(random_batch(11)).keys()
        assert len(projections) == 2


# Two ranks

RANK_FLAGS = {"paper": PAPER, "contrast": [*CONTRAST, "--fa-slot-ratio", "0.6"], "encoder": ["--fa-level", "encoder"]}
OCCUPIED = ([0, 1, 2], [2, 5, 6, 7, 3])
"""The slots, of 9, that each rank has."""


def train_on_rank() -> dict[str, Any]:
    """Two DDP steps of SlotFA in three forms, and the slots that are selected for `OCCUPIED`."""
    result: dict[str, Any] = {}
    for name, flags in RANK_FLAGS.items():
        method = slotfa(*flags)
        model = distributed.wrap_ddp(method, CPU)
        for step in range(2):  # DDP complains of unused parameters in the step that follows
            model.zero_grad()
            model(replace(shard(random_batch(12)), step=step))["loss"].backward()
        result[name] = {name: p.grad for name, p in method.named_parameters() if p.requires_grad}
    module, assignment = SlotAugmentation(9, 4, 1.0, 1.0, 0.75), torch.tensor([[OCCUPIED[distributed.rank()]]])
    draws = [module.scale_and_shift(assignment, module.draw_noise(0, step, 0, CPU)) for step in range(30)]
    result["noise"] = torch.stack([torch.cat(draw, dim=1) for draw in draws])
    result["selected"] = [augmented_slots(*draw) for draw in draws]
    return result


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return run_on_two_ranks(train_on_rank)


@pytest.mark.parametrize("name", RANK_FLAGS)
def test_every_trained_parameter_has_the_same_gradient_on_both_ranks(
    name: str, two_ranks: list[dict[str, Any]]
) -> None:
    first, second = (rank[name] for rank in two_ranks)
    for parameter, gradient in first.items():
        assert gradient is not None, parameter
        assert torch.equal(gradient, second[parameter]), parameter
    assert any(parameter.startswith("predictor_slot") for parameter in first) == (name == "contrast")


def test_ranks_select_the_same_share_of_the_slots_that_any_rank_has(two_ranks: list[dict[str, Any]]) -> None:
    first, second = two_ranks
    assert torch.equal(first["noise"], second["noise"])
    assert {len(selected) for selected in first["selected"]} == {5}  # floor(0.75 x 7)
    assert set().union(*first["selected"]) == {*OCCUPIED[0], *OCCUPIED[1]}
    assert len({tuple(selected) for selected in first["selected"]}) > 10
