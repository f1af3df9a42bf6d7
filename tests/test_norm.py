"""Batch norm over ranks equals that of one process with all images; the CUDA kernels are emulated on CPUs.

The emulations follow ATen/native/cuda/Normalization.cuh: `invstd` is 1 / sqrt(biased variance + eps), and statistics
and their sums are float32 for maps of 16 bits.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from models.backbones import build_encoder
from models.heads import Projector, SlotPredictor
from models.norm import FastSyncBatchNorm, RowBatchNorm, _SyncBatchNormFunction, synchronize_batch_norms
from models.precision import upcast
from tests.helpers import run_on_two_ranks
from utils import distributed

DIMS = (0, 2, 3)


def per_channel(values: Tensor) -> Tensor:
    return values.double()[:, None, None]


def batch_norm_stats(x, eps):
    variance, mean = torch.var_mean(x.double(), DIMS, correction=0)
    dtype = upcast(x).dtype
    return mean.to(dtype), (variance + eps).rsqrt().to(dtype)


def batch_norm_gather_stats_with_counts(x, means, invstds, running_mean, running_var, momentum, eps, counts):
    share = (counts.double() / counts.double().sum())[:, None]
    mean = (share * means).sum(0)
    variance = (share * (invstds.double() ** -2 - eps + (means - mean) ** 2)).sum(0)
    running_mean.lerp_(mean.to(means.dtype), momentum)
    running_var.lerp_((variance * counts.sum() / (counts.sum() - 1)).to(means.dtype), momentum)
    return mean.to(means.dtype), (variance + eps).rsqrt().to(means.dtype)


def batch_norm_elemt(x, weight, bias, mean, invstd, eps):
    return ((x - per_channel(mean)) * per_channel(invstd * weight) + per_channel(bias)).to(x.dtype)


def batch_norm_backward_reduce(gradient, x, mean, invstd, weight, *needed):
    assert gradient.stride() == x.stride()
    total, total_centered = gradient.double().sum(DIMS), (gradient * (x - per_channel(mean))).sum(DIMS)
    return tuple(value.to(mean.dtype) for value in (total, total_centered, total_centered * invstd, total))


def batch_norm_backward_elemt(gradient, x, mean, invstd, weight, total, total_centered, counts):
    assert counts.dtype == torch.int32
    assert gradient.stride() == x.stride()
    centered = (x - per_channel(mean)) * per_channel(invstd) ** 2 * per_channel(total_centered) / counts.sum()
    return ((gradient - per_channel(total) / counts.sum() - centered) * per_channel(weight * invstd)).to(x.dtype)


KERNELS = [value for name, value in list(globals().items()) if name.startswith("batch_norm_")]


class Case(NamedTuple):
    """Maps of both ranks together, of which rank 0 has the first `first`, and the layouts of maps and gradient."""

    shape: tuple[int, int, int, int] = (6, 8, 4, 3)
    first: int = 3
    layout: str = "contiguous"
    gradient_layout: str = "contiguous"
    dtype: torch.dtype = torch.float64
    compiled: bool = False

    def maps(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        maps = torch.randn(self.shape, generator=generator) * torch.linspace(0.5, 3, self.shape[1])[:, None, None]
        return (maps + torch.linspace(-2, 4, self.shape[0])[:, None, None, None]).to(self.dtype)

    def norm(self, kind: type[nn.BatchNorm2d]) -> nn.BatchNorm2d:
        norm = kind(self.shape[1], eps=0.01, momentum=0.3)
        generator = torch.Generator().manual_seed(7)
        for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            assert value is not None
            value.data.uniform_(0.5, 2, generator=generator)
        return norm.double() if self.dtype == torch.float64 else norm


LAST = "channels_last"
CASES = {
    "contiguous": Case(),
    "channels last": Case(layout=LAST, gradient_layout=LAST),
    "maps channels last": Case(layout=LAST),
    "gradient channels last": Case(gradient_layout=LAST),
    "strided": Case(layout="strided", gradient_layout="strided"),
    "one pixel": Case((8, 16, 1, 1), 4),
    "uneven": Case((7, 5, 4, 3), 2),
    "float32": Case(dtype=torch.float32),
    "bfloat16": Case(layout=LAST, gradient_layout=LAST, dtype=torch.bfloat16),
    "compiled": Case(compiled=True),
    "compiled bfloat16": Case(dtype=torch.bfloat16, compiled=True),
}


def with_layout(maps: Tensor, layout: str) -> Tensor:
    if layout == "strided":
        return maps.repeat_interleave(2, dim=3)[..., ::2]
    return maps.contiguous(memory_format=torch.channels_last if layout == LAST else torch.contiguous_format)


def train_step(norm: nn.BatchNorm2d, maps: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """Forward and backward in training, then a training forward without gradient and an evaluation."""
    outputs = norm(maps.requires_grad_())
    outputs.backward(gradient)
    with torch.no_grad():
        teacher = norm(maps)
    result = {
        "outputs": outputs.detach(),
        "teacher": teacher,
        "maps": maps.grad,
        "evaluated": norm.eval()(maps).detach(),
    }
    return result | {"weight": norm.weight.grad, "bias": norm.bias.grad} | dict(norm.named_buffers())


def train_on_rank() -> dict[str, Any]:
    for kernel in KERNELS:
        setattr(torch, kernel.__name__, kernel)
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        images = slice(None, case.first) if distributed.rank() == 0 else slice(case.first, None)
        maps = with_layout(case.maps(1)[images], case.layout)
        gradient = with_layout(case.maps(2)[images], case.gradient_layout)
        with patch("torch.compiler.is_compiling", lambda compiled=case.compiled: compiled):
            results[name] = train_step(case.norm(FastSyncBatchNorm), maps, gradient)
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_on_two_ranks(train_on_rank)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_normalize_as_one_process_with_all_images(name: str, ranks: list[dict[str, Any]]) -> None:
    case, (first, second) = CASES[name], (rank[name] for rank in ranks)
    expected = train_step(case.norm(nn.BatchNorm2d).double(), case.maps(1).double(), case.maps(2).double())
    # Relative to the largest value: float32 statistics are sums of 72 terms; maps are rounded to their own type.
    statistics_rounding = 1e-12 if case.dtype == torch.float64 else 72 * 2**-23
    rounding = {torch.float64: 1e-12, torch.float32: 72 * 2**-23, torch.bfloat16: 2**-7}[case.dtype]

    def compare(actual: Tensor, key: str, tolerance: float) -> None:
        atol = tolerance * float(expected[key].abs().max())
        torch.testing.assert_close(actual.double(), expected[key].double(), rtol=tolerance, atol=atol, msg=key)

    for key in ("outputs", "teacher", "evaluated", "maps"):
        assert first[key].dtype == case.dtype
        compare(torch.cat([first[key], second[key]]), key, rounding)
    for key in ("weight", "bias"):
        compare(first[key] + second[key], key, statistics_rounding)
    for rank in (first, second):
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            compare(rank[key], key, statistics_rounding)
    if case.layout == LAST:
        assert first["outputs"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("training", [True, False])
def test_one_process_uses_the_batch_norm_of_torch(training: bool) -> None:
    case = CASES["channels last"]
    results = []
    for kind in (FastSyncBatchNorm, nn.BatchNorm2d):
        norm, maps = case.norm(kind).train(training), case.maps(1).requires_grad_()
        outputs = norm(maps)
        outputs.backward(case.maps(2))
        results.append([outputs, maps.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_conversion_keeps_tensors_and_options_of_every_batch_norm() -> None:
    encoder = build_encoder("resnet18")
    model = nn.ModuleList([encoder, Projector(512, 8, 4), SlotPredictor(4, 8, 4), nn.BatchNorm2d(2)]).eval()
    encoder.bn1.eps, encoder.bn1.momentum = 0.25, 0.5
    before = model.state_dict(keep_vars=True)
    synchronize_batch_norms(model)
    after = model.state_dict(keep_vars=True)
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    kinds = [type(module) for module in model.modules()]
    assert nn.BatchNorm2d not in kinds
    assert kinds.count(FastSyncBatchNorm) == 20 + 2 + 1
    assert (encoder.bn1.eps, encoder.bn1.momentum, encoder.bn1.training) == (0.25, 0.5, False)
    assert all(module.synchronized for module in model.modules() if isinstance(module, RowBatchNorm))


@pytest.fixture
def nccl(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    init_method = f"file://{tmp_path}/group"
    torch.distributed.init_process_group("nccl", init_method, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.usefixtures("nccl")
@pytest.mark.parametrize("layout", ["contiguous", LAST])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_normalizes_without_waiting_for_the_device(layout: str, dtype: torch.dtype) -> None:
    case = Case((6, 40, 9, 7), layout=layout, dtype=dtype)
    gradient, results = with_layout(case.maps(2), layout).cuda(), []
    for kind in (FastSyncBatchNorm, nn.BatchNorm2d):
        norm = case.norm(kind).cuda()
        maps = with_layout(case.maps(1), layout).cuda().requires_grad_()
        running = norm.running_mean, norm.running_var
        torch.distributed.all_reduce(torch.zeros(1, device="cuda"))
        torch.cuda.set_sync_debug_mode("error")
        try:
            if kind is FastSyncBatchNorm:  # with one rank the module itself uses the batch norm of torch
                outputs = _SyncBatchNormFunction.apply(maps, norm.weight, norm.bias, *running, norm.momentum, norm.eps)
            else:
                outputs = norm(maps)
            outputs.backward(gradient)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append([outputs, maps.grad, norm.weight.grad, norm.bias.grad, *running])
    for ours, theirs in zip(*results):
        assert ours.dtype == theirs.dtype
        rounding = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[ours.dtype]
        torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding * float(theirs.detach().abs().max()))
