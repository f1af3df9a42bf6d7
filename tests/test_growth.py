"""What a step costs and asks for, counted on tensors without data: no host reads, and work that grows linearly."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import main_pretrain
from models import METHODS, build_method
from models.backbones import build_encoder
from tests.helpers import METHOD_FLAGS
from utils.batch import Batch
from utils.device import choose_device
from utils.finite import FiniteGuard
from utils.meter import Meter

FLAGS = [
    *METHOD_FLAGS.values(),
    ["--optimizer", "adamw", "--clip-grad", "1", "--clip-grad-per-parameter"],
    ["--optimizer", "sgd", "--accum-steps", "2", "--clip-grad", "1"],
    ["--amp", "bf16"],
    ["--amp", "fp16"],
]


def make_empty_batch(args: argparse.Namespace, batch_size: int, epoch: float = 0.0) -> Batch:
    """Make a batch with the shapes of the views of a method; below a `FakeTensorMode` it has no values."""
    sizes = [recipe.size for recipe in METHODS[args.method].view_recipes(args)]
    views, shape = [torch.empty(batch_size, 3, size, size) for size in sizes], (batch_size, len(sizes))
    crops, flips = torch.empty(*shape, 4), torch.empty(shape, dtype=torch.bool)
    index, rotations = torch.empty(batch_size, dtype=torch.int64), torch.empty(shape, dtype=torch.int64)
    return Batch(views, crops, flips, rotations, index, epoch=epoch)


@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
@pytest.mark.usefixtures("small_encoder")
def test_a_step_reads_nothing_from_the_device(flags: list[str], tiny: Callable[..., list[str]]) -> None:
    """A number for the host, or a shape that depends on one, is an error where tensors have no values."""
    args = main_pretrain.parse_args(tiny(*flags))
    run = main_pretrain.build_run(args, choose_device(args), num_images=64)
    guard, meter = FiniteGuard(run.method, run.device), Meter(run.device, 64, run.method.build_monitor(8))
    with FakeTensorMode(allow_non_fake_inputs=True):
        batches = iter([make_empty_batch(args, 8)] * args.accum_steps)
        main_pretrain.train_step(run, run.method, batches, guard, meter, 8)  # the first step of the second epoch
        with pytest.raises(DataDependentOutputException):
            meter.read(4)  # once a report


def test_attention_of_a_vit_is_the_fused_function_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = Mock(wraps=F.scaled_dot_product_attention)
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    with torch.device("meta"):
        vit = build_encoder("vit_tiny_patch16_224").train()
        vit(torch.empty(2, 3, 32, 32))
    assert fused.call_count == len(vit.blocks)


def count_work(batch_size: int, *flags: str) -> tuple[float, float]:
    """Count operations of forward and backward with all losses, and bytes kept in between, per image in bfloat16."""
    args = main_pretrain.parse_args(["--device", "cpu", *flags])
    with torch.device("meta"):
        method = build_method(args)
    kept: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        method.to_empty(device="cpu")
        batch = replace(make_empty_batch(args, batch_size, epoch=100.0), seed=1)
        hooks = torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor)
        with FlopCounterMode(display=False) as forward, torch.autocast("cpu", torch.bfloat16), hooks:
            loss = method(batch)["loss"]
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return (forward.get_total_flops() + backward.get_total_flops()) / batch_size, sum(kept.values()) / batch_size


@pytest.fixture(scope="module")
def slotcon_work() -> tuple[float, float]:
    return count_work(64)


def test_work_and_memory_grow_linearly_with_the_batch(slotcon_work: tuple[float, float]) -> None:
    """The contrast compares all slots of a batch with each other, which must not dominate."""
    (flops, kept), (more_flops, more_kept) = slotcon_work, count_work(512)
    assert 1 < more_flops / flops < 1.03
    assert more_kept < 1.01 * kept
    assert flops == pytest.approx(97e9, rel=0.01)  # two views forward and backward, two views forward


def test_2048_prototypes_add_less_than_5_percent_flops(slotcon_work: tuple[float, float]) -> None:
    (flops, kept), (more_flops, more_kept) = slotcon_work, count_work(64, "--num-prototypes", "2048")
    assert 1 < more_flops / flops < 1.05
    assert 1 < more_kept / kept < 1.15


def test_slotfa_costs_what_slotcon_does_without_contrast() -> None:
    """The published recipe has no slot contrast; augmenting and grouping again is next to nothing."""
    flops, kept = count_work(64, "--group-loss-weight", "1")
    more_flops, more_kept = count_work(64, "--method", "slotfa")
    assert 1 < more_flops / flops < 1.01
    assert 1 < more_kept / kept < 1.02


def test_work_and_memory_of_gtsa_grow_linearly_with_the_batch() -> None:
    """Ten views of ViT-S/16 forward and backward, and two of them through the teacher; with all heads and losses."""
    (flops, kept), (more_flops, more_kept) = (count_work(batch_size, "--method", "gtsa") for batch_size in (64, 512))
    assert more_flops == pytest.approx(flops, rel=1e-3)
    assert more_kept < 1.01 * kept
    assert flops == pytest.approx(152e9, rel=0.01)
    assert kept < 150 * 2**20
