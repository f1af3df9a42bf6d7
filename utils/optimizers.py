"""Optimizers that can leave a step out without a look at the device.

All of them follow torch's protocol for that: where the attribute `found_inf`, a scalar tensor on the device, is 1,
`step` leaves parameters and state as they are; by `grad_scale`, where there is one, it divides the gradients first.
"""

import argparse
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.finite import zero_unless_


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling in SlotCon's form.

    `g += wd p`, `g *= trust |p| / |g|` (1 where a norm is 0), `m = momentum m + g`, `p -= lr m`.
    One-dimensional parameters (biases, norms) get neither decay nor trust ratio.
    """

    _step_supports_amp_scaling = True  # tells torch.amp.GradScaler that `step` reads `found_inf` itself

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group)

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads = [p.grad.clone() for p in params if p.grad is not None]
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if grad_scale is not None:
            torch._foreach_div_(grads, grad_scale)
        matrices = [i for i, p in enumerate(params) if p.ndim > 1]
        if matrices:
            _adapt([params[i] for i in matrices], [grads[i] for i in matrices], group)
        buffers = [self._momentum_buffer(p) for p in params]
        lr, momentum = group["lr"], group["momentum"]
        if found_inf is not None:
            go = 1 - found_inf
            zero_unless_(go, grads)
            lr, momentum = lr * go, 1 - (1 - momentum) * go
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, grads)
        torch._foreach_sub_(params, torch._foreach_mul(buffers, lr))

    def _momentum_buffer(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        return state["momentum_buffer"]


def _adapt(params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
    """Decay and trust ratio, in place on the gradients."""
    torch._foreach_add_(grads, params, alpha=group["weight_decay"])
    param_norm = torch.stack(torch._foreach_norm(params))
    grad_norm = torch.stack(torch._foreach_norm(grads))
    ratio = group["trust_coefficient"] * param_norm / grad_norm
    ratio = torch.where((param_norm > 0) & (grad_norm > 0), ratio, 1.0)
    torch._foreach_mul_(grads, list(ratio.unbind()))


def build_optimizer(args: argparse.Namespace, method: nn.Module) -> Optimizer:
    """The optimizer that `args.optimizer` names over the method's trainable parameters.

    The loop sets the learning rate before every step. One-dimensional parameters get no weight decay.
    """
    params = [p for p in method.parameters() if p.requires_grad]
    if args.optimizer == "lars":
        return LARS(params, lr=0.0, momentum=args.momentum, weight_decay=args.weight_decay)
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if args.optimizer == "sgd":
        sgd = torch.optim.SGD(groups, lr=0.0, momentum=args.momentum, fused=True)
        for p in params:  # torch would leave them uninitialized if the very first step were left out
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return sgd
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def skip_if(optimizer: Optimizer, found_inf: Tensor) -> None:
    """Have the next steps leave parameters and state as they are where the scalar tensor `found_inf` is 1."""
    optimizer.found_inf = found_inf  # type: ignore[attr-defined]
