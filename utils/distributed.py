"""Processes and what they exchange; every function works with one process, with gloo and with NCCL."""

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


def rank() -> int:
    """This process's number: 0 with one process."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """How many processes there are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def world_size() -> int:
    """How many processes there are on all machines."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def is_main_process() -> bool:
    """Whether this process writes the files and speaks to the user."""
    return rank() == 0


def start(device: torch.device) -> None:
    """Join the other processes that torchrun launched: NCCL between GPUs, gloo between CPUs."""
    if world_size() > 1:
        gpu = device.type == "cuda"
        dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


# Functional collectives return at once, and their result waits for itself when it is first used. Nor do they write
# into a tensor that exists: torch 2.11 compiles an autograd function that does so, in its forward, to wrong gradients.

_gather = getattr(functional, "all_gather_single", functional.all_gather_tensor)  # its name from torch 2.15 on
_finished = functional.wait_tensor


def _all_reduce(tensor: Tensor) -> Tensor:
    return functional.all_reduce(tensor.detach().contiguous(), "sum", _world())


def _all_gather(tensor: Tensor) -> Tensor:
    return _gather(tensor.detach().contiguous(), 0, _world())


def _world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, without gradient; the argument stays as it is."""
    return _finished(_all_reduce(tensor)) if dist.is_initialized() else tensor


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Mean over ranks, without gradient; under way until the result is first used."""
    return _all_reduce(tensor / world_size()) if dist.is_initialized() else tensor


def all_reduce_with_gradient(tensor: Tensor) -> Tensor:
    """Sum over ranks; the gradient is summed as well."""
    return _AllReduce.apply(tensor) if dist.is_initialized() else tensor


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return all_reduce_sum(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient)


def all_gather(tensor: Tensor) -> Tensor:
    """All ranks' tensors (N, ...) one after the other, (ranks * N, ...), without gradient.

    Under way until the result is first used.
    """
    return _all_gather(tensor) if dist.is_initialized() else tensor.detach()


def all_gather_with_gradient(tensor: Tensor) -> Tensor:
    """The same with gradient, which sums over ranks."""
    return _AllGather.apply(tensor) if dist.is_initialized() else tensor


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _finished(_all_gather(tensor))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient).chunk(world_size())[rank()]


def all_gather_object(thing: Any) -> list[Any]:
    """All ranks' picklable objects, in the order of the ranks."""
    if not dist.is_initialized():
        return [thing]
    things: list[Any] = [None] * world_size()
    dist.all_gather_object(things, thing)
    return things


def agree(flags: str, fact: object) -> None:
    """Make sure that `fact`, which follows from `flags`, is the same on all ranks.

    Raises:
        UsageError: on every rank, if it is not.
    """
    if len({repr(other) for other in all_gather_object(fact)}) > 1:
        raise UsageError(f"{flags}: not the same on all machines; give each of them the same files and flags")


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with its gradients averaged over ranks."""
    if not dist.is_initialized():
        return model
    devices = [device] if device.type == "cuda" else None
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # before torch 2.15
    return DistributedDataParallel(model, devices, gradient_as_bucket_view=True, **{buffers: False})  # type: ignore[arg-type]


def no_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Keep gradients on their ranks: for all batches of a step but the last."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def exit_with_error(message: str, status: int = 2) -> NoReturn:
    """End the process with one line on stderr.

    torchrun stops all ranks as soon as one has ended; the others therefore wait until rank 0 has spoken.
    """
    if not is_main_process():
        time.sleep(3)
        message = f"rank {rank()}: {message}"
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    sys.exit(status)
