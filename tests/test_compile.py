"""Compiled code computes what eager code does: in three graphs, compiled once, over ranks, with fewer activations."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import main_pretrain
from models.backbones import Encoder
from models.method import Method
from models.norm import FastSyncBatchNorm, synchronize_batch_norms
from tests.helpers import (
    METHOD_FLAGS,
    SmallEncoder,
    build_small_method,
    build_small_vit,
    make_batch,
    make_method_batch,
    run_on_two_ranks,
    shard,
    tiny_flags,
)
from utils import compiler, distributed
from utils.batch import Batch
from utils.device import choose_device
from utils.errors import UsageError

Result = dict[str, Any]
CPU = torch.device("cpu")
ALL_LOSSES = "slotfa_contrast", "gtsa"
"""The methods with every loss term; the others are compiled by `--full`."""


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Start with nothing compiled, and restore the settings."""
    torch.compiler.reset()
    suppress, budget = torch._dynamo.config.suppress_errors, torch._functorch.config.activation_memory_budget
    yield
    torch._dynamo.config.suppress_errors, torch._functorch.config.activation_memory_budget = suppress, budget
    torch.compiler.reset()


@pytest.fixture
def cpp_compiler() -> Iterator[None]:
    """Generate code without vector instructions, which torch 2.15 gets wrong under ATEN_CPU_CAPABILITY=default."""
    with torch._inductor.config.patch({"cpp.simdlen": 0}):
        if error := compiler._compile_error(CPU):
            pytest.skip(f"nothing can be compiled here: {error}")
        yield


def parse(*flags: str) -> argparse.Namespace:
    return main_pretrain.parse_args(tiny_flags(*flags))


def compile_in_one_piece(method: Method) -> CompileCounterWithBackend:
    """Compile the parts of a method without a code generator; a graph break is an error. Return a counter of graphs."""
    counter = CompileCounterWithBackend("aot_eager")
    for name in method.compiled:
        setattr(method, name, torch.compile(getattr(method, name), backend=counter, fullgraph=True, dynamic=False))
    return counter


def relative_difference(values: list[Tensor], expected: list[Tensor]) -> float:
    """Compute |values - expected| / |expected| over all tensors together."""
    pairs = [(a.double().flatten(), b.double().flatten()) for a, b in zip(values, expected, strict=True)]
    return float(torch.cat([a - b for a, b in pairs]).norm() / torch.cat([b for _, b in pairs]).norm())


def gradients(method: nn.Module) -> list[Tensor]:
    return [p.grad for p in method.parameters() if p.grad is not None]


def three_steps(args: argparse.Namespace, prepare: Callable[[Method], object]) -> tuple[list[Tensor], object]:
    """Return losses, gradients and buffers of forwards and backwards in float64 in three epochs; GTSA has a ViT."""
    torch.manual_seed(0)
    build: Callable[..., Encoder] = build_small_vit if args.method == "gtsa" else SmallEncoder
    method = build_small_method(args, build).double()
    prepared, results = prepare(method), []
    for step in range(3):
        batch = replace(make_method_batch(args, 4, seed=step), step=step, epoch=float(step))
        batch.views = [view.double() for view in batch.views]
        method.zero_grad()
        torch.manual_seed(step)  # of stochastic depth
        loss = method(batch)["loss"]
        loss.backward()
        results += [loss.detach(), *gradients(method), *[buffer.clone() for buffer in method.buffers()]]
    return results, prepared


@pytest.mark.parametrize(
    "method", [name if name in ALL_LOSSES else pytest.param(name, marks=pytest.mark.full) for name in METHOD_FLAGS]
)
def test_a_method_compiles_few_graphs_and_computes_the_same(method: str) -> None:
    """One graph for a student view, one for a teacher view, one for all that follows.

    GTSA has one more for local views, and one more with the patch correspondence loss, which starts after an epoch.
    """
    args = parse(*METHOD_FLAGS[method], "--drop-path", "0.5")
    expected, _ = three_steps(args, lambda method: None)
    results, counter = three_steps(args, compile_in_one_piece)
    assert counter.frame_count == (5 if method == "gtsa" else 3)
    assert relative_difference(results, expected) < (1e-6 if method == "gtsa" else 1e-9)  # float32 position embeddings


# The code generator that users get.


@pytest.mark.usefixtures("cpp_compiler")
def test_generated_code_of_an_encoder_computes_what_eager_code_does() -> None:
    torch.manual_seed(0)
    method, view = build_small_method(parse()).double(), make_batch(4).views[0].double()
    expected = method.encode_teacher(view)
    compiler.compile_methods(method, ["encode_teacher"], parse())
    torch._dynamo.config.suppress_errors = False
    assert relative_difference([*method.encode_teacher(view)], [*expected]) < 1e-12


@pytest.mark.full
@pytest.mark.parametrize("method", ["slotcon", *ALL_LOSSES])
@pytest.mark.usefixtures("cpp_compiler")
def test_generated_code_of_a_method_computes_what_eager_code_does(method: str) -> None:
    args = parse(*METHOD_FLAGS[method], "--drop-path", "0.5")

    def compile_method(method: Method) -> None:
        compiler.compile_methods(method, method.compiled, args)
        torch._dynamo.config.suppress_errors = False

    expected, _ = three_steps(args, lambda method: None)
    results, _ = three_steps(args, compile_method)
    assert relative_difference(results, expected) < (1e-6 if method == "gtsa" else 1e-9)


