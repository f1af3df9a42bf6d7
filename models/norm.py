"""Batch norm over all ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.heads import RowBatchNorm
from utils.distributed import all_gather_with_gradient


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm of maps whose training statistics are those of all ranks; else, and with one rank, `nn.BatchNorm2d`.

    With several ranks maps have to be on GPUs, with at least one image on each.
    """

    # nn.SyncBatchNorm drops ranks without images by a boolean mask, so that the host waits for the GPU in every
    # forward: some 220 times in a step of ResNet-50. Here every rank has images, and nothing is read back.

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, h, w) -> the same shape and type."""
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        self._check_input_dim(x)
        assert self.num_batches_tracked is not None  # always: statistics are tracked
        self.num_batches_tracked.add_(1)
        if torch.compiler.is_compiling():
            return self._normalize(x)
        return _Normalize.apply(x, self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps)

    def _normalize(self, x: Tensor) -> Tensor:
        """The same in plain operations, which a compiler fuses with their neighbors; all ranks have equal shapes."""
        maps = x.float()
        variance, mean = torch.var_mean(maps, dim=(0, 2, 3), correction=0)
        means, variances = all_gather_with_gradient(torch.stack([mean, variance])[None]).unbind(1)
        mean = means.mean(dim=0)
        variance = variances.mean(dim=0) + (means - mean).square().mean(dim=0)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        with torch.no_grad():
            count = len(means) * x.numel() // x.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return torch.addcmul(self.bias[:, None, None], maps - mean[:, None, None], scale[:, None, None]).to(x.dtype)


def convert_sync_batchnorm(model: nn.Module) -> None:
    """Have batch norm of maps and of rows go over all ranks, in place; parameters and buffers stay the same tensors."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm
        elif isinstance(module, RowBatchNorm):
            module.synchronized = True


def _layout(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


class _Normalize(torch.autograd.Function):
    """Statistics are float32 whatever the type of the maps."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        x = x.contiguous(memory_format=_layout(x))
        channels = x.shape[1]
        mean, invstd = torch.batch_norm_stats(x, eps)
        count = torch.full((1,), x.numel() // channels, dtype=mean.dtype, device=mean.device)
        mine = torch.cat([mean, invstd, count])
        of_ranks = mine.new_empty(dist.get_world_size(), len(mine))
        dist.all_gather_into_tensor(of_ranks, mine[None])
        means, invstds, counts = of_ranks.split([channels, channels, 1], dim=1)
        counts = counts.flatten()
        mean, invstd = torch.batch_norm_gather_stats_with_counts(
            x, means, invstds, running_mean, running_var, momentum, eps, counts
        )
        ctx.save_for_backward(x, weight, mean, invstd, counts.to(torch.int32))
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, counts = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad[:3]
        gradient = gradient.contiguous(memory_format=_layout(x))
        total, total_centered, of_weight, of_bias = torch.batch_norm_backward_reduce(
            gradient, x, mean, invstd, weight, to_x, to_weight, to_bias
        )
        of_x = None
        if to_x:
            totals = torch.cat([total, total_centered])
            dist.all_reduce(totals)
            total, total_centered = totals.chunk(2)
            of_x = torch.batch_norm_backward_elemt(gradient, x, mean, invstd, weight, total, total_centered, counts)
        # Gradients of weight and bias stay those of this rank, as those of all other parameters do before DDP.
        return of_x, of_weight, of_bias, None, None, None, None
