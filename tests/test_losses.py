"""models/losses.py and SlotCon's whole forward against the float64 reference."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from main_pretrain import parse_args
from models import build_method, losses
from models.heads import MLP
from models.losses import distillation, slot_contrast
from tests.reference import alignment, grouping, heads
from tests.reference import losses as reference
from tests.reference.compare import gradient, relative_error
from utils.batch import Batch

Array = np.ndarray


def scores_of(rng: np.random.Generator, *shape: int) -> Tensor:
    """Random cosines."""
    return torch.from_numpy(rng.uniform(-1, 1, shape)).float()


# Distillation


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 4, 5), (5, 16, 2, 2)])
@pytest.mark.parametrize("temperatures", [(0.1, 0.07), (0.3, 0.5)])
@pytest.mark.parametrize("seed", [0, 1])
def test_distillation_is_that_of_the_reference(
    shape: tuple[int, int, int, int], temperatures: tuple[float, float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    student, teacher = scores_of(rng, *shape), scores_of(rng, *shape)
    center, valid = scores_of(rng, 1, shape[1]), torch.from_numpy(rng.random(shape[0]) < 0.7)
    valid[0] = True
    found = distillation(student, teacher, center, *temperatures, valid=valid)
    expected = reference.distillation(student.numpy(), teacher.numpy(), center[0].numpy(), valid.numpy(), *temperatures)
    assert relative_error(found, expected) < 1e-5


def test_images_without_a_valid_pair_count_neither_in_the_sum_nor_in_the_mean() -> None:
    rng = np.random.default_rng(2)
    student, teacher, center = scores_of(rng, 3, 4, 2, 2), scores_of(rng, 3, 4, 2, 2), scores_of(rng, 1, 4)
    student[1], teacher[1] = torch.nan, torch.nan
    student.requires_grad_(True)
    some = distillation(student, teacher, center, 0.1, 0.07, valid=torch.tensor([True, False, True]))
    rest = distillation(student[::2], teacher[::2], center, 0.1, 0.07, valid=torch.tensor([True, True]))
    torch.testing.assert_close(some, rest)


def test_without_any_valid_pair_distillation_is_zero_and_so_is_its_gradient() -> None:
    rng = np.random.default_rng(3)
    student = scores_of(rng, 2, 4, 2, 2).requires_grad_(True)
    loss = distillation(
        student, scores_of(rng, 2, 4, 2, 2), scores_of(rng, 1, 4), 0.1, 0.07, valid=torch.zeros(2).bool()
    )
    loss.backward()
    assert loss == 0
    assert student.grad is not None
    assert (student.grad == 0).all()


def test_the_gradient_of_distillation_is_the_slope_of_the_reference_and_stops_at_the_teacher() -> None:
    rng = np.random.default_rng(4)
    student = scores_of(rng, 3, 4, 1, 2).requires_grad_(True)
    teacher, center = scores_of(rng, 3, 4, 1, 2).requires_grad_(True), scores_of(rng, 1, 4)
    valid = torch.tensor([True, False, True])
    distillation(student, teacher, center, 0.1, 0.07, valid=valid).backward()
    slope = gradient(
        lambda place: reference.distillation(place, teacher.detach().numpy(), center[0].numpy(), valid.numpy()),
        student.detach().numpy(),
    )
    assert student.grad is not None
    assert relative_error(student.grad, slope) < 1e-5
    assert (student.grad[1] == 0).all()
    assert teacher.grad is None


# Slot contrast


class Contrast(NamedTuple):
    """Student slots of one rank in one view, the teacher's of all ranks in the other; who is occupied."""

    slots: Tensor  # (B, K, D)
    student_occupied: Tensor  # (B, K)
    teacher_slots: Tensor  # (ranks, B, K, D)
    teacher_occupied: Tensor  # (ranks, B, K)


def contrast_case(seed: int, ranks: int = 1, B: int = 3, K: int = 5, D: int = 6) -> Contrast:
    rng = np.random.default_rng(seed)
    student_occupied, teacher_occupied = rng.random((B, K)) < 0.7, rng.random((ranks, B, K)) < 0.6
    student_occupied[0, :2], teacher_occupied[:, 0, :2] = True, True  # two queries at least
    slots = rng.standard_normal((B, K, D)) * rng.uniform(1, 20, (B, K, 1))
    keys = rng.standard_normal((ranks, B, K, D)) * rng.uniform(1, 20, (ranks, B, K, 1)) + 0.3
    return Contrast(
        torch.from_numpy(slots).float(),
        torch.from_numpy(student_occupied),
        torch.from_numpy(keys).float(),
        torch.from_numpy(teacher_occupied),
    )


