"""Batch norm over ranks is that of one process with all images; the CUDA primitives are emulated where there are none.

The emulations follow ATen/native/cuda/Normalization.cuh: `invstd` is 1 / sqrt(biased variance + eps), and statistics
and their sums are float32 for maps of 16 bits.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.backbones import build_encoder
from models.heads import MLP, RowBatchNorm
from models.norm import SyncBatchNorm, _layout, _Normalize, convert_sync_batchnorm
from tests.test_distributed import on_two_ranks
from utils import distributed

Result = dict[str, Any]
OVER = (0, 2, 3)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def wide(channels: Tensor) -> Tensor:
    return channels.double()[:, None, None]


def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(x.double(), OVER, correction=0)
    return mean.float(), (variance + eps).rsqrt().float()


def batch_norm_gather_stats_with_counts(
    x: Tensor,
    means: Tensor,
    invstds: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    assert means.dtype == invstds.dtype == counts.dtype == running_mean.dtype == torch.float32
    assert means.shape == invstds.shape == (len(counts), x.shape[1])
    share = (counts.double() / counts.double().sum())[:, None]
    mean = (share * means).sum(0)
    variance = (share * (invstds.double() ** -2 - eps + (means - mean) ** 2)).sum(0)
    running_mean.lerp_(mean.float(), momentum)
    running_var.lerp_((variance * counts.sum() / (counts.sum() - 1)).float(), momentum)
    return mean.float(), (variance + eps).rsqrt().float()


def batch_norm_elemt(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, eps: float) -> Tensor:
    return ((x - wide(mean)) * wide(invstd) * wide(weight) + wide(bias)).to(x.dtype)


def batch_norm_backward_reduce(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    to_x: bool,
    to_weight: bool,
    to_bias: bool,
) -> tuple[Tensor | None, ...]:
    assert gradient.dtype == x.dtype
    assert gradient.stride() == x.stride()
    total = gradient.double().sum(OVER)
    total_centered = (gradient * (x - wide(mean))).sum(OVER)
    results = [v.float() for v in (total, total_centered, total_centered * invstd, total)]
    if x.is_contiguous(memory_format=torch.channels_last):
        return tuple(results)  # this kernel does not look at what is wanted
    return tuple(v if wanted else None for v, wanted in zip(results, (to_x, to_x, to_weight, to_bias)))


def batch_norm_backward_elemt(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    total: Tensor,
    total_centered: Tensor,
    counts: Tensor,
) -> Tensor:
    assert counts.dtype == torch.int32
    assert counts.is_contiguous()
    assert total.is_contiguous()
    assert total_centered.is_contiguous()
    assert gradient.stride() == x.stride()
    along = (x - wide(mean)) * wide(invstd) ** 2 * wide(total_centered) / counts.sum()
    return ((gradient - wide(total) / counts.sum() - along) * wide(weight) * wide(invstd)).to(x.dtype)


EMULATIONS = (
    batch_norm_stats,
    batch_norm_gather_stats_with_counts,
    batch_norm_elemt,
    batch_norm_backward_reduce,
    batch_norm_backward_elemt,
)


def in_layout(maps: Tensor, layout: str) -> Tensor:
    if layout == "strided":
        return maps.repeat_interleave(2, dim=3)[..., ::2]
    return maps.contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)


class Case(NamedTuple):
    """Maps of both ranks in one batch, of which rank 0 has the first `first`; the gradient comes in `back`."""

    shape: tuple[int, int, int, int]
    first: int
    layout: str = "contiguous"
    back: str = "contiguous"
    dtype: torch.dtype = torch.float32
    momentum: float = 0.1
    eps: float = 1e-5

    def maps(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        maps = torch.randn(self.shape, generator=generator) * torch.linspace(0.5, 3, self.shape[1])[:, None, None]
        return (maps + torch.linspace(-2, 4, self.shape[0])[:, None, None, None]).to(self.dtype)

    def norm(self, kind: type[nn.BatchNorm2d]) -> nn.BatchNorm2d:
        norm = kind(self.shape[1], self.eps, self.momentum)
        generator = torch.Generator().manual_seed(7)
        for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            assert value is not None
            value.data.uniform_(0.5, 2, generator=generator)
        return norm


CASES = {
    "plain": Case((6, 5, 4, 3), 3),
    "channels last": Case((6, 8, 4, 4), 3, "channels_last", "channels_last"),
    "gradient in the other layout": Case((6, 8, 4, 4), 3, "channels_last", "contiguous"),
    "the reverse": Case((6, 8, 4, 4), 3, "contiguous", "channels_last"),
    "strided": Case((4, 3, 5, 6), 2, "strided", "strided"),
    "1x1": Case((8, 16, 1, 1), 4),
    "one image each": Case((2, 4, 7, 5), 1, momentum=0.3, eps=1e-2),
    "one channel": Case((4, 1, 3, 3), 2, "channels_last"),
    "momentum, eps": Case((6, 5, 4, 3), 3, momentum=0.37, eps=0.5),
    "uneven": Case((7, 5, 4, 3), 2),
    "bf16": Case((6, 8, 6, 6), 3, dtype=torch.bfloat16),
    "bf16, channels last": Case((6, 8, 6, 6), 3, "channels_last", "channels_last", torch.bfloat16, 0.2, 1e-3),
    "fp16": Case((6, 8, 6, 6), 3, dtype=torch.float16),
}


def step(norm: nn.BatchNorm2d, x: Tensor, gradient: Tensor) -> Result:
    """Training forward and backward, evaluation, and a training forward without gradient, as the teacher's is."""
    x.requires_grad_()
    out = norm(x)
    out.backward(gradient)
    after = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    evaluated = norm.eval()(x).detach()
    with torch.no_grad():
        teacher = norm.train()(x)
    gradients = {"x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    return {
        "out": out.detach(),
        "layout": str(_layout(out)),
        "gradients": gradients,
        "after": after,
        "evaluated": evaluated,
        "teacher": teacher,
        "free": not teacher.requires_grad,
        "last": dict(norm.named_buffers()),
    }


