"""Two gloo processes compute what one process computes with all their images; one bad rank does not stop the others."""

import argparse
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import main_pretrain
from models.grouping import occupied, prototype_scores
from models.heads import SlotPredictor
from models.norm import synchronize_batch_norms
from tests.helpers import (
    build_small_method,
    build_small_vit,
    make_batch,
    make_method_batch,
    run_on_two_ranks,
    shard,
    tiny_flags,
)
from utils import distributed
from utils.batch import Batch
from utils.errors import UsageError
from utils.finite import FiniteGuard
from utils.meter import Meter

Result = dict[str, Any]
CPU = torch.device("cpu")
MASKS = {"many": range(0, 16, 3), "one": [9], "one_each": [2, 9], "none": []}


def parse(*flags: str) -> argparse.Namespace:
    return main_pretrain.parse_args(tiny_flags(*flags))


def make_double_batch() -> Batch:
    batch = make_batch(6)
    batch.views = [view.double() for view in batch.views]
    return shard(batch)


class NoPredictor(nn.Module):
    """In the place of the slot predictor, so that ranks meet in the collectives of the loss alone."""

    def forward(self, rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return rows, mask


def contrast_slots() -> Result:
    """Compute the slot contrast of one direction, its number of queries, and the center after a forward."""
    torch.manual_seed(3)
    method = build_small_method(parse("--group-loss-weight", "0", "--num-prototypes", "40")).double().eval()
    method.predictor_slot = NoPredictor()
    for name, parameter in method.named_parameters():
        if "_k." in name:  # otherwise nearly all slots are occupied in both views
            parameter.data.add_(0.3 * parameter.std(correction=0) * torch.randn_like(parameter))
    batch = make_double_batch()
    student = method.grouping_q(method.projector_q(method.encoder_q(batch.views[0])))
    with torch.no_grad():
        teacher = method.grouping_k(method.projector_k(method.encoder_k(batch.views[1])))
    loss = method._contrast_direction(student, teacher)
    loss.backward()
    gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    queries = (occupied(student.scores) & occupied(teacher.scores)).sum()
    method(batch)
    return {"loss": loss.detach(), "queries": int(queries), "gradients": gradients, "center": method.center}


def predict_masked_rows() -> Result:
    """Run the slot predictor on rows with each of `MASKS`, batch norm synchronized."""
    results = {}
    for name, valid in MASKS.items():
        torch.manual_seed(0)
        predictor = SlotPredictor(5, 7, 5).double()
        rows, mask = torch.randn(16, 5, dtype=torch.float64), torch.zeros(16, dtype=torch.bool)
        mask[list(valid)] = True
        if distributed.world_size() > 1:
            synchronize_batch_norms(predictor)
            rows, mask = (tensor.chunk(2)[distributed.rank()] for tensor in (rows, mask))
        output, valid_rows = predictor(rows, mask)
        output = torch.where(valid_rows[:, None], output, 0)
        (output**3).sum().backward()
        gradients = {name: p.grad for name, p in predictor.named_parameters()}
        buffers = dict(predictor.named_buffers())
        results[name] = {"output": output.detach(), "gradients": gradients, "buffers": buffers}
    return results


def guard_and_report() -> Result:
    """Take a step with a loss that is NaN on rank 1, then a good one, and report both."""
    norm = nn.BatchNorm1d(2)
    guard, meter = FiniteGuard(norm, CPU), Meter(CPU, num_images=1000)
    means = []
    for step in range(2):
        batch = shard(make_batch(6, seed=step))
        batch.unreadable = ("b.jpg",) if distributed.rank() == 1 else ()
        meter.record_batch(batch)
        guard.begin_step()
        loss = norm(torch.ones(4, 2)).sum() + 1.0 + 2 * distributed.rank()
        loss = loss * float("nan") if (distributed.rank(), step) == (1, 0) else loss
        guard.check_loss(loss)
        step_ok, bad_ranks = guard.end_step(None)
        meter.record_step([{"loss": loss}], torch.tensor(0.5), step_ok, bad_ranks)
        means.append(norm.running_mean.clone())
    metrics, messages = meter.read(2)
    return {"means": means, "metrics": metrics, "messages": messages}


def score_only(prototype: int, grouping: Any, features: Tensor) -> Tensor:
    scores = prototype_scores(features, grouping.slot_embed.weight)
    bonus = torch.zeros(scores.shape[1])
    bonus[prototype] = 9
    return scores + bonus[:, None, None]


def step_without_queries_on_rank_0() -> Result:
    """Take a DDP step in which the student of rank 0 sees only prototype 0 and its teacher only prototype 1."""
    torch.manual_seed(0)
    method = build_small_method(parse())
    model = distributed.wrap_ddp(method, CPU)
    if distributed.rank() == 0:
        method.grouping_q.scores = lambda features: score_only(0, method.grouping_q, features)
        method.grouping_k.scores = lambda features: score_only(1, method.grouping_k, features)
    output = model(shard(make_batch(6)))
    output["loss"].backward()
    gradients = torch.cat([p.grad.flatten() for p in method.parameters() if p.requires_grad])
    return {"contrast": output["loss/contrast"], "gradients": gradients}


UNUSED_PARTS = {
    "no contrast": ["--group-loss-weight", "1"],
    "no rotation loss, correspondence loss not started": ["--method", "gtsa", "--rotation-weight", "0"],
}


def steps_without_a_part() -> Result:
    """Take two DDP steps each; the second one is an error if a trained parameter had no gradient in the first."""
    names = {}
    for name, flags in UNUSED_PARTS.items():
        args = parse(*flags)
        method = build_small_method(args)
        model = distributed.wrap_ddp(method, CPU)
        for _ in range(2):
            model(shard(make_method_batch(args)))["loss"].backward()
        names[name] = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    return names


def step_of_gtsa() -> Result:
    """Take a DDP step of GTSA with all losses on a ViT, whose views all meet."""
    torch.manual_seed(0)
    args = parse("--method", "gtsa", "--drop-path", "0", "--correspondence-epoch", "0")
    method = build_small_method(args, build_small_vit).double()
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            if "_k." in name:  # a teacher that lags behind
                parameter.add_(0.1 * torch.randn_like(parameter))
    model = distributed.wrap_ddp(method, CPU)
    batch = make_method_batch(args)
    batch.views = [view.double() for view in batch.views]
    output = model(shard(batch))
    output["loss"].backward()
    gradients = {name: p.grad for name, p in method.named_parameters() if p.requires_grad}
    return {"output": {name: value.detach() for name, value in output.items()}, "gradients": gradients}


def check_flags() -> Result:
    with pytest.raises(UsageError, match="--data-dir: not the same"):
        distributed.check_same_on_all_ranks("--data-dir", distributed.rank())
    distributed.check_same_on_all_ranks("--data-dir", 5)
    return {}


FUNCTIONS = (
    contrast_slots,
    predict_masked_rows,
    guard_and_report,
    step_without_queries_on_rank_0,
    steps_without_a_part,
    step_of_gtsa,
    check_flags,
)


def run_all() -> Result:
    return {function.__name__: function() for function in FUNCTIONS}


@pytest.fixture(scope="module")
def ranks() -> list[Result]:
    """The results of all functions, which share the start of two processes."""
    return run_on_two_ranks(run_all)


# Sums of some 1e3 float64 products.
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def test_slot_contrast_over_ranks_equals_that_of_all_images(ranks: list[Result]) -> None:
    first, second = (rank["contrast_slots"] for rank in ranks)
    expected = contrast_slots()
    assert first["queries"] + second["queries"] == expected["queries"]
    assert first["queries"] != second["queries"]
    shares = [rank["queries"] / expected["queries"] for rank in (first, second)]
    torch.testing.assert_close(shares[0] * first["loss"] + shares[1] * second["loss"], expected["loss"], **CLOSE)
    for name, gradient in expected["gradients"].items():
        mean = shares[0] * first["gradients"][name] + shares[1] * second["gradients"][name]
        torch.testing.assert_close(mean, gradient, **CLOSE, msg=name)


def test_center_is_the_same_on_all_ranks_and_that_of_all_images(ranks: list[Result]) -> None:
    first, second = (rank["contrast_slots"]["center"] for rank in ranks)
    assert torch.equal(first, second)
    assert first.abs().max() > 1e-4
    torch.testing.assert_close(first, contrast_slots()["center"], **CLOSE)


@pytest.mark.parametrize("mask", MASKS)
def test_synchronized_predictor_uses_the_queries_of_all_ranks(mask: str, ranks: list[Result]) -> None:
    first, second = (rank["predict_masked_rows"][mask] for rank in ranks)
    expected = predict_masked_rows()[mask]
    torch.testing.assert_close(torch.cat([first["output"], second["output"]]), expected["output"], **CLOSE)
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(first["gradients"][name] + second["gradients"][name], gradient, **CLOSE, msg=name)
    for rank in (first, second):
        torch.testing.assert_close(rank["buffers"], expected["buffers"], **CLOSE)


def test_a_bad_loss_on_one_rank_skips_the_step_on_all_and_is_reported(ranks: list[Result]) -> None:
    for rank in ranks:
        result = rank["guard_and_report"]
        assert result["means"][0].tolist() == [0, 0]
        assert result["means"][1].tolist() == pytest.approx([0.1, 0.1])
        assert result["metrics"]["loss"] == pytest.approx(2.0)  # the mean of 1 and 3 in the good step
        assert result["metrics"]["optim/skipped_steps"] == 1
        assert result["metrics"]["data/unreadable_images"] == 1
        assert result["messages"][0] == "step 0: the loss on rank 1 was not finite; step skipped"
        assert result["messages"][1:] == ["unreadable, replaced by another image: b.jpg"]


def test_a_rank_without_queries_has_no_contrast_and_takes_part(ranks: list[Result]) -> None:
    first, second = (rank["step_without_queries_on_rank_0"] for rank in ranks)
    assert first["contrast"] == 0
    assert second["contrast"] > 0
    assert first["gradients"].isfinite().all()
    assert torch.equal(first["gradients"], second["gradients"])


@pytest.mark.parametrize("part", UNUSED_PARTS)
def test_parts_without_a_loss_leave_no_trained_parameter_without_gradient(part: str, ranks: list[Result]) -> None:
    for rank in ranks:
        assert rank["steps_without_a_part"][part] == []


def test_ranks_have_the_losses_and_the_gradient_of_gtsa_of_one_process(ranks: list[Result]) -> None:
    """The crop loss is a mean over the images whose views meet; here all do, so that ranks count equally."""
    first, second = (rank["step_of_gtsa"] for rank in ranks)
    expected = step_of_gtsa()
    assert {"loss/crop", "loss/correspondence", "loss/rotation", "rotation/accuracy"} <= expected["output"].keys()
    for name, value in expected["output"].items():
        mean = (first["output"][name] + second["output"][name]) / 2
        torch.testing.assert_close(mean, value, rtol=1e-6 if "accuracy" in name else 1e-9, atol=0, msg=name)
    assert first["output"]["loss"] != second["output"]["loss"]
    for rank in (first, second):
        for name, gradient in expected["gradients"].items():
            # Position embeddings are interpolated in float32.
            rounding = 1e-5 * float(gradient.abs().max()) if "pos_embed" in name else 1e-12
            torch.testing.assert_close(rank["gradients"][name], gradient, rtol=1e-9, atol=rounding, msg=name)


def test_random_numbers_of_a_forward_differ_by_step_batch_rank_and_seed_alone() -> None:
    state, draws = torch.get_rng_state(), []
    for rank, seed, step, number in [
        (0, 0, 0, 0),
        (0, 0, 0, 0),
        (1, 0, 0, 0),
        (0, 1, 0, 0),
        (0, 0, 1, 0),
        (0, 0, 0, 1),
    ]:
        torch.rand(3)
        with patch("utils.distributed.rank", lambda: rank):  # noqa: B023
            distributed.seed_forward(seed, step, number)
        draws.append(tuple(torch.rand(4).tolist()))
    torch.set_rng_state(state)
    assert draws[0] == draws[1]
    assert len(set(draws)) == 5


def test_a_global_batch_is_split_over_the_ranks(tmp_path: Path) -> None:
    """Every rank takes its share of the same permutation, from any step on."""
    from data.loader import EpochSampler
    from utils.config import make_plan

    args = parse("--batch-size", "4", "--accum-steps", "2", "--epochs", "3")
    plan = make_plan(args, num_images=18, world_size=2)
    whole = list(EpochSampler(plan, 0, seed=5))
    assert len(whole) == 3 * 4
    epochs = [[number for batch in whole[4 * epoch :][:4] for number in batch] for epoch in range(3)]
    for epoch, numbers in enumerate(epochs):
        assert len(set(numbers)) == 16
        assert all(18 * epoch <= number < 18 * (epoch + 1) for number in numbers)
    assert [number - 18 for number in epochs[1]] != epochs[0]
    assert list(EpochSampler(plan, 3, seed=5)) == whole[6:]
    assert list(EpochSampler(plan, 0, seed=6)) != whole
    shares = []
    for rank in range(2):
        with patch("utils.distributed.rank", lambda: rank), patch("utils.distributed.world_size", lambda: 2):  # noqa: B023
            shares.append(list(EpochSampler(plan, 0, seed=5)))
    assert [a + b for a, b in zip(*shares)] == whole
