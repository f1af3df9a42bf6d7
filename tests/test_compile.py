"""Compiled code computes the same: in one piece, not compiled again, over ranks, and with fewer activations kept."""

import argparse
import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import main_pretrain
from data.datasets import build_dataset
from data.loader import EpochSampler, build_loader
from data.loader import prefetch
from models import build_method
from models.norm import SyncBatchNorm, convert_sync_batchnorm
from tests.test_distributed import make_batch, on_two_ranks, share
from utils import compiler, distributed
from utils.batch import Batch
from utils.device import choose_device
from utils.errors import UsageError
from utils.finite import FiniteGuard
from utils.meter import Meter
from models.method import Method

Tiny = Callable[..., list[str]]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
METHODS = {
    "slotcon": ["--method", "slotcon"],
    "slotfa paper": ["--method", "slotfa"],
    "slotfa contrast": ["--method", "slotfa", "--group-loss-weight", "0.5", "--fa-train-prototypes"],
    "slotfa released": ["--method", "slotfa", "--no-fa-gradient"],
    "slotfa encoder": ["--method", "slotfa", "--fa-level", "encoder", "--fa-slot-ratio", "0.5"],
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before, and the settings as they were after."""
    torch.compiler.reset()
    suppress, budget = torch._dynamo.config.suppress_errors, torch._functorch.config.activation_memory_budget
    yield
    torch._dynamo.config.suppress_errors, torch._functorch.config.activation_memory_budget = suppress, budget
    torch.compiler.reset()


@pytest.fixture
def working() -> None:
    """A machine that can compile."""
    if obstacle := compiler._obstacle(torch.device("cpu")):
        pytest.skip(f"nothing can be compiled here: {obstacle}")


def in_one_piece(method: Method) -> CompileCounterWithBackend:
    """Compile the method's parts, a graph break being an error; the counter counts the graphs."""
    counter = CompileCounterWithBackend("aot_eager")
    for name in method.compiled:
        setattr(method, name, torch.compile(getattr(method, name), backend=counter, fullgraph=True, dynamic=False))
    return counter


def off(found: list[Tensor], expected: list[Tensor]) -> float:
    """||found - expected|| / ||expected|| over all tensors together."""
    pairs = [(a.double().flatten(), b.double().flatten()) for a, b in zip(found, expected, strict=True)]
    distance = torch.cat([a - b for a, b in pairs]).norm()
    return float(distance / torch.cat([b for _, b in pairs]).norm())


def gradients(method: nn.Module) -> list[Tensor]:
    return [p.grad for p in method.parameters() if p.grad is not None]


# One piece


@pytest.mark.parametrize("flags", METHODS.values(), ids=METHODS)
def test_a_run_compiles_three_graphs_once_and_computes_the_same(flags: list[str], tiny: Tiny) -> None:
    args = main_pretrain.parse_args(tiny(*flags, "--optimizer", "sgd", "--warmup-epoch", "0"))
    plain, compiled = four_steps(args), four_steps(args, in_one_piece)
    assert compiled["graphs"] == 3  # a student's view, a teacher's view, and all that follows
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert off(compiled["weights"], plain["weights"]) < 1e-5


def four_steps(
    args: argparse.Namespace, prepare: Callable[[Method], CompileCounterWithBackend] | None = None
) -> dict[str, Any]:
    """A run of four steps: its losses and what it ends with."""
    device, dataset = choose_device(args), build_dataset(args)
    run = main_pretrain.build_run(args, device, len(dataset))
    counter = prepare(run.method) if prepare else None
    loader = build_loader(dataset, EpochSampler(run.plan, 0, args.seed), 0, pin_memory=False)
    batches, losses = prefetch(loader, device), []
    guard = FiniteGuard(run.method, device)
    for step in range(4):
        meter = Meter(device, len(dataset), run.plan.steps_per_epoch)
        main_pretrain.optimize(run, run.method, batches, guard, meter, step)
        losses.append(meter.read(step + 1)[0]["loss"])
    weights = [value.detach().clone() for value in run.method.state_dict().values()]
    return {"losses": losses, "weights": weights, "graphs": counter and counter.frame_count}


def one_step(args: argparse.Namespace, layout: torch.memory_format, compiled: bool) -> tuple[float, list[Tensor]]:
    """Loss and gradients of one forward and backward."""
    device = choose_device(args)
    method = main_pretrain.build_run(args, device, images=64).method.to(memory_format=layout)
    if compiled:
        in_one_piece(method)
    with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
        loss = method(make_batch().to(device))["loss"]
    loss.backward()
    return loss.item(), gradients(method)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("flags", [METHODS["slotcon"], METHODS["slotfa paper"]], ids=["slotcon", "slotfa"])
def test_the_fast_step_is_the_plain_one_within_what_bfloat16_rounds(flags: list[str], device: str, tiny: Tiny) -> None:
    """Compiled, channels-last and in bfloat16 against eager, NCHW and float32; compiling adds nothing to rounding."""

    def step(amp: str, layout: torch.memory_format, compiled: bool) -> tuple[float, list[Tensor]]:
        words = tiny(*flags, "--device", device, "--amp", amp, "--no-compile")
        return one_step(main_pretrain.parse_args(words), layout, compiled)

    plain, slopes = step("off", torch.contiguous_format, compiled=False)
    rounded, rounded_slopes = step("bf16", torch.contiguous_format, compiled=False)
    fast, fast_slopes = step("bf16", torch.channels_last, compiled=True)
    assert fast == pytest.approx(plain, rel=0.01)
    assert fast == pytest.approx(rounded, rel=0.002)
    assert off(fast_slopes, slopes) < 0.3
    assert off(fast_slopes, slopes) < 1.1 * off(rounded_slopes, slopes)


# The compiler that users get


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("working")
def test_two_hundred_steps_on_the_demo_end_at_the_same_loss(device: str, tmp_path: Path) -> None:
    """On a GPU in bfloat16, as a user has it; chance is the same, so that only rounding differs."""
    flags = ["--dataset", "demo", "--data-dir", str(tmp_path), "--arch", "resnet18", "--image-size", "32"]
    flags += ["--dim-hidden", "32", "--dim-out", "16", "--num-prototypes", "8", "--batch-size", "5", "--base-lr", "8"]
    flags += ["--print-freq", "20", "--epochs", "1", "--warmup-epoch", "0", "--num-workers", "0", "--device", device]
    last: dict[str, float] = {}
    for how in ("--no-compile", "--compile"):
        main_pretrain.main([*flags, how, "--output-dir", str(tmp_path / how)])
        records = [json.loads(line) for line in (tmp_path / how / "metrics.jsonl").read_text().splitlines()]
        assert records[-1]["step"] == 200
        assert records[-1]["loss"] < records[0]["loss"] - 0.05
        last[how] = records[-1]["loss"]
    assert last["--compile"] == pytest.approx(last["--no-compile"], rel=0.02)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("working")
def test_a_smaller_budget_keeps_fewer_activations_and_changes_neither_loss_nor_gradient(
    device: str, tiny: Tiny
) -> None:
    """Running statistics included: what is computed again must not count twice."""
    kept, losses, slopes, buffers = [], [], [], []
    for flags in (["--no-compile"], ["--compile"], ["--compile", "--activation-budget", "0.3"]):
        torch.compiler.reset()
        args = main_pretrain.parse_args(tiny("--device", device, "--amp", "off", *flags))
        method = main_pretrain.build_run(args, choose_device(args), images=8).method
        if device == "cuda":
            torch.set_float32_matmul_precision("highest")
        batch = make_batch().to(device)
        loss, bytes_kept = kept_bytes(method, batch)
        loss.backward()
        kept.append(bytes_kept)
        losses.append(loss.item())
        slopes.append(gradients(method))
        buffers.append([buffer.detach() for buffer in method.buffers()])
    assert kept[2] < 0.6 * kept[1] < 0.6 * kept[0]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)
    assert max(off(slope, slopes[0]) for slope in slopes) < 1e-3
    assert max(off(some, buffers[0]) for some in buffers) < 1e-5