class HostReads(TorchDispatchMode):
    """Notes every operation for which the host would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        masks = any(isinstance(a, Tensor) and a.dtype == torch.bool for arg in args[1:2] for a in _flat(arg))
        if name in ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique") or (
            name in ("index", "index_put", "index_put_") and masks
        ):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def _flat(argument: Any) -> list[Any]:
    return list(argument) if isinstance(argument, list | tuple) else [argument]


def on_one_rank() -> Result:
    """All cases; host reads; which gradients come back for what needs one."""
    for emulation in EMULATIONS:
        setattr(torch, emulation.__name__, emulation)
    results: Result = {}
    for name, case in CASES.items():
        mine = slice(None, case.first) if distributed.rank() == 0 else slice(case.first, None)
        x, gradient = in_layout(case.maps(1)[mine], case.layout), in_layout(case.maps(2)[mine], case.back)
        results[name] = step(case.norm(SyncBatchNorm), x, gradient)

    norm, x = SyncBatchNorm(3), torch.randn(2, 3, 4, 4, requires_grad=True)
    with HostReads() as reads:
        norm(x).sum().backward()
    results["reads"] = reads.seen

    results["needs"] = []
    for wanted in itertools.product((False, True), repeat=3):
        for layout in ("contiguous", "channels_last"):
            norm, x = SyncBatchNorm(3), in_layout(torch.randn(2, 3, 4, 4), layout)
            tensors = (x, norm.weight, norm.bias)
            for tensor, flag in zip(tensors, wanted):
                tensor.requires_grad_(flag)
            if any(wanted):
                norm(x).square().sum().backward()
            results["needs"].append((wanted, tuple(tensor.grad is not None for tensor in tensors)))
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    return on_two_ranks(tmp_path_factory.mktemp("ranks"), on_one_rank)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_normalize_as_one_process_with_all_images(name: str, ranks: list[Result]) -> None:
    case = CASES[name]
    first, second = (rank[name] for rank in ranks)
    whole = step(case.norm(nn.BatchNorm2d).double(), case.maps(1).double(), case.maps(2).double())
    rounding = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[case.dtype]

    def same(actual: Tensor, expected: Tensor, tolerance: float) -> None:
        scale = float(expected.abs().max())
        torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance * scale)

    for key in ("out", "teacher", "evaluated"):
        assert first[key].dtype == case.dtype
        same(torch.cat([first[key], second[key]]), whole[key], rounding)
    gradients = first["gradients"], second["gradients"]
    assert gradients[0]["x"].dtype == case.dtype
    same(torch.cat([g["x"] for g in gradients]), whole["gradients"]["x"], rounding)
    for parameter in ("weight", "bias"):
        assert gradients[0][parameter].dtype == torch.float32
        same(gradients[0][parameter] + gradients[1][parameter], whole["gradients"][parameter], 1e-5)
    for rank, key, buffer in itertools.product((first, second), ("after", "last"), whole["after"]):
        assert rank[key][buffer].dtype == (torch.int64 if buffer == "num_batches_tracked" else torch.float32)
        same(rank[key][buffer], whole[key][buffer], 1e-5)
    assert first["free"]
    if "channels_last" in case.layout:
        assert first["layout"] == str(torch.channels_last)


def test_the_host_reads_nothing_back(ranks: list[Result]) -> None:
    assert [rank["reads"] for rank in ranks] == [[], []]
    values = torch.ones(3)
    with HostReads() as reads:
        values[values > 0]
        float(values.sum())
    assert reads.seen == ["index", "_local_scalar_dense"]


def test_gradients_go_where_they_are_wanted(ranks: list[Result]) -> None:
    for rank in ranks:
        assert len(rank["needs"]) == 16
        for wanted, got in rank["needs"]:
            assert wanted == got


@pytest.mark.parametrize("training", [True, False])
def test_one_process_has_torchs_own_batch_norm(training: bool) -> None:
    case = CASES["channels last"]
    results = []
    for kind in (SyncBatchNorm, nn.BatchNorm2d):
        norm, x = case.norm(kind).train(training), case.maps(1).requires_grad_()
        out = norm(x)
        out.backward(case.maps(2))
        results.append([out, x.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()])
    for ours, torchs in zip(*results):
        assert torch.equal(ours, torchs)


def test_a_network_keeps_its_tensors() -> None:
    encoder, channels = build_encoder("resnet18")
    model = nn.ModuleDict({"encoder": encoder, "maps": MLP(channels, 8, 4, True), "rows": MLP(4, 8, 4, False)}).eval()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    norms[3].eps, norms[3].momentum = 0.25, 0.5
    norms[5].train().weight.requires_grad_(False)
    before = dict(model.named_parameters()), dict(model.named_buffers()), model.state_dict()
    convert_sync_batchnorm(model)
    after = dict(model.named_parameters()), dict(model.named_buffers()), model.state_dict()
    for old, new in zip(before, after):
        assert list(old) == list(new)
        assert [t.data_ptr() for t in old.values()] == [t.data_ptr() for t in new.values()]
    for old, new in zip(before[:2], after[:2]):
        assert all(old[name] is new[name] for name in old)

    kinds = [type(module) for module in model.modules()]
    assert nn.BatchNorm2d not in kinds
    assert kinds.count(SyncBatchNorm) == len(norms) == 22
    norms = [module for module in model.modules() if isinstance(module, SyncBatchNorm)]
    assert (norms[3].eps, norms[3].momentum) == (0.25, 0.5)
    assert [n for n, norm in enumerate(norms) if norm.training] == [5]
    assert all(module.synchronized for module in model.modules() if isinstance(module, RowBatchNorm))


def test_a_batch_norm_alone_is_synchronized_too() -> None:
    norm = nn.BatchNorm2d(2)
    convert_sync_batchnorm(norm)
    assert isinstance(norm, SyncBatchNorm)


GPU_CASES = {
    (layout, dtype): Case((6, 40, 9, 7), 3, layout, layout, dtype, 0.3, 1e-3)
    for layout in ("contiguous", "channels_last")
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
}


@on_gpu
@pytest.mark.parametrize("layout_and_dtype", GPU_CASES)
def test_the_emulations_are_what_the_gpu_computes(layout_and_dtype: tuple[str, torch.dtype]) -> None:
    case = GPU_CASES[layout_and_dtype]
    x, gradient = (in_layout(case.maps(seed), case.layout) for seed in (1, 2))
    norm = case.norm(nn.BatchNorm2d)
    weight, bias = norm.weight.detach(), norm.bias.detach()

    def run(name: str, *arguments: Any) -> list[Any]:
        emulation = next(emulation for emulation in EMULATIONS if emulation.__name__ == name)
        there = [a.detach().cuda() if isinstance(a, Tensor) else a for a in arguments]
        if name == "batch_norm_gather_stats_with_counts":  # as the module passes them: strided
            together = torch.cat([there[1], there[2], there[7][:, None]], dim=1)
            there[1], there[2], there[7] = together[:, :40], together[:, 40:80], together[:, 80]
        real, ours = getattr(torch, name)(*there), emulation(*arguments)
        pairs = [(real, ours)] if isinstance(ours, Tensor) else list(zip(real, ours))
        if name == "batch_norm_gather_stats_with_counts":
            pairs += [(there[3], arguments[3]), (there[4], arguments[4])]  # the running statistics
        for real_value, our_value in pairs:
            assert (real_value is None) == (our_value is None)
            if our_value is None:
                continue
            assert real_value.dtype == our_value.dtype
            assert real_value.stride() == our_value.stride()
            rounding = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[our_value.dtype]
            scale = float(our_value.abs().max())
            torch.testing.assert_close(real_value.cpu(), our_value, rtol=rounding, atol=rounding * scale)
        return [ours] if isinstance(ours, Tensor) else list(ours)

    halves = [run("batch_norm_stats", in_layout(half, case.layout), case.eps) for half in (x[:3], x[3:])]
    means, invstds = (torch.stack(values) for values in zip(*halves))
    counts = torch.full((2,), 3 * 9 * 7.0)
    running = norm.running_mean, norm.running_var
    mean, invstd = run(
        "batch_norm_gather_stats_with_counts", x, means, invstds, *running, case.momentum, case.eps, counts
    )
    run("batch_norm_elemt", x, weight, bias, mean, invstd, case.eps)
    statistics = mean, invstd, weight
    run("batch_norm_backward_reduce", gradient, x, *statistics, True, False, True)
    total, total_centered, _, _ = run("batch_norm_backward_reduce", gradient, x, *statistics, True, True, True)
    run("batch_norm_backward_elemt", gradient, x, *statistics, total, total_centered, counts.int())


@pytest.fixture
def nccl(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    where = f"file://{tmp_path}/meet"
    torch.distributed.init_process_group("nccl", where, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield
    torch.distributed.destroy_process_group()


@on_gpu
@pytest.mark.usefixtures("nccl")
@pytest.mark.parametrize("layout_and_dtype", GPU_CASES)
def test_a_gpu_normalizes_without_waiting(layout_and_dtype: tuple[str, torch.dtype]) -> None:
    case = GPU_CASES[layout_and_dtype]
    gradient = in_layout(case.maps(2), case.layout).cuda()
    results = []
    for kind in (SyncBatchNorm, nn.BatchNorm2d):
        norm = case.norm(kind).cuda()
        x = in_layout(case.maps(1), case.layout).cuda().requires_grad_()
        statistics = norm.running_mean, norm.running_var
        torch.distributed.all_reduce(torch.zeros(1, device="cuda"))
        torch.cuda.set_sync_debug_mode("error")
        try:
            if kind is SyncBatchNorm:  # with one rank the module itself would not go over ranks
                out = _Normalize.apply(x, norm.weight, norm.bias, *statistics, case.momentum, case.eps)
            else:
                out = norm(x)
            out.backward(gradient)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append([out, x.grad, norm.weight.grad, norm.bias.grad, *statistics])
    for ours, torchs in zip(*results):
        assert ours.dtype == torchs.dtype
        rounding = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[ours.dtype]
        torch.testing.assert_close(ours, torchs, rtol=rounding, atol=rounding * float(torchs.detach().abs().max()))