def our_contrast(case: Contrast, predictor: Callable[[Tensor], Tensor], rank: int, temperature: float) -> Tensor:
    """One direction with all slots laid out as rows, zeros where they are not occupied."""
    B, K, _ = case.slots.shape
    is_query = case.student_occupied & case.teacher_occupied[rank]
    queries = predictor((case.slots * is_query[:, :, None]).flatten(0, 1))
    keys = (case.teacher_slots * case.teacher_occupied[..., None]).flatten(0, 2)
    return slot_contrast(queries, keys, torch.arange(B * K) + rank * B * K, temperature)


def reference_contrast(case: Contrast, predictor: Callable[[Array], Array], rank: int, temperature: float) -> float:
    return reference.slot_contrast(
        case.slots.numpy(),
        case.student_occupied.numpy(),
        list(case.teacher_slots.numpy()),
        list(case.teacher_occupied.numpy()),
        predictor,
        rank,
        temperature,
    )


def predictor_of(dim: int, seed: int = 0) -> tuple[MLP, Callable[[Array], Array]]:
    """A slot predictor with random parameters, ours and the reference's."""
    generator = torch.Generator().manual_seed(seed)
    module = MLP(dim, 12, dim, maps=False).train()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5 + 0.1)
    parameters = {name: value.detach().double().numpy() for name, value in module.mlp.named_parameters()}
    return module, lambda rows: heads.mlp(rows, parameters)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("temperature", [0.2, 0.05])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_slot_contrast_on_every_rank_is_that_of_the_reference(ranks: int, temperature: float, seed: int) -> None:
    case = contrast_case(seed, ranks)
    for rank in range(ranks):
        module, predict = predictor_of(6, seed)
        found = our_contrast(case, module, rank, temperature).detach()
        assert relative_error(found, reference_contrast(case, predict, rank, temperature)) < 1e-5


