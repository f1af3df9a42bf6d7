"""Two gloo processes compute what one process computes with all their images."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from models import build_method
from models.grouping import occupied, prototype_scores
from models.heads import MLP
from models.norm import convert_sync_batchnorm
from utils import distributed
from utils.batch import Batch
from utils.finite import FiniteGuard

Result = dict[str, Any]
IMAGES = 6


def _on_rank(rank: int, world: int, folder: Path, function: Callable[..., Result], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save(function(*args), folder / f"{rank}.pth")
    torch.distributed.destroy_process_group()


def on_two_ranks(folder: Path, function: Callable[..., Result], *args: Any) -> list[Result]:
    mp.spawn(_on_rank, (2, folder, function, args), nprocs=2)
    return [torch.load(folder / f"{rank}.pth", weights_only=True) for rank in range(2)]


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    crops = torch.tensor([[[0, 0, 60, 60], [20, 10, 90, 80]]], dtype=torch.float32).repeat(IMAGES, 1, 1)
    views = [torch.randn(IMAGES, 3, 64, 64, generator=generator) for _ in range(2)]
    flips = torch.rand(IMAGES, 2, generator=generator) < 0.5
    return Batch(views, crops, flips, torch.zeros(IMAGES, 2, dtype=torch.int64), torch.arange(IMAGES))


def share(batch: Batch) -> Batch:
    """This rank's half of the images, or all of them with one process."""
    if distributed.world_size() == 1:
        return batch
    mine = slice(0, IMAGES // 2) if distributed.rank() == 0 else slice(IMAGES // 2, None)
    return batch._with(lambda tensor: tensor[mine])


def contrast(args: argparse.Namespace) -> Result:
    """Slot contrast alone, its gradients, the center, and how many queries each direction had.

    With identity for a predictor and batch norm by running statistics, ranks meet in the collectives only.
    """
    args.group_loss_weight = 0.0
    torch.manual_seed(0)
    method = build_method(args).eval()
    method.predictor_slot = nn.Identity()
    for name, parameter in method.named_parameters():
        if "_k." in name:  # a teacher of its own: or else the arg-max of both views would agree nearly everywhere
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    batch = share(make_batch())
    out = method(batch)
    out["loss"].backward()
    with torch.no_grad():
        student = [occupied(method.grouping_q(method.projector_q(method.encoder_q(x))).scores) for x in batch.views]
        teacher = [occupied(method.grouping_k(method.projector_k(method.encoder_k(x))).scores) for x in batch.views]
    queries = [int((student[0] & teacher[1]).sum()), int((student[1] & teacher[0]).sum())]
    gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    return {"loss": out["loss"].detach(), "queries": queries, "gradients": gradients, "center": method.center}


def one_direction(args: argparse.Namespace) -> Result:
    """The same with one direction only, whose mean over ranks has one weight a rank."""
    args.group_loss_weight = 0.0
    torch.manual_seed(3)
    method = build_method(args).eval()
    method.predictor_slot = nn.Identity()
    batch = share(make_batch())
    student = method.grouping_q(method.projector_q(method.encoder_q(batch.views[0])))
    with torch.no_grad():
        teacher = method.grouping_k(method.projector_k(method.encoder_k(batch.views[1])))
    loss = method._contrast(student, teacher)  # type: ignore[operator]
    loss.backward()
    gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    queries = int((occupied(student.scores) & occupied(teacher.scores)).sum())
    return {"loss": loss.detach(), "queries": queries, "gradients": gradients}


def test_the_slot_contrast_over_ranks_is_that_of_all_images(tiny_args: argparse.Namespace, tmp_path: Path) -> None:
    first, second = on_two_ranks(tmp_path, one_direction, tiny_args)
    whole = one_direction(tiny_args)
    assert first["queries"] + second["queries"] == whole["queries"]
    assert first["queries"] != second["queries"]
    weights = [rank["queries"] / whole["queries"] for rank in (first, second)]
    mean = weights[0] * first["loss"] + weights[1] * second["loss"]
    torch.testing.assert_close(mean, whole["loss"], rtol=1e-5, atol=0)
    for name, expected in whole["gradients"].items():
        mean = weights[0] * first["gradients"][name] + weights[1] * second["gradients"][name]
        torch.testing.assert_close(mean, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()), msg=name)


def test_the_center_is_the_same_on_all_ranks_and_that_of_all_images(
    tiny_args: argparse.Namespace, tmp_path: Path
) -> None:
    first, second = on_two_ranks(tmp_path, contrast, tiny_args)
    whole = contrast(tiny_args)
    assert torch.equal(first["center"], second["center"])
    assert whole["center"].abs().max() > 1e-4
    torch.testing.assert_close(first["center"], whole["center"], rtol=1e-5, atol=1e-8)
    assert [a + b for a, b in zip(first["queries"], second["queries"])] == whole["queries"]


