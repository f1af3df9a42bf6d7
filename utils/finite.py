"""What a non-finite loss must not touch, and who had one; the host never waits for the answer.

NaN times zero is NaN, so a select by arithmetic works on the bits: as integers, times one keeps a number and times
zero clears it. That is a handful of launches for all tensors together.
"""

import torch
from torch import Tensor, nn

from utils.distributed import all_reduce_sum, rank, world_size


def _bits(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.view(torch.int32) for tensor in tensors]


@torch.no_grad()
def zero_unless_(go: Tensor, tensors: list[Tensor]) -> None:
    """Set float32 tensors to zero where the scalar tensor `go` is 0; leave them where it is 1."""
    torch._foreach_mul_(_bits(tensors), go.to(torch.int32))


@torch.no_grad()
def restore_unless_(go: Tensor, tensors: list[Tensor], before: list[Tensor]) -> None:
    """Set float32 tensors back to `before` where the scalar tensor `go` is 0; leave them where it is 1."""
    new, old = _bits(tensors), _bits(before)
    torch._foreach_sub_(new, old)
    torch._foreach_mul_(new, go.to(torch.int32))
    torch._foreach_add_(new, old)


class FiniteGuard:
    """Watches the losses of one optimizer step and undoes its statistics if one was not finite.

    The optimizer leaves the step out by itself when it finds `found_inf` set to `1 - go`.
    """

    def __init__(self, method: nn.Module, device: torch.device):
        self._buffers = [buffer for buffer in method.buffers() if buffer.is_floating_point()]
        self._before = [buffer.clone() for buffer in self._buffers]
        self._bad = torch.zeros(world_size(), device=device)

    def open_step(self) -> None:
        """Remember the buffers (batch-norm statistics, center) before the first forward of a step."""
        torch._foreach_copy_(self._before, self._buffers)
        self._bad.zero_()

    @torch.no_grad()
    def watch(self, loss: Tensor) -> Tensor:
        """Note whether a loss is finite.

        Returns:
            A factor for the loss: 1, or NaN, which makes every gradient NaN, on every rank once they are averaged.
        """
        finite = loss.detach().isfinite()
        self._bad[rank()] += (~finite).float()
        return torch.where(finite, 1.0, torch.nan)

    def close_step(self, gradient_norm: Tensor | None) -> tuple[Tensor, Tensor]:
        """After the last backward, with the norm of the averaged gradients unless somebody else checks them.

        Returns:
            `go`: 1, or 0 if any rank had a bad loss or the gradients are bad.
            `bad`: (ranks,) 1 for the ranks that had a bad loss.
        """
        bad = all_reduce_sum(self._bad).clamp(max=1)
        go = 1 - bad.amax()
        if gradient_norm is not None:
            go = go * gradient_norm.isfinite()
        restore_unless_(go, self._buffers, self._before)
        return go, bad
