"""What a step costs and asks for, counted on tensors without data: no host reads, and work that grows linearly."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import main_pretrain
from models import build_method
from tests.test_compile import METHODS
from utils.batch import Batch
from utils.device import choose_device
from utils.finite import FiniteGuard
from utils.meter import Meter

FLAGS = [
    *METHODS.values(),
    ["--optimizer", "adamw", "--clip-grad", "1"],
    ["--optimizer", "sgd", "--accum-steps", "2"],
    ["--amp", "bf16"],
    ["--amp", "fp16"],
]


def no_data(batch_size: int, image_size: int) -> Batch:
    """A batch of the right shapes; below a `FakeTensorMode` it has no values."""
    views = [torch.empty(batch_size, 3, image_size, image_size) for _ in range(2)]
    crops, flips = torch.empty(batch_size, 2, 4), torch.empty(batch_size, 2, dtype=torch.bool)
    numbers = torch.empty(batch_size, dtype=torch.int64)
    return Batch(views, crops, flips, torch.empty(batch_size, 2, dtype=torch.int64), numbers)


@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
def test_the_host_reads_nothing_back_in_a_step(flags: list[str], tiny: Callable[..., list[str]]) -> None:
    """A number for the host, or a shape that depends on one, is an error where tensors have no values."""
    args = main_pretrain.parse_args(tiny(*flags))
    run = main_pretrain.build_run(args, choose_device(args), images=64)
    guard, meter = FiniteGuard(run.method, run.device), Meter(run.device, 64, run.plan.steps_per_epoch)
    with FakeTensorMode(allow_non_fake_inputs=True):
        batches = iter([no_data(8, args.image_size)] * args.accum_steps)
        main_pretrain.optimize(run, run.method, batches, guard, meter, 3)
        assert meter.health is not None
        with pytest.raises(DataDependentOutputException):
            meter.read(4)  # once a report


def work(batch_size: int, *flags: str) -> tuple[float, float]:
    """Operations of forward and backward, and bytes kept in between, an image of 224 px, in bfloat16."""
    args = main_pretrain.parse_args(["--device", "cpu", *flags])
    with torch.device("meta"):
        method = build_method(args)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        method.to_empty(device="cpu")
        batch = replace(no_data(batch_size, 224), seed=1)
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with FlopCounterMode(display=False) as forth, torch.autocast("cpu", torch.bfloat16), hooks:
            loss = method(batch)["loss"]
        with FlopCounterMode(display=False) as back:
            loss.backward()
    return (forth.get_total_flops() + back.get_total_flops()) / batch_size, sum(kept.values()) / batch_size


def test_work_and_memory_grow_linearly_with_the_batch() -> None:
    """The contrast compares all slots of a batch with each other; that must not show."""
    (few, few_bytes), (many, many_bytes) = work(64), work(512)
    assert 1 < many / few < 1.03
    assert many_bytes < 1.01 * few_bytes


def test_eight_times_the_prototypes_cost_little() -> None:
    (few, few_bytes), (many, many_bytes) = work(64), work(64, "--num-prototypes", "2048")
    assert 1 < many / few < 1.05
    assert 1 < many_bytes / few_bytes < 1.15


def test_slotfa_costs_what_slotcon_does_without_contrast() -> None:
    """The published recipe has no slot contrast; augmenting and grouping again is next to nothing."""
    slotcon, slotcon_bytes = work(64, "--group-loss-weight", "1")
    slotfa, slotfa_bytes = work(64, "--method", "slotfa")
    assert 1 < slotfa / slotcon < 1.01
    assert 1 < slotfa_bytes / slotcon_bytes < 1.02