def kept_bytes(method: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """The loss, and how much the forward keeps for the backward besides the parameters."""
    known = {parameter.untyped_storage().data_ptr() for parameter in method.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = method(batch)["loss"]
    return loss, sum(kept.values())


# Over ranks


def normalized(norm: nn.Module, x: Tensor, back: Tensor) -> dict[str, Tensor]:
    x = x.requires_grad_()
    out = norm(x)
    out.backward(back)
    assert isinstance(x.grad, Tensor)
    buffers = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    slopes = {f"{name}.grad": p.grad for name, p in norm.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x.grad": x.grad, **buffers, **slopes}


def maps_and_gradient(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    maps, back = (torch.randn(6, 5, 4, 3, generator=generator) for _ in range(2))
    return (3 * maps + torch.arange(5.0)[:, None, None]).to(dtype), back.to(dtype)


def compiled_norm_on_a_rank(dtype: torch.dtype) -> dict[str, Tensor]:
    norm, (x, back) = SyncBatchNorm(5), maps_and_gradient(dtype)
    mine = slice(0, 3) if distributed.rank() == 0 else slice(3, None)
    return normalized(torch.compile(norm, backend="aot_eager", fullgraph=True), x[mine], back[mine])


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
def test_compiled_batch_norm_over_two_ranks_is_that_of_one_process(
    dtype: torch.dtype, rounding: float, tmp_path: Path
) -> None:
    first, second = on_two_ranks(tmp_path, compiled_norm_on_a_rank, dtype)
    whole = normalized(nn.BatchNorm2d(5), *(x.float() for x in maps_and_gradient(dtype)))
    for name, expected in whole.items():
        of_compiled = name if name in first else f"_orig_mod.{name}"
        if name in ("out", "x.grad"):
            assert first[name].dtype == dtype
            found = torch.cat([first[name], second[name]])
        elif name.endswith("grad"):
            found = first[of_compiled] + second[of_compiled]
        else:
            found = first[of_compiled]
            assert torch.equal(found, second[of_compiled]), name
        assert off([found], [expected]) < rounding, name


def synchronized_step(args: argparse.Namespace) -> dict[str, Any]:
    """Gradients of one DDP step in compiled code, batch norm over all ranks; of one process, in plain code."""
    torch.manual_seed(0)
    method = build_method(args)
    model = distributed.wrap_ddp(method, torch.device("cpu"))
    if distributed.world_size() > 1:
        convert_sync_batchnorm(method)
        in_one_piece(method)
        # Parameters of this size make torch split the graphs where gradients of a larger network are exchanged.
        torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = model.bucket_bytes_cap = 100_000  # type: ignore[assignment]
    out = model(share(make_batch()))
    out["loss"].backward()
    slopes = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    return {"loss": out["loss"].detach(), "gradients": slopes, "buffers": dict(method.named_buffers())}


def test_two_compiled_ranks_have_the_gradient_of_one_process_with_all_images(
    tiny_args: argparse.Namespace, tmp_path: Path
) -> None:
    """With the grouping loss, whose mean over ranks is that over images."""
    args = copy.copy(tiny_args)
    args.group_loss_weight = 1.0
    first, second = on_two_ranks(tmp_path, synchronized_step, args)
    whole = synchronized_step(args)
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, whole["loss"], rtol=1e-5, atol=0)
    for rank in (first, second):
        assert off(list(rank["gradients"].values()), list(whole["gradients"].values())) < 1e-4
        assert off(list(rank["buffers"].values()), list(whole["buffers"].values())) < 1e-5


def resolved_on_a_rank(args: argparse.Namespace) -> dict[str, Any]:
    """What becomes of --compile where rank 1 has no compiler."""
    obstacle = "no compiler" if distributed.rank() == 1 else ""
    compiler._obstacle = lambda device: obstacle
    notes = compiler.resolve(args, torch.device("cpu"))
    return {"compile": args.compile, "notes": notes}


def test_ranks_are_compiled_together_or_not_at_all(tiny: Tiny, tmp_path: Path) -> None:
    args = main_pretrain.parse_args(tiny("--compile"))
    for rank in on_two_ranks(tmp_path, resolved_on_a_rank, args):
        assert rank == {"compile": False, "notes": ["not compiled, and slower for it: no compiler"]}


# Bad luck and bad input


def test_where_nothing_can_be_compiled_a_run_says_so_and_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    """Without a C++ compiler, and without anything compiled earlier."""
    environment = os.environ | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    words = [sys.executable, main_pretrain.__file__, *tiny("--compile")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "CUDA" not in done.stderr
    (note,) = [line for line in done.stderr.splitlines() if line.startswith("not compiled")]
    assert "compiler" in note
    assert "compiled          no" in done.stderr
    assert (tmp_path / "run/current.pth").exists()


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        (["--cuda-graphs"], "--cuda-graphs: only on one GPU"),
        (["--activation-budget", "0.5"], "--activation-budget: works by compilation; add --compile"),
    ],
)
def test_what_only_compiled_code_can_do_is_refused_without(flags: list[str], culprit: str, tiny: Tiny) -> None:
    args = main_pretrain.parse_args(tiny(*flags))
    with pytest.raises(UsageError, match=culprit):
        compiler.resolve(args, choose_device(args))


def test_cuda_graphs_are_refused_with_accumulated_batches(tiny: Tiny) -> None:
    args = main_pretrain.parse_args(tiny("--cuda-graphs", "--accum-steps", "2"))
    with pytest.raises(UsageError, match="--accum-steps 1"):
        compiler.resolve(args, torch.device("cuda"))


def test_a_run_may_be_resumed_compiled_otherwise(tiny: Tiny) -> None:
    main_pretrain.main(tiny("--epochs", "2", "--save-freq", "1"))
    args = main_pretrain.parse_args(tiny("--auto-resume"))
    run = main_pretrain.build_run(args, choose_device(args), images=16)
    run = replace(run, args=argparse.Namespace(**(vars(args) | {"compile": True, "cuda_graphs": True})))
    start, notes = main_pretrain.resume.begin(run)
    assert start == run.plan.total_steps
    assert any("--compile False -> True" in note for note in notes)