def loss_and_kept_bytes(method: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Return the loss, and how many bytes the forward keeps for the backward besides the parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in method.parameters()}
    kept: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        loss = method(batch)["loss"]
    return loss, sum(kept.values())


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.full
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("cpp_compiler")
def test_a_smaller_activation_budget_keeps_fewer_activations(device: str) -> None:
    """It changes neither loss nor gradients nor running statistics, which recomputation must not count twice."""
    kept, losses, slopes, buffers = [], [], [], []
    for flags in (["--no-compile"], ["--compile"], ["--compile", "--activation-budget", "0.3"]):
        torch.compiler.reset()
        args = parse("--device", device, "--amp", "off", *flags)
        method = main_pretrain.build_run(args, choose_device(args), num_images=8).method
        loss, kept_bytes = loss_and_kept_bytes(method, make_batch(6).to(device))
        loss.backward()
        kept.append(kept_bytes)
        losses.append(loss.item())
        slopes.append(gradients(method))
        buffers.append([buffer.detach() for buffer in method.buffers()])
    assert kept[2] < 0.6 * kept[1] < 0.6 * kept[0]
    # Float32: 18 layers, whose gradients amplify a rounding of 6e-8 by some 1e3.
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-4)
    assert max(relative_difference(slope, slopes[0]) for slope in slopes) < 1e-2
    assert max(relative_difference(buffer, buffers[0]) for buffer in buffers) < 1e-4


# Over ranks


def normalize(norm: nn.Module, maps: Tensor, gradient: Tensor) -> Result:
    maps = maps.requires_grad_()
    output = norm(maps)
    output.backward(gradient)
    buffers = {name.removeprefix("_orig_mod."): buffer.clone() for name, buffer in norm.named_buffers()}
    slopes = {f"{name.removeprefix('_orig_mod.')}.grad": p.grad for name, p in norm.named_parameters()}
    return {"output": output.detach(), "maps.grad": maps.grad, **buffers, **slopes}


def maps_and_gradient(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    maps, gradient = (torch.randn(6, 5, 4, 3, generator=generator) for _ in range(2))
    return (3 * maps + torch.arange(5.0)[:, None, None]).to(dtype), gradient.to(dtype)


def normalize_compiled(dtype: torch.dtype) -> Result:
    maps, gradient = (tensor.chunk(2)[distributed.rank()] for tensor in maps_and_gradient(dtype))
    return normalize(torch.compile(FastSyncBatchNorm(5), backend="aot_eager", fullgraph=True), maps, gradient)


def step_with_all_images() -> Result:
    """Compute the gradients of a step: of one process eagerly, of two ranks compiled with synchronized batch norm."""
    torch.manual_seed(0)
    # With the grouping loss, whose mean over ranks is that over images.
    method = build_small_method(parse("--group-loss-weight", "1"))
    model = distributed.wrap_ddp(method, CPU)
    if distributed.world_size() > 1:
        synchronize_batch_norms(method)
        compile_in_one_piece(method)
        # Parameters of this size make torch split the graphs where gradients of a larger network are exchanged.
        torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = model.bucket_bytes_cap = 1000
    loss = model(shard(make_batch(6)))["loss"]
    loss.backward()
    return {"loss": loss.detach(), "gradients": gradients(method), "buffers": list(method.buffers())}


def resolve_without_compiler_on_rank_1() -> Result:
    error = "no compiler" if distributed.rank() == 1 else ""
    compiler._compile_error = lambda device: error
    args = parse("--compile")
    notes = compiler.resolve_compile(args, CPU)
    return {"compile": args.compile, "notes": notes}


def run_all() -> Result:
    return {
        "float32": normalize_compiled(torch.float32),
        "bfloat16": normalize_compiled(torch.bfloat16),
        "step": step_with_all_images(),
        "resolve": resolve_without_compiler_on_rank_1(),
    }


@pytest.fixture(scope="module")
def ranks() -> list[Result]:
    return run_on_two_ranks(run_all)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
def test_compiled_batch_norm_over_ranks_equals_that_of_one_process(
    dtype: torch.dtype, rounding: float, ranks: list[Result]
) -> None:
    first, second = (rank[str(dtype).removeprefix("torch.")] for rank in ranks)
    for name, expected in normalize(nn.BatchNorm2d(5), *(x.float() for x in maps_and_gradient(dtype))).items():
        if name in ("output", "maps.grad"):
            assert first[name].dtype == dtype
            value = torch.cat([first[name], second[name]])
        elif name.endswith("grad"):
            value = first[name] + second[name]
        else:
            value = first[name]
            assert torch.equal(value, second[name]), name
        assert relative_difference([value], [expected]) < rounding, name


def test_compiled_ranks_have_the_gradient_of_one_process_with_all_images(ranks: list[Result]) -> None:
    expected = step_with_all_images()
    first, second = (rank["step"] for rank in ranks)
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, expected["loss"], rtol=1e-5, atol=0)
    for rank in (first, second):
        assert relative_difference(rank["gradients"], expected["gradients"]) < 1e-4
        assert relative_difference(rank["buffers"], expected["buffers"]) < 1e-5


def test_ranks_are_compiled_together_or_not_at_all(ranks: list[Result]) -> None:
    for rank in ranks:
        assert rank["resolve"] == {"compile": False, "notes": ["not compiled, therefore slower: no compiler"]}


# Where nothing can be compiled


def test_code_that_cannot_be_compiled_is_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(function: object) -> None:
        raise RuntimeError("\nno C++ compiler found\nand more lines")

    monkeypatch.setattr(torch, "compile", fail)
    args = parse("--compile", "--activation-budget", "0.5")
    (note,) = compiler.resolve_compile(args, CPU)
    assert note == "not compiled, therefore slower, and with all activations in memory: no C++ compiler found"
    assert args.compile is False


def test_cuda_graphs_with_gradient_accumulation_are_refused() -> None:
    args = parse("--cuda-graphs", "--accum-steps", "2")
    with pytest.raises(UsageError, match="--accum-steps 1"):
        compiler.resolve_compile(args, torch.device("cuda"))
