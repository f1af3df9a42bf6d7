"""Batch norm of feature maps and of masked rows, with statistics over all ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.precision import upcast
from utils.distributed import all_gather_with_gradient, all_reduce_with_gradient


class FastSyncBatchNorm(nn.BatchNorm2d):
    """Batch norm of feature maps over all ranks in training; `nn.BatchNorm2d` in evaluation and with one rank.

    With several ranks the maps have to be on GPUs, with at least one image on each.
    """

    # nn.SyncBatchNorm drops ranks without images by a boolean mask, so that the host waits for the GPU in every
    # forward, about 220 times in a step of ResNet-50. Here every rank has images, and the host reads nothing.

    def forward(self, x: Tensor) -> Tensor:
        """Normalize maps (B, C, h, w); the result has their shape and type."""
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        self._check_input_dim(x)
        assert self.num_batches_tracked is not None  # always: statistics are tracked
        self.num_batches_tracked.add_(1)
        if torch.compiler.is_compiling():
            return self._normalize_compiled(x)
        return _SyncBatchNormFunction.apply(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps
        )

    def _normalize_compiled(self, x: Tensor) -> Tensor:
        """Normalize by elementary operations, which a compiler fuses; all ranks have equal shapes."""
        maps = upcast(x)
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


class RowBatchNorm(nn.Module):
    """Batch norm over the rows that a mask marks; parameters and buffers as in `nn.BatchNorm1d`.

    With `synchronized` the statistics are those of the valid rows of all ranks.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, dim: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.synchronized = False
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Normalize rows (N, dim), of which `mask` (N,) bool marks the valid ones.

        Returns:
            The normalized rows in the type of `rows` (statistics are float32), zeros where not valid; and which are
            valid (N,): those of `mask`, or none where there are too few for statistics.
        """
        x = upcast(rows)
        if self.training:
            keep = mask[:, None]
            count = self._sum_over_ranks(mask.sum().to(x.dtype))
            mean = self._sum_over_ranks(torch.where(keep, x, 0).sum(0)) / count.clamp(min=1)
            variance = self._sum_over_ranks(torch.where(keep, x - mean, 0).square().sum(0)) / count.clamp(min=1)
            self._update_running_statistics(mean.detach(), variance.detach(), count)
            valid = mask & (count > 1)
        else:
            mean, variance, valid = self.running_mean, self.running_var, mask
        normalized = (x - mean) * (variance + self.eps).rsqrt()
        out = normalized * self.weight + self.bias
        return torch.where(valid[:, None], out, 0).to(rows.dtype), valid

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        return all_reduce_with_gradient(value) if self.synchronized else value

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        weight = self.momentum * (count > 1).to(count.dtype)
        unbiased = variance * count / (count - 1).clamp(min=1)
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(unbiased, weight)
        self.num_batches_tracked += 1


def synchronize_batch_norms(model: nn.Module) -> None:
    """Make all `nn.BatchNorm2d` and `RowBatchNorm` of a model compute their statistics over all ranks.

    The model is changed in place; parameters and buffers stay the same tensors.
    """
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = FastSyncBatchNorm
        elif isinstance(module, RowBatchNorm):
            module.synchronized = True


def _memory_format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


class _SyncBatchNormFunction(torch.autograd.Function):
    """The CUDA kernels of nn.SyncBatchNorm; statistics are float32 whatever the type of the maps."""

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
        x = x.contiguous(memory_format=_memory_format(x))
        channels = x.shape[1]
        mean, invstd = torch.batch_norm_stats(x, eps)
        count = torch.full((1,), x.numel() // channels, dtype=mean.dtype, device=mean.device)
        local = torch.cat([mean, invstd, count])
        gathered = local.new_empty(dist.get_world_size(), len(local))
        dist.all_gather_into_tensor(gathered, local[None])
        means, invstds, counts = gathered.split([channels, channels, 1], dim=1)
        counts = counts.flatten()
        mean, invstd = torch.batch_norm_gather_stats_with_counts(
            x, means, invstds, running_mean, running_var, momentum, eps, counts
        )
        ctx.save_for_backward(x, weight, mean, invstd, counts.to(torch.int32))
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, counts = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        gradient = gradient.contiguous(memory_format=_memory_format(x))
        sum_dy, sum_dy_xmu, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
            gradient, x, mean, invstd, weight, needs_x, needs_weight, needs_bias
        )
        grad_x = None
        if needs_x:
            totals = torch.cat([sum_dy, sum_dy_xmu])
            dist.all_reduce(totals)
            sum_dy, sum_dy_xmu = totals.chunk(2)
            grad_x = torch.batch_norm_backward_elemt(gradient, x, mean, invstd, weight, sum_dy, sum_dy_xmu, counts)
        # The gradients of weight and bias are those of this rank: DDP averages them like all others.
        return grad_x, grad_weight, grad_bias, None, None, None, None
