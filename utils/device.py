"""Choose device, precision and number of loader workers."""

import argparse
import os
import sys

import torch
from torch import Tensor

from utils import distributed
from utils.errors import UsageError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


def choose_device(args: argparse.Namespace) -> torch.device:
    """Return the device of this process, and set `args.device` and `args.amp` to what was chosen.

    Raises:
        UsageError: a GPU is requested and missing, or a flag needs a GPU and the run is on the CPU.
    """
    gpus = torch.cuda.device_count()
    if args.device == "auto":
        args.device = "cuda" if gpus else "cpu"
    if args.device == "cuda" and not gpus:
        raise UsageError("--device cuda: no GPU found; use --device cpu")
    if args.device == "cuda" and distributed.local_world_size() > gpus:
        raise UsageError(
            f"--device cuda: {distributed.local_world_size()} processes on a node with {gpus} GPUs; use fewer"
        )
    if args.device != "cuda" and getattr(args, "decode", "cpu") == "gpu":  # some commands have no --decode
        raise UsageError(f"--decode gpu: the run is on the {args.device.upper()}; use --decode cpu")
    if args.amp is None:
        args.amp = _best_precision(args.device)
    if args.device == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", distributed.local_rank())
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True
    # TF32 has the 10-bit mantissa of float16, so mixed precision may use it; with --amp off products are float32.
    torch.set_float32_matmul_precision("highest" if args.amp == "off" else "high")
    torch.backends.cudnn.allow_tf32 = args.amp != "off"
    return device


def _best_precision(device: str) -> str:
    if device == "cpu":
        return "off"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def amp_dtype(args: argparse.Namespace) -> torch.dtype | None:
    """Return the dtype of autocast; None for float32."""
    return _DTYPES[args.amp]


def loader_workers(requested: int) -> int:
    """Limit the number of loader workers to the share of this process in the CPU cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(requested, max(1, cores // distributed.local_world_size()))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to `device` without blocking the host."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def memory_gib(device: torch.device) -> float:
    """Return the peak memory in GiB: of a GPU as allocated by torch, of the CPU as resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # does not exist on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