def rows_through_a_predictor(rows: Tensor) -> Result:
    torch.manual_seed(0)
    predictor = MLP(5, 7, 5, maps=False)
    if distributed.world_size() > 1:
        convert_sync_batchnorm(predictor)
        rows = rows[:8] if distributed.rank() == 0 else rows[8:]
    out = predictor(rows)
    (out**3).sum().backward()
    gradients = {name: p.grad for name, p in predictor.named_parameters()}
    return {"out": out.detach(), "gradients": gradients, "buffers": dict(predictor.named_buffers())}


@pytest.mark.parametrize("real", [range(0, 16, 3), [9], [2, 9], []])
def test_a_synchronized_predictor_has_the_statistics_of_all_ranks_queries(real: Any, tmp_path: Path) -> None:
    rows = torch.zeros(16, 5)
    rows[list(real)] = torch.randn(len(list(real)), 5, generator=torch.Generator().manual_seed(1))
    first, second = on_two_ranks(tmp_path, rows_through_a_predictor, rows)
    whole = rows_through_a_predictor(rows)
    torch.testing.assert_close(torch.cat([first["out"], second["out"]]), whole["out"])
    for name, expected in whole["gradients"].items():
        torch.testing.assert_close(first["gradients"][name] + second["gradients"][name], expected, msg=name)
    for name, expected in whole["buffers"].items():
        torch.testing.assert_close(first["buffers"][name], expected, msg=name)
        torch.testing.assert_close(second["buffers"][name], expected, msg=name)


def guard_a_step() -> Result:
    norm = nn.BatchNorm1d(2)
    guard = FiniteGuard(norm, torch.device("cpu"))
    guard.open_step()
    loss = norm(torch.randn(4, 2)).sum()
    guard.watch(loss * float("nan") if distributed.rank() == 1 else loss)
    go, bad = guard.close_step(None)
    return {"go": go, "bad": bad, "mean": norm.running_mean}


def test_one_ranks_bad_loss_holds_all_ranks_back(tmp_path: Path) -> None:
    for result in on_two_ranks(tmp_path, guard_a_step):
        assert result["go"] == 0
        assert result["bad"].tolist() == [0, 1]
        assert result["mean"].tolist() == [0, 0]


def step_with_lonely_queries(args: argparse.Namespace) -> Result:
    """One DDP step in which rank 0's slots never meet their positives."""
    torch.manual_seed(0)
    method = build_method(args)
    model = distributed.wrap_ddp(method, torch.device("cpu"))
    batch = share(make_batch())
    if distributed.rank() == 0:
        with torch.no_grad():  # rank 0's student sees only prototype 0, its teacher only prototype 1
            method.grouping_q.scores = lambda z: _only(0, method.grouping_q, z)  # type: ignore[union-attr]
            method.grouping_k.scores = lambda z: _only(1, method.grouping_k, z)  # type: ignore[union-attr]
    out = model(batch)
    out["loss"].backward()
    gradients = [p.grad for p in method.parameters() if p.requires_grad]
    finite = all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)
    return {
        "contrast": out.get("loss_contrast", torch.tensor(0.0)),
        "finite": finite,
        "sum": sum(g.sum() for g in gradients),
    }


def _only(prototype: int, grouping: Any, features: Tensor) -> Tensor:
    scores = prototype_scores(features, grouping.slot_embed.weight)
    lift = torch.zeros(scores.shape[1])
    lift[prototype] = 9
    return scores + lift[:, None, None]


def test_a_rank_without_queries_has_no_contrast_and_goes_on(tiny_args: argparse.Namespace, tmp_path: Path) -> None:
    first, second = on_two_ranks(tmp_path, step_with_lonely_queries, tiny_args)
    assert first["contrast"] == 0
    assert second["contrast"] > 0
    assert first["finite"]
    assert torch.equal(first["sum"], second["sum"])


def trained_parameters(args: argparse.Namespace) -> Result:
    """A DDP step with the slot contrast switched off."""
    args.group_loss_weight = 1.0
    method = build_method(args)
    out = distributed.wrap_ddp(method, torch.device("cpu"))(share(make_batch()))
    out["loss"].backward()
    return {"without": [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]}


def test_a_term_that_is_off_leaves_no_parameter_without_gradient(tiny_args: argparse.Namespace, tmp_path: Path) -> None:
    for result in on_two_ranks(tmp_path, trained_parameters, tiny_args):
        assert result["without"] == []
