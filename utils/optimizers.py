"""Optimizers that can skip a step without reading the device, their hyperparameters, and gradient clipping.

All optimizers follow torch's protocol for skipping: where the attribute `found_inf`, a scalar tensor on the device, is
1, `step` leaves parameters and state unchanged; it divides the gradients by `grad_scale` first, if that is set.
"""

import argparse
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.finite import zero_unless_


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (arXiv 1708.03888) in the form of SlotCon.

    `g += wd p`, `g *= trust |p| / |g|` (1 where a norm is 0), `m = momentum m + g`, `p -= lr m`. One-dimensional
    parameters (biases, norms) have neither weight decay nor trust ratio.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler then leaves `found_inf` to `step`

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
        """Update all parameters that have a gradient."""
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
            _apply_trust_ratio([params[i] for i in matrices], [grads[i] for i in matrices], group)
        buffers = [self._momentum_buffer(p) for p in params]
        lr, momentum = group["lr"], group["momentum"]
        if found_inf is not None:
            step_ok = 1 - found_inf
            zero_unless_(step_ok, grads)
            lr, momentum = lr * step_ok, 1 - (1 - momentum) * step_ok
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, grads)
        torch._foreach_sub_(params, torch._foreach_mul(buffers, lr))

    def _momentum_buffer(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        return state["momentum_buffer"]


def _apply_trust_ratio(params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
    """Apply weight decay and trust ratio to the gradients in place."""
    torch._foreach_add_(grads, params, alpha=group["weight_decay"])
    param_norm = torch.stack(torch._foreach_norm(params))
    grad_norm = torch.stack(torch._foreach_norm(grads))
    ratio = group["trust_coefficient"] * param_norm / grad_norm
    ratio = torch.where((param_norm > 0) & (grad_norm > 0), ratio, 1.0)
    torch._foreach_mul_(grads, list(ratio.unbind()))


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> Optimizer:
    """Build the optimizer that `args.optimizer` names for the trainable parameters of a model.

    One-dimensional parameters get no weight decay. The learning rate is set before every step by
    `set_hyperparameters`.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    if args.optimizer == "lars":
        groups: list[dict[str, Any]] = [{"params": params, "decays": True}]
        return LARS(groups, lr=0.0, momentum=args.momentum, weight_decay=args.weight_decay)
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": args.weight_decay, "decays": True},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0, "decays": False},
    ]
    if args.optimizer == "sgd":
        sgd = torch.optim.SGD(groups, lr=0.0, momentum=args.momentum, fused=True)
        for p in params:  # torch leaves them uninitialized if the very first step is skipped
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return sgd
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def set_hyperparameters(optimizer: Optimizer, lr: float, weight_decay: float) -> None:
    """Set the learning rate of all parameters, and the weight decay of those that have one."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if group["decays"]:
            group["weight_decay"] = weight_decay


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float, per_parameter: bool = False) -> Tensor:
    """Clip the gradients of a model in place, without reading the device.

    Args:
        model: with averaged, unscaled gradients.
        max_norm: largest norm; 0 disables clipping.
        per_parameter: clip the norm of each parameter on its own, instead of the norm of all gradients together.

    Returns:
        The norm of all gradients before clipping.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    total_norm = torch.nn.utils.get_total_norm(grads)
    if max_norm and per_parameter:
        norms = torch.stack(torch._foreach_norm(grads))
        torch._foreach_mul_(grads, list((max_norm / (norms + 1e-6)).clamp(max=1).unbind()))
    elif max_norm:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, total_norm)
    return total_norm


def skip_if(optimizer: Optimizer, found_inf: Tensor) -> None:
    """Skip the next steps, leaving parameters and state unchanged, where the scalar tensor `found_inf` is 1."""
    optimizer.found_inf = found_inf  # type: ignore[attr-defined]
