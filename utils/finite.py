"""Skip optimizer steps whose loss is not finite, without reading the device.

NaN times zero is NaN, so tensors are masked by integer arithmetic on their bits: times one keeps a number, times zero
clears it. That takes a few kernel launches for all tensors together.
"""

import torch
from torch import Tensor, nn

from utils.distributed import all_reduce_sum, rank, world_size


def _as_integers(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.view(torch.int32) for tensor in tensors]


@torch.no_grad()
def zero_unless_(condition: Tensor, tensors: list[Tensor]) -> None:
    """Set float32 tensors to zero in place where the scalar tensor `condition` is 0; keep them where it is 1."""
    torch._foreach_mul_(_as_integers(tensors), condition.to(torch.int32))


@torch.no_grad()
def restore_unless_(condition: Tensor, tensors: list[Tensor], saved: list[Tensor]) -> None:
    """Set float32 tensors to `saved` in place where the scalar tensor `condition` is 0; keep them where it is 1."""
    current, previous = _as_integers(tensors), _as_integers(saved)
    torch._foreach_sub_(current, previous)
    torch._foreach_mul_(current, condition.to(torch.int32))
    torch._foreach_add_(current, previous)


class FiniteGuard:
    """Check the losses of an optimizer step, and restore the buffers of the model if one is not finite.

    The optimizer skips the step by itself when its attribute `found_inf` is set to `1 - step_ok`.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self._buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self._saved = [buffer.clone() for buffer in self._buffers]
        self._bad_ranks = torch.zeros(world_size(), device=device)

    def begin_step(self) -> None:
        """Save the buffers (batch norm statistics, center) before the first forward of a step."""
        if self._buffers:  # a ViT has none
            torch._foreach_copy_(self._saved, self._buffers)
        self._bad_ranks.zero_()

    @torch.no_grad()
    def check_loss(self, loss: Tensor) -> Tensor:
        """Record whether a loss is finite.

        Returns:
            A factor for the loss: 1, or NaN, which makes the gradients NaN on every rank once they are averaged.
        """
        finite = loss.detach().isfinite()
        self._bad_ranks[rank()] += (~finite).float()
        return torch.where(finite, 1.0, torch.nan)

    def end_step(self, gradient_norm: Tensor | None) -> tuple[Tensor, Tensor]:
        """Finish a step after its last backward.

        Args:
            gradient_norm: norm of the averaged gradients; None where a gradient scaler checks them.

        Returns:
            `step_ok`, a scalar: 1, or 0 if a loss or the gradients are not finite.
            `bad_ranks`, (ranks,): 1 for the ranks with a loss that is not finite.
        """
        bad_ranks = all_reduce_sum(self._bad_ranks).clamp(max=1)
        step_ok = 1 - bad_ranks.amax()
        if gradient_norm is not None:
            step_ok = step_ok * gradient_norm.isfinite()
        if self._buffers:
            restore_unless_(step_ok, self._buffers, self._saved)
        return step_ok, bad_ranks
