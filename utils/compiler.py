"""Compile parts of the training step with torch.compile; run eagerly where the machine cannot compile."""

import argparse
import logging
from collections.abc import Sequence

import torch
from torch import nn

from utils import distributed
from utils.config import between
from utils.errors import UsageError


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags of compilation, which change results by rounding alone."""
    optional = argparse.BooleanOptionalAction
    group.add_argument(
        "--compile", action=optional, default=None, help="compile the training step; default: on GPUs only"
    )
    group.add_argument(
        "--cuda-graphs",
        action=optional,
        default=False,
        help="capture the step in CUDA graphs, for small batches; needs --compile and one GPU",
    )
    group.add_argument(
        "--activation-budget",
        type=between(0, 1),
        default=1.0,
        help="share of the activations that compiled code keeps for the backward; it recomputes the others",
    )


def resolve_compile(args: argparse.Namespace, device: torch.device) -> list[str]:
    """Set `args.compile` to whether this run is compiled.

    Returns:
        Messages for the user.

    Raises:
        UsageError: a flag needs compilation or a GPU, and the run has none.
    """
    if args.compile is None:
        args.compile = device.type == "cuda"
    if args.cuda_graphs and (device.type != "cuda" or distributed.world_size() > 1 or args.accum_steps > 1):
        raise UsageError("--cuda-graphs: only on one GPU and with --accum-steps 1; omit it")
    for flag, is_set in (("--cuda-graphs", args.cuda_graphs), ("--activation-budget", args.activation_budget < 1)):
        if is_set and not args.compile:
            raise UsageError(f"{flag}: only with compilation; add --compile")
    if not args.compile:
        return []
    # All ranks or none, because compiled and eager code have different collectives.
    errors = distributed.all_gather_object(_compile_error(device))
    if not any(errors):
        return ["compiling: the first step takes a minute or more, or seconds if it is in the compiler's cache"]
    args.compile = False
    cost = "slower" if args.activation_budget == 1 else "slower, and with all activations in memory"
    return [f"not compiled, therefore {cost}: {next(filter(None, errors))}"]


def _compile_error(device: torch.device) -> str:
    """Return why code cannot be compiled for `device`, or an empty string."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of CUDA without a GPU
    try:
        torch.compile(torch.nn.functional.gelu)(torch.ones(2, device=device, requires_grad=True)).sum().backward()
    except Exception as error:  # a missing compiler and an unsupported GPU raise different exceptions by version
        torch.compiler.reset()
        return next(line for line in str(error).splitlines() if line.strip())
    return ""


def compile_methods(module: nn.Module, names: Sequence[str], args: argparse.Namespace) -> None:
    """Compile the methods `names` of a module in place; compilation happens at their first call.

    With one process, code that cannot be compiled runs eagerly, with a warning. With several it is an error.
    """
    torch._dynamo.config.suppress_errors = distributed.world_size() == 1
    torch._functorch.config.activation_memory_budget = args.activation_budget
    torch._inductor.config.fallback_random = True  # stochastic depth draws the same numbers as eager code
    mode = "reduce-overhead" if args.cuda_graphs else "default"
    for name in names:
        setattr(module, name, torch.compile(getattr(module, name), mode=mode, dynamic=False))
