"""Distributed training: process group, collectives and DDP; every function works with one process, gloo and NCCL."""

import inspect
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.errors import UsageError
from utils.seeds import derive_seed


def rank() -> int:
    """Return the global rank of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """Return the rank of this process on its node."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """Return the number of processes on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def world_size() -> int:
    """Return the number of processes on all nodes."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def is_main_process() -> bool:
    """Whether this is the process of rank 0, which writes files and logs."""
    return rank() == 0


def initialize(device: torch.device) -> None:
    """Initialize the process group that torchrun launched: NCCL on GPUs, gloo on CPUs."""
    if world_size() > 1:
        gpu = device.type == "cuda"
        dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)


def shutdown() -> None:
    """Destroy the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


# Functional collectives are asynchronous: their result waits for completion when it is first used. Nor do they write
# into an existing tensor: torch 2.11 computes wrong gradients when it compiles an autograd function that does.

_all_gather_single = getattr(functional, "all_gather_single", functional.all_gather_tensor)  # renamed in torch 2.15
_wait = functional.wait_tensor


def _all_reduce(tensor: Tensor) -> Tensor:
    return functional.all_reduce(tensor.detach().contiguous(), "sum", _world())


def _all_gather(tensor: Tensor) -> Tensor:
    return _all_gather_single(tensor.detach().contiguous(), 0, _world())


def _world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum over ranks, without gradient; the argument is not changed."""
    return _wait(_all_reduce(tensor)) if dist.is_initialized() else tensor


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Return the mean over ranks, without gradient; asynchronous until the result is used."""
    return _all_reduce(tensor / world_size()) if dist.is_initialized() else tensor


def all_reduce_with_gradient(tensor: Tensor) -> Tensor:
    """Return the sum over ranks; the gradient is summed over ranks as well."""
    return _AllReduce.apply(tensor) if dist.is_initialized() else tensor


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return all_reduce_sum(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient)


def all_gather(tensor: Tensor) -> Tensor:
    """Concatenate the tensors (N, ...) of all ranks to (ranks * N, ...), without gradient.

    Asynchronous until the result is used.
    """
    return _all_gather(tensor) if dist.is_initialized() else tensor.detach()


def all_gather_with_gradient(tensor: Tensor) -> Tensor:
    """Concatenate the tensors of all ranks; the gradient is summed over ranks."""
    return _AllGather.apply(tensor) if dist.is_initialized() else tensor


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _wait(_all_gather(tensor))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient).chunk(world_size())[rank()]


def all_gather_object(value: Any) -> list[Any]:
    """Return the picklable objects of all ranks in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def check_same_on_all_ranks(flags: str, value: object) -> None:
    """Check that `value`, which follows from `flags`, is the same on all ranks.

    Raises:
        UsageError: on every rank, if it is not.
    """
    if len({repr(other) for other in all_gather_object(value)}) > 1:
        raise UsageError(f"{flags}: not the same on all nodes; give each of them the same files and flags")


def seed_forward(seed: int, step: int, number: int) -> None:
    """Seed torch's generators for batch `number` of a step on this rank: a resumed run repeats its stochastic depth."""
    torch.manual_seed(derive_seed(seed, step, number, rank()))


def wrap_ddp(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap the model in DDP, which averages its gradients over ranks; with one process return the model itself."""
    if not dist.is_initialized():
        return model
    devices = [device] if device.type == "cuda" else None
    parameters = inspect.signature(DistributedDataParallel).parameters
    buffers = (
        "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    )  # until torch 2.14
    return DistributedDataParallel(model, devices, gradient_as_bucket_view=True, **{buffers: False})  # type: ignore[arg-type]


def no_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Skip the averaging of gradients, for all batches of an accumulated step but the last."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def exit_with_error(message: str, status: int = 2) -> NoReturn:
    """Exit with one line on stderr.

    torchrun stops all ranks as soon as one exits, so the other ranks wait until rank 0 has printed its message.
    """
    if not is_main_process():
        time.sleep(3)
        message = f"rank {rank()}: {message}"
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.splitlines())}", file=sys.stderr, flush=True)
    sys.exit(status)
