"""MLP heads: the projector on feature maps and the slot predictor on masked rows."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.precision import upcast
from utils.distributed import all_reduce_with_gradient


class Projector(nn.Module):
    """Two hidden layers with batch norm and exact GELU, then a linear layer, as 1x1 convolutions on a feature map."""

    def __init__(self, dim_in: int, dim_hidden: int, dim_out: int):
        super().__init__()
        self.mlp = _mlp((dim_in, dim_hidden, dim_out), lambda ins, outs: nn.Conv2d(ins, outs, 1), nn.BatchNorm2d)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, dim_in, h, w) to (B, dim_out, h, w)."""
        return self.mlp(features)


class SlotPredictor(nn.Module):
    """The same MLP on rows, some of which are padding.

    Masked rows take no part in the batch statistics, so that a fixed number of rows holds a varying number of queries.
    """

    def __init__(self, dim_in: int, dim_hidden: int, dim_out: int):
        super().__init__()
        self.mlp = _mlp((dim_in, dim_hidden, dim_out), nn.Linear, RowBatchNorm)

    def forward(self, rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Map rows (N, dim_in), of which `mask` (N,) bool marks the valid ones.

        Returns:
            (N, dim_out), meaningful where the second result, (N,) bool, is true. In training mode a single valid row
            has no batch statistics: then no row is valid.
        """
        valid = mask
        for layer in self.mlp:
            if isinstance(layer, RowBatchNorm):
                rows, valid = layer(rows, mask)
            else:
                rows = layer(rows)
        return rows, valid


def _mlp(
    dims: tuple[int, int, int], linear: Callable[[int, int], nn.Module], norm: Callable[[int], nn.Module]
) -> nn.Sequential:
    """Build the layers; their indices are those of the published checkpoints: mlp.0, 1, 3, 4, 6."""
    dim_in, dim_hidden, dim_out = dims

    def init(layer: nn.Module) -> nn.Module:
        nn.init.trunc_normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
        nn.init.constant_(layer.bias, 0)  # type: ignore[arg-type]
        return layer

    return nn.Sequential(
        init(linear(dim_in, dim_hidden)),
        norm(dim_hidden),
        nn.GELU(),
        init(linear(dim_hidden, dim_hidden)),
        norm(dim_hidden),
        nn.GELU(),
        init(linear(dim_hidden, dim_out)),
    )


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