def nce_case(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Five queries, of which rows 1 and 3 are padding; six keys, of which rows 0 and 4 are; positives."""
    rng = np.random.default_rng(seed)
    queries, keys = rng.standard_normal((5, 4)) * 3, rng.standard_normal((6, 4)) * 5
    queries[[1, 3]], keys[[0, 4]] = 0, 0
    return torch.from_numpy(queries).float(), torch.from_numpy(keys).float(), torch.tensor([2, 0, 1, 4, 5])


def reference_nce(queries: Array, keys: Tensor, temperature: float) -> float:
    """The reference on what is left of `nce_case` without its padding."""
    return reference.info_nce(queries[[0, 2, 4]], keys[[1, 2, 3, 5]].numpy(), [1, 0, 3], temperature)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_gradient_of_slot_contrast_is_the_slope_of_the_reference(seed: int) -> None:
    queries, keys, positives = nce_case(seed)
    queries.requires_grad_(True)
    loss = slot_contrast(queries, keys, positives, 0.2)
    loss.backward()
    values = queries.detach().numpy()
    assert relative_error(loss.detach(), reference_nce(values, keys, 0.2)) < 1e-5
    assert queries.grad is not None
    slope = gradient(lambda place: reference_nce(place, keys, 0.2), values)
    assert relative_error(queries.grad, slope) < 1e-5


@pytest.mark.parametrize("products", [1, 7, 40])
def test_the_size_of_the_blocks_changes_neither_loss_nor_gradient(
    products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    queries, keys = (torch.randn(19, 6, generator=generator) for _ in range(2))
    queries[[2, 3, 18]], keys[[3, 18]] = 0, 0
    results = []
    for block in (2**26, products):
        monkeypatch.setattr(losses, "_BLOCK", block)
        monkeypatch.setattr(losses, "_MOST_BLOCKS", 19)
        leaf = queries.clone().requires_grad_()
        loss = slot_contrast(leaf, keys, torch.arange(19), 0.2)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for whole, blocks in zip(*results):
        torch.testing.assert_close(blocks, whole, rtol=1e-5, atol=1e-7)


def test_padding_takes_no_gradient_and_keys_never_do() -> None:
    queries, keys, positives = nce_case(3)
    queries.requires_grad_(True)
    keys.requires_grad_(True)
    slot_contrast(queries, keys, positives, 0.2).backward()
    assert queries.grad is not None
    assert queries.grad.isfinite().all()
    assert (queries.grad[[1, 3]] == 0).all()
    assert (queries.grad[[0, 2, 4]] != 0).any(dim=1).all()
    assert keys.grad is None


def test_padding_changes_neither_the_loss_nor_the_gradient_of_the_others() -> None:
    queries, keys, positives = nce_case(4)
    bare = queries[[0, 2, 4]].requires_grad_(True)
    queries.requires_grad_(True)
    padded = slot_contrast(queries, keys, positives, 0.2)
    alone = slot_contrast(bare, keys[[1, 2, 3, 5]], torch.tensor([1, 0, 3]), 0.2)
    torch.testing.assert_close(padded, alone, rtol=1e-6, atol=0)
    padded.backward()
    alone.backward()
    assert queries.grad is not None
    torch.testing.assert_close(queries.grad[[0, 2, 4]], bare.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("any_key", [True, False])
def test_without_a_query_slot_contrast_is_zero_and_so_is_its_gradient(any_key: bool) -> None:
    _, keys, positives = nce_case(5)
    queries = torch.zeros(5, 4, requires_grad=True)
    loss = slot_contrast(queries, keys * any_key, positives, 0.2)
    loss.backward()
    assert loss == 0
    assert queries.grad is not None
    assert (queries.grad == 0).all()


@pytest.mark.parametrize("count", [0, 1])
def test_with_fewer_than_two_queries_the_predictor_gets_zero_gradients_instead_of_nan(count: int) -> None:
    case = contrast_case(6)
    case.student_occupied.zero_()
    case.student_occupied[0, :count] = True
    module, predict = predictor_of(6)
    slots = case.slots.requires_grad_(True)
    loss = our_contrast(case, module, 0, 0.2)
    loss.backward()
    assert loss == 0
    assert reference_contrast(case._replace(slots=case.slots.detach()), predict, 0, 0.2) == 0
    for parameter in (slots, *module.parameters()):
        assert parameter.grad is not None
        assert (parameter.grad == 0).all()


def test_half_precision_inputs_give_float32_losses() -> None:
    queries, keys, positives = nce_case(7)
    rng = np.random.default_rng(7)
    student, teacher = scores_of(rng, 2, 4, 2, 2).bfloat16(), scores_of(rng, 2, 4, 2, 2).bfloat16()
    queries, keys, center, valid = (
        queries.bfloat16(),
        keys.bfloat16(),
        scores_of(rng, 1, 4),
        torch.ones(2).bool(),
    )
    group = distillation(student, teacher, center, 0.1, 0.07, valid=valid)
    contrast = slot_contrast(queries, keys, positives, 0.2)
    assert group.dtype == contrast.dtype == torch.float32
    whole = distillation(student.float(), teacher.float(), center, 0.1, 0.07, valid=valid)
    assert relative_error(group, whole) < 1e-6
    assert relative_error(contrast, reference_nce(queries.float().numpy(), keys.float(), 0.2)) < 1e-5


# SlotCon, whole

APART = ((0, 0, 40, 40), (60, 50, 110, 100))


def slotcon_args(*more: str) -> Any:
    sizes = ["--dim-hidden", "32", "--dim-out", "16", "--num-prototypes", "8"]
    return parse_args(["--arch", "resnet18", "--image-size", "64", *sizes, "--device", "cpu", *more])


def slotcon(seed: int, *more: str) -> nn.Module:
    """A SlotCon as in mid-training: a teacher that lags, a center, and features that differ among places."""
    torch.manual_seed(seed)
    method = build_method(slotcon_args(*more)).train()
    with torch.no_grad():
        for part in (method.projector_q, method.predictor_slot):
            for parameter in part.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.3)
        method.update_teacher(0.0)
        for name, parameter in method.named_parameters():
            if "_k." in name:
                parameter.add_(torch.randn_like(parameter) * parameter.std(correction=0).clamp(min=0.05) * 0.2)
        method.center.copy_(torch.randn_like(method.center) * 0.2)
    return method


def views_of(seed: int, B: int = 4, apart: tuple[int, ...] = (1,)) -> Batch:
    """B images in two random crops with random flips; those numbered in `apart` do not meet."""
    rng = np.random.default_rng(seed)
    center, reach = rng.uniform(50, 60, (B, 2, 2)), rng.uniform(10, 50, (B, 2, 4))
    crops = np.concatenate([center - reach[..., :2], center + reach[..., 2:]], axis=-1)
    crops[list(apart)] = APART
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        views=[torch.randn(B, 3, 64, 64, generator=generator) for _ in range(2)],
        crops=torch.from_numpy(crops).float(),
        flips=torch.from_numpy(rng.random((B, 2)) < 0.5),
        turns=torch.zeros(B, 2, dtype=torch.int64),
        index=torch.arange(B),
    )


class Inputs(NamedTuple):
    """What the losses of SlotCon are made of: projections (B,D,H,W) of both views, and parameters."""

    student: list[Array]
    teacher: list[Array]
    prototypes_q: Array
    prototypes_k: Array
    predictor: dict[str, Array]
    center: Array


def doubled(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy().copy()


def inputs_of(method: nn.Module, batch: Batch) -> Inputs:
    """Every view alone through a copy of both networks in training mode."""
    method = copy.deepcopy(method).train()
    with torch.no_grad():
        student = [doubled(method.projector_q(method.encoder_q(view))) for view in batch.views]
        teacher = [doubled(method.projector_k(method.encoder_k(view))) for view in batch.views]
    return Inputs(
        student,
        teacher,
        doubled(method.grouping_q.slot_embed.weight),
        doubled(method.grouping_k.slot_embed.weight),
        {name: doubled(value) for name, value in method.predictor_slot.mlp.named_parameters()},
        doubled(method.center[0]),
    )


def compose(inputs: Inputs, batch: Batch, weight: float = 0.5) -> dict[str, Any]:
    """SlotCon from the references alone: loss, its two parts, and the center that follows."""
    B = len(batch.index)
    student = [grouping.cosine_scores(z, inputs.prototypes_q) for z in inputs.student]
    teacher = [grouping.cosine_scores(z, inputs.prototypes_k) for z in inputs.teacher]

    crops, flips = batch.crops.numpy(), batch.flips.numpy()
    valid = np.zeros(B, dtype=bool)
    aligned: dict[str, list[Array]] = {"student": [], "teacher": []}
    for a, b in ((0, 1), (1, 0)):
        for name, scores in (("student", student), ("teacher", teacher)):
            planes = []
            for i in range(B):
                box, valid[i] = alignment.overlap(crops[i, a], crops[i, b], flips[i, a])
                planes.append(alignment.align(scores[a][i], box, flips[i, a]))
            aligned[name].append(np.stack(planes))
    loss_group = reference.grouping_loss(
        (aligned["student"][0], aligned["student"][1]),
        (aligned["teacher"][0], aligned["teacher"][1]),
        inputs.center,
        valid,
    )

    loss_contrast = 0.0
    for a, b in ((0, 1), (1, 0)):
        loss_contrast += reference.slot_contrast(
            grouping.slots(inputs.student[a], student[a]),
            grouping.occupied(student[a]),
            [grouping.slots(inputs.teacher[b], teacher[b])],
            [grouping.occupied(teacher[b])],
            lambda rows: heads.mlp(rows, inputs.predictor),
        )
    return {
        "loss": reference.total(loss_group, loss_contrast, weight),
        "loss_group": loss_group,
        "loss_contrast": loss_contrast,
        "center": reference.update_center(inputs.center, teacher),
    }


def check_against_composition(method: nn.Module, batch: Batch) -> dict[str, Any]:
    expected = compose(inputs_of(method, batch), batch)
    found = method(batch)
    for name in ("loss_group", "loss_contrast", "loss"):
        assert relative_error(found[name].detach(), expected[name]) < 1e-5, name
    assert relative_error(method.center[0], expected["center"]) < 1e-5
    return expected


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_slotcon_is_the_composition_of_the_references(seed: int) -> None:
    expected = check_against_composition(slotcon(seed), views_of(seed))
    assert expected["loss_group"] > 0
    assert expected["loss_contrast"] > 0


def test_slotcon_starts_with_equal_networks_and_a_center_of_zero() -> None:
    torch.manual_seed(0)
    method = build_method(slotcon_args()).train()
    inputs = inputs_of(method, views_of(3))
    for student, teacher in zip(inputs.student, inputs.teacher):
        np.testing.assert_array_equal(student, teacher)
    np.testing.assert_array_equal(inputs.prototypes_q, inputs.prototypes_k)
    assert (inputs.center == 0).all()
    check_against_composition(method, views_of(3))


def test_images_whose_views_do_not_meet_leave_the_grouping_loss_and_stay_in_contrast_and_center() -> None:
    expected = check_against_composition(slotcon(4), views_of(4, apart=(0, 1, 2, 3)))
    assert expected["loss_group"] == 0
    assert expected["loss_contrast"] > 0


@pytest.mark.parametrize("weight", [0.25, 1.0, 0.0])
def test_lambda_weighs_the_two_losses(weight: float) -> None:
    method, batch = slotcon(5, "--group-loss-weight", str(weight)), views_of(5)
    expected = compose(inputs_of(method, batch), batch, weight)
    assert relative_error(method(batch)["loss"].detach(), expected["loss"]) < 1e-5


def test_only_the_loss_carries_a_gradient() -> None:
    found = slotcon(6)(views_of(6))
    assert found.pop("slot_positions").ndim == 1
    assert {"loss", "loss_group", "loss_contrast"} <= found.keys()
    assert [name for name, value in found.items() if value.requires_grad] == ["loss"]
    assert all(value.ndim == 0 for value in found.values())


def test_the_gradient_of_slotcon_is_the_slope_of_the_composition() -> None:
    method, batch = slotcon(7), views_of(7, B=3)
    inputs, projections = inputs_of(method, batch), []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        projections.append(output)

    method.projector_q.register_forward_hook(keep)
    method(batch)["loss"].backward()
    predictor = dict(method.predictor_slot.mlp.named_parameters())
    gradients = [doubled(z.grad) for z in projections]
    gradients += [doubled(method.grouping_q.slot_embed.weight.grad)]
    gradients += [doubled(predictor[name].grad) for name in inputs.predictor]

    def loss_along(steps: list[Array]) -> float:
        moved = inputs._replace(
            student=[z + step for z, step in zip(inputs.student, steps[:2])],
            prototypes_q=inputs.prototypes_q + steps[2],
            predictor={name: value + step for (name, value), step in zip(inputs.predictor.items(), steps[3:])},
        )
        return compose(moved, batch)["loss"]

    rng = np.random.default_rng(7)
    for part in (slice(0, 1), slice(1, 2), slice(2, 3), slice(3, None), slice(None)):
        directions = [np.zeros(g.shape) for g in gradients]
        for i in range(len(gradients))[part]:
            directions[i] = rng.choice([-1.0, 1.0], gradients[i].shape) + np.sign(gradients[i])
        above = loss_along([1e-6 * direction for direction in directions])
        below = loss_along([-1e-6 * direction for direction in directions])
        found = sum(float((g * direction).sum()) for g, direction in zip(gradients, directions))
        assert found == pytest.approx((above - below) / 2e-6, rel=1e-4)


def occupy(method: nn.Module, student: int, teacher: int) -> None:
    """Every position of every image goes to one prototype of the student and one of the teacher."""
    with torch.no_grad():
        for projector, grouped, slot in (
            (method.projector_q, method.grouping_q, student),
            (method.projector_k, method.grouping_k, teacher),
        ):
            projector.mlp[6].bias.fill_(100.0)
            grouped.slot_embed.weight.fill_(-1.0)
            grouped.slot_embed.weight[slot] = 1.0


@pytest.mark.parametrize(("B", "teacher_slot"), [(3, 1), (1, 0)])
def test_without_two_common_slots_the_contrast_is_zero_and_every_student_parameter_still_gets_a_gradient(
    B: int, teacher_slot: int
) -> None:
    method, batch = slotcon(8), views_of(8, B=B, apart=())
    occupy(method, 0, teacher_slot)
    found = method(batch)
    assert found["loss_contrast"] == 0
    assert found["loss_group"] > 0
    found["loss"].backward()
    for name, parameter in method.named_parameters():
        if "_k." in name:
            assert parameter.grad is None
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    for parameter in method.predictor_slot.parameters():
        assert (parameter.grad == 0).all()


def test_both_networks_see_the_views_one_after_the_other_with_statistics_of_their_own() -> None:
    method, batch = slotcon(9), views_of(9)
    alone = copy.deepcopy(method)
    with torch.no_grad():
        for view in batch.views:
            alone.projector_q(alone.encoder_q(view))
            alone.projector_k(alone.encoder_k(view))
    method(batch)
    for part in ("encoder_q", "encoder_k", "projector_q", "projector_k"):
        expected = dict(getattr(alone, part).named_buffers())
        for name, value in getattr(method, part).named_buffers():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)


def test_the_teacher_moves_as_a_whole_towards_the_student() -> None:
    method = slotcon(10)
    before = {name: value.detach().clone() for name, value in method.named_parameters()}
    method.update_teacher(0.75)
    for name, value in method.named_parameters():
        if "_k." in name:
            expected = 0.75 * before[name] + 0.25 * before[name.replace("_k.", "_q.")]
            torch.testing.assert_close(value.detach(), expected)
            assert not torch.equal(value, before[name])
        else:
            assert torch.equal(value, before[name])
