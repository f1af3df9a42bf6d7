"""Compiled code: which parts of a method, in what mode, and whether this machine can."""

import argparse
import logging

import torch

from utils import distributed
from utils.config import between
from utils.errors import UsageError
from models.method import Method


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """How the step is carried out; none of it changes what is computed but for rounding."""
    flag = argparse.BooleanOptionalAction
    group.add_argument(
        "--compile", action=flag, default=None, help="compile the step: a slow start, then faster; default: on GPUs"
    )
    group.add_argument(
        "--cuda-graphs",
        action=flag,
        default=False,
        help="replay a step's launches, for small batches: one GPU, compiled",
    )
    group.add_argument(
        "--activation-budget",
        type=between(0, 1),
        default=1.0,
        help="share of the activations that compiled code keeps for the backward; it computes the others again",
    )


def resolve(args: argparse.Namespace, device: torch.device) -> list[str]:
    """Set `args.compile` to what is asked for or, if nothing is, fits the device.

    Returns:
        What a user has to know.

    Raises:
        UsageError: a flag asks for what only compiled code, or only a GPU, can do.
    """
    if args.compile is None:
        args.compile = device.type == "cuda"
    if args.cuda_graphs and (device.type != "cuda" or distributed.world_size() > 1 or args.accum_steps > 1):
        raise UsageError("--cuda-graphs: only on one GPU and with --accum-steps 1; leave it out")
    for flag, wanted in (("--cuda-graphs", args.cuda_graphs), ("--activation-budget", args.activation_budget < 1)):
        if wanted and not args.compile:
            raise UsageError(f"{flag}: works by compilation; add --compile")
    if not args.compile:
        return []
    # All ranks or none: compiled ranks exchange other things than plain ones.
    obstacles = distributed.all_gather_object(_obstacle(device))
    if not any(obstacles):
        return ["compiling: the first step takes a minute or more, or seconds where it was compiled before"]
    args.compile = False
    lost = "and slower for it" if args.activation_budget == 1 else "so slower, and all activations are kept"
    return [f"not compiled, {lost}: {next(filter(None, obstacles))}"]


def _obstacle(device: torch.device) -> str:
    """Why nothing can be compiled for `device` here, or nothing."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it wonders at CUDA without a GPU
    try:
        torch.compile(torch.nn.functional.gelu)(torch.ones(2, device=device, requires_grad=True)).sum().backward()
    except Exception as error:  # a compiler is missing, or Triton does not know the GPU: every version raises its own
        torch.compiler.reset()
        return next(line for line in str(error).splitlines() if line.strip())
    return ""


def compile_method(method: Method, args: argparse.Namespace) -> None:
    """Compile the method's parts in place, at their first use.

    With one process, what cannot be compiled then is run as it is, with a warning. With several it is an error.
    """
    torch._dynamo.config.suppress_errors = distributed.world_size() == 1
    torch._functorch.config.activation_memory_budget = args.activation_budget
    mode = "reduce-overhead" if args.cuda_graphs else "default"
    for name in method.compiled:
        setattr(method, name, torch.compile(getattr(method, name), mode=mode, dynamic=False))
