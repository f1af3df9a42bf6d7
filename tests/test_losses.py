"""The losses and the whole of SlotCon against the float64 reference."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from main_pretrain import parse_args
from models import build_method, losses
from models.losses import distillation, slot_contrast
from tests.helpers import TINY, run_on_two_ranks, shard
from tests.method_data import (
    assert_gradients_are_slopes,
    geometry_of,
    inputs_of,
    method_in_mid_training,
    random_batch,
    record_projections,
    to_array,
)
from tests.reference import losses as reference
from tests.reference.derivative import gradient
from tests.reference.grouping import occupied as reference_occupied
from tests.reference.heads import mlp
from tests.reference.methods import slotcon
from utils import distributed

seeds = st.integers(0, 2**32 - 1)


def uniform(rng: np.random.Generator, *shape: int) -> Tensor:
    """Random cosines."""
    return torch.from_numpy(rng.uniform(-1, 1, shape))


@given(
    shape=st.tuples(*(st.integers(1, top) for top in (4, 8, 3, 3))),
    temperatures=st.sampled_from([(0.1, 0.07), (0.3, 0.5)]),
    seed=seeds,
)
@settings(max_examples=30)
def test_distillation_matches_reference(
    shape: tuple[int, int, int, int], temperatures: tuple[float, float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    student, teacher, center = uniform(rng, *shape), uniform(rng, *shape), uniform(rng, 1, shape[1])
    valid = torch.from_numpy(rng.random(shape[0]) < 0.7)
    expected = reference.distillation(student.numpy(), teacher.numpy(), center[0].numpy(), valid.numpy(), *temperatures)
    loss = distillation(student, teacher, center, *temperatures, valid=valid)
    assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("valid", [(True, False, True), (False, False, False)])
def test_gradient_of_distillation_is_the_slope_of_the_reference(valid: tuple[bool, ...]) -> None:
    rng = np.random.default_rng(4)
    student, teacher = (uniform(rng, 3, 4, 1, 2).requires_grad_() for _ in range(2))
    center = uniform(rng, 1, 4)
    distillation(student, teacher, center, 0.1, 0.07, valid=torch.tensor(valid)).backward()
    slope = gradient(
        lambda scores: reference.distillation(scores, to_array(teacher), center[0].numpy(), valid), to_array(student)
    )
    np.testing.assert_allclose(to_array(student.grad), slope, rtol=0, atol=1e-7)
    assert (student.grad[~torch.tensor(valid)] == 0).all()
    assert teacher.grad is None


def contrast_inputs(rng: np.random.Generator) -> dict[str, Tensor]:
    """Seven queries and eight keys, some of which are padding; the positives of queries are keys."""
    key_mask = rng.random(8) < 0.7
    positives = rng.permutation(8)[:7]
    query_mask = (rng.random(7) < 0.7) & key_mask[positives]
    rows = [rng.standard_normal((n, 4)) * rng.uniform(0.1, 10, (n, 1)) for n in (7, 8)]
    values = rows[0], query_mask, rows[1], key_mask, positives
    names = ("queries", "query_mask", "keys", "key_mask", "positives")
    return {name: torch.from_numpy(value) for name, value in zip(names, values)}


def contrast_and_gradients(inputs: dict[str, Tensor], temperature: float = 0.2) -> tuple[Tensor, Tensor]:
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("queries", "keys")}
    loss = slot_contrast(**(inputs | leaves), temperature=temperature)
    loss.backward()
    assert leaves["keys"].grad is None
    assert leaves["queries"].grad is not None
    return loss.detach(), leaves["queries"].grad


@given(seed=seeds, temperature=st.sampled_from([0.2, 0.05]))
@settings(max_examples=25)
def test_slot_contrast_and_its_gradient_match_reference(seed: int, temperature: float) -> None:
    inputs = contrast_inputs(np.random.default_rng(seed))
    queries, query_mask, keys, key_mask, positives = (value.numpy() for value in inputs.values())
    rows = np.cumsum(key_mask) - 1

    def expected(values: np.ndarray) -> float:
        row_of_positive = [int(rows[positive]) for positive in positives[query_mask]]
        return reference.info_nce(values[query_mask], keys[key_mask], row_of_positive, temperature)

    loss, grad = contrast_and_gradients(inputs, temperature)
    assert loss.item() == pytest.approx(expected(queries), rel=1e-12, abs=1e-12)
    np.testing.assert_allclose(grad, gradient(expected, queries), rtol=1e-5, atol=1e-7)


@given(seed=seeds, scale=st.floats(-1e6, 1e6))
@settings(max_examples=25)
def test_contents_of_padding_change_neither_slot_contrast_nor_its_gradient(seed: int, scale: float) -> None:
    """Exactly: their terms are multiplied by zero, and their gradient is zero."""
    inputs = contrast_inputs(np.random.default_rng(seed))
    changed = {name: value.clone() for name, value in inputs.items()}
    changed["queries"][~inputs["query_mask"]] *= scale
    changed["keys"][~inputs["key_mask"]] *= scale
    changed["positives"][~inputs["query_mask"]] = 0
    (loss, grad), (changed_loss, changed_grad) = contrast_and_gradients(inputs), contrast_and_gradients(changed)
    assert torch.equal(loss, changed_loss)
    assert torch.equal(grad, changed_grad)
    assert (grad[~inputs["query_mask"]] == 0).all()


@pytest.mark.parametrize("has_keys", [True, False])
def test_slot_contrast_without_queries_is_zero_and_so_is_its_gradient(has_keys: bool) -> None:
    inputs = contrast_inputs(np.random.default_rng(0))
    inputs["query_mask"][:] = False
    inputs["key_mask"] &= has_keys
    loss, grad = contrast_and_gradients(inputs)
    assert loss == 0
    assert (grad == 0).all()


@pytest.mark.parametrize("products", [1, 7, 40])
def test_block_size_changes_neither_slot_contrast_nor_its_gradient(
    products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = contrast_inputs(np.random.default_rng(1))
    expected = contrast_and_gradients(inputs)
    monkeypatch.setattr(losses, "_BLOCK", products)
    monkeypatch.setattr(losses, "_MAX_BLOCKS", 7)
    for value, expected_value in zip(contrast_and_gradients(inputs), expected):
        torch.testing.assert_close(value, expected_value, rtol=1e-12, atol=1e-12)


def test_losses_of_half_precision_inputs_are_float32() -> None:
    rng = np.random.default_rng(7)
    scores = [uniform(rng, 2, 4, 2, 2).bfloat16() for _ in range(2)]
    inputs = contrast_inputs(rng)
    low, high = ({k: inputs[k].bfloat16().to(dtype) for k in ("queries", "keys")} for dtype in (None, torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        group = distillation(*scores, uniform(rng, 1, 4).float(), 0.1, 0.07, valid=torch.ones(2).bool())
        contrast = slot_contrast(**(inputs | low), temperature=0.2)
    assert group.dtype == contrast.dtype == torch.float32
    # Logits of up to 1 / 0.2 in magnitude round by 6e-8 each, and a few terms are added.
    assert contrast.item() == pytest.approx(slot_contrast(**(inputs | high), temperature=0.2).item(), abs=1e-5)


# SlotCon


@pytest.mark.parametrize(
    ("seed", "flags", "apart"),
    [
        (0, [], (1,)),
        (1, ["--num-prototypes", "20"], ()),  # more than positions
        (6, ["--num-prototypes", "2"], ()),  # all images have all slots
        (2, ["--group-loss-weight", "0.25"], (0, 3)),
        (3, [], (0, 1, 2, 3)),  # without grouping loss
        (4, ["--group-loss-weight", "1"], ()),
        (5, ["--group-loss-weight", "0"], ()),
    ],
)
def test_slotcon_matches_the_composition_of_the_references(seed: int, flags: list[str], apart: tuple[int, ...]) -> None:
    method, batch = method_in_mid_training(*flags, seed=seed), random_batch(seed, apart=apart)
    weight = float(flags[1]) if "--group-loss-weight" in flags else 0.5
    expected = slotcon(inputs_of(method, batch), geometry_of(batch), weight)
    outputs = method(batch)
    assert ("loss/group" in outputs, "loss/contrast" in outputs) == (weight > 0, weight < 1)
    for name in ("loss", "loss/group", "loss/contrast"):
        if name in outputs:
            assert outputs[name].item() == pytest.approx(expected[name], rel=1e-9, abs=1e-12), name
    np.testing.assert_allclose(method.center[0], expected["center"], rtol=0, atol=1e-12)
    assert bool(expected["loss/group"]) == (len(apart) < 4)
    assert expected["loss/contrast"] > 0
    assert [name for name, value in outputs.items() if value.requires_grad] == ["loss"]


def test_slotcon_starts_with_equal_networks_and_a_center_of_zero() -> None:
    method = build_method(parse_args(TINY))
    state = method.state_dict()
    for name, value in state.items():
        if "_k." in name:
            assert torch.equal(value, state[name.replace("_k.", "_q.")]), name
    assert (method.center == 0).all()


def test_gradient_of_slotcon_is_the_slope_of_the_composition() -> None:
    method, batch = method_in_mid_training(seed=7), random_batch(7, num_images=3)
    inputs, projections = inputs_of(method, batch), record_projections(method)
    method(batch)["loss"].backward()
    predictor = dict(method.predictor_slot.mlp.named_parameters())
    leaves = [*projections, method.grouping_q.slot_embed.weight, *(predictor[name] for name in inputs.predictor)]

    def loss(offsets: list[np.ndarray]) -> Any:
        moved = inputs._replace(
            student=[z + offset for z, offset in zip(inputs.student, offsets[:2])],
            prototypes_q=inputs.prototypes_q + offsets[2],
            predictor={name: value + offset for (name, value), offset in zip(inputs.predictor.items(), offsets[3:])},
        )
        return slotcon(moved, geometry_of(batch))["loss"]

    assert_gradients_are_slopes(loss, [to_array(leaf.grad) for leaf in leaves])


@pytest.mark.parametrize(("num_images", "teacher_slot"), [(3, 1), (1, 0)], ids=["no query", "one query"])
def test_fewer_than_two_queries_leave_no_contrast_and_finite_gradients(num_images: int, teacher_slot: int) -> None:
    method, batch = method_in_mid_training(seed=8), random_batch(8, num_images, apart=())
    with torch.no_grad():  # all positions of the student are in slot 0, those of the teacher in `teacher_slot`
        for projector, grouping, slot in (
            (method.projector_q, method.grouping_q, 0),
            (method.projector_k, method.grouping_k, teacher_slot),
        ):
            projector.mlp[6].bias.fill_(100.0)
            grouping.slot_embed.weight.fill_(-1.0)
            grouping.slot_embed.weight[slot] = 1.0
    outputs = method(batch)
    assert outputs["loss/contrast"] == 0
    assert outputs["loss/group"] > 0
    outputs["loss"].backward()
    for name, parameter in method.named_parameters():
        assert (parameter.grad is None) == ("_k." in name), name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert all((parameter.grad == 0).all() for parameter in method.predictor_slot.parameters())


def test_each_view_has_batch_statistics_of_its_own_in_both_networks() -> None:
    method, batch = method_in_mid_training(seed=9), random_batch(9)
    separate = copy.deepcopy(method)
    with torch.no_grad():
        for view in batch.views:
            separate.projector_q(separate.encoder_q(view))
            separate.projector_k(separate.encoder_k(view))
    method(batch)
    for part in ("encoder_q", "encoder_k", "projector_q", "projector_k"):
        expected = dict(getattr(separate, part).named_buffers())
        for name, value in getattr(method, part).named_buffers():
            torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10)


def test_update_teacher_moves_every_parameter_of_the_teacher_towards_the_student() -> None:
    method = method_in_mid_training(seed=10)
    before = {name: value.detach().clone() for name, value in method.named_parameters()}
    method.update_teacher(0.75)
    for name, value in method.named_parameters():
        moved = 0.75 * before[name] + 0.25 * before[name.replace("_k.", "_q.")]
        torch.testing.assert_close(value, moved if "_k." in name else before[name], rtol=0, atol=1e-12)


def contrast_on_rank() -> dict[str, Any]:
    """One direction of the slot contrast with this rank's images, and what it is computed from."""
    method, batch = method_in_mid_training(seed=11), shard(random_batch(11, num_images=6))
    student = method.grouping_q(*method.encode_student(batch.views[0])[1:])
    teacher = method.grouping_k(*method.encode_teacher(batch.views[1])[1:])
    if distributed.rank() == 0:  # all positions of the teacher are in slot 0: fewer keys than on the other rank
        teacher.scores[:, 0] = 2
    predictor = {name: value.detach().clone() for name, value in method.predictor_slot.mlp.named_parameters()}
    loss = method._contrast_direction(student, teacher)
    return {"loss": loss.detach(), "student": tuple(student), "teacher": tuple(teacher), "predictor": predictor}


def test_slot_contrast_over_two_ranks_matches_reference() -> None:
    """Keys are those of both ranks, without the padding of either."""
    ranks = run_on_two_ranks(contrast_on_rank)
    teacher_slots, teacher_scores = zip(*(map(to_array, rank["teacher"]) for rank in ranks))
    occupied = [reference_occupied(scores) for scores in teacher_scores]
    for number, rank in enumerate(ranks):
        slots, scores = map(to_array, rank["student"])
        parameters = {name: to_array(value) for name, value in rank["predictor"].items()}
        expected = reference.slot_contrast(
            slots, reference_occupied(scores), teacher_slots, occupied, lambda rows, p=parameters: mlp(rows, p), number
        )
        assert expected > 0
        assert rank["loss"].item() == pytest.approx(expected, rel=1e-9)
