"""The MLP heads, on maps and on rows."""

import torch
from torch import Tensor, nn

from utils.distributed import all_reduce_with_gradient


class MLP(nn.Module):
    """Two hidden layers with batch norm and exact GELU, then a linear layer (SlotCon's projector and predictor).

    With `maps` it is a stack of 1x1 convolutions on (B, dim_in, h, w); without, of linear layers on rows
    (N, dim_in). Among rows, one of all zeros is padding: it takes no part in the batch statistics and comes
    out as zeros, which lets a fixed number of rows hold a varying number of queries. Fewer than two rows have
    no batch statistics: in training mode they come out as zeros, too.
    """

    def __init__(self, dim_in: int, dim_hidden: int, dim_out: int, maps: bool):
        super().__init__()
        self.maps = maps

        def linear(inputs: int, outputs: int) -> nn.Module:
            layer = nn.Conv2d(inputs, outputs, 1) if maps else nn.Linear(inputs, outputs)
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.constant_(layer.bias, 0)  # type: ignore[arg-type]
            return layer

        def norm() -> nn.Module:
            return nn.BatchNorm2d(dim_hidden) if maps else RowBatchNorm(dim_hidden)

        # The indices are those of the published checkpoints: mlp.0, 1, 3, 4, 6.
        self.mlp = nn.Sequential(
            linear(dim_in, dim_hidden),
            norm(),
            nn.GELU(),
            linear(dim_hidden, dim_hidden),
            norm(),
            nn.GELU(),
            linear(dim_hidden, dim_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, dim_in, h, w) -> (B, dim_out, h, w), or rows (N, dim_in) -> (N, dim_out)."""
        if self.maps:
            return self.mlp(x)
        real = x.ne(0).any(dim=1)
        valid = real
        for layer in self.mlp:
            if isinstance(layer, RowBatchNorm):
                x, valid = layer(x, real)
            else:
                x = layer(x)
        return torch.where(valid[:, None], x, 0)


class RowBatchNorm(nn.Module):
    """Batch norm over the rows that `real` marks; parameters and buffers as in `nn.BatchNorm1d`.

    With `synchronized` the statistics are those of the real rows on all ranks.
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

    def forward(self, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (N, dim) and which of them are real (N,), bool.

        Returns:
            The rows, normalized, in the type of `x` (statistics are float32), zeros where not valid; and which are
            valid (N,): the real ones, or none where there are too few for statistics.
        """
        rows = x.float()
        if self.training:
            keep = real[:, None]
            count = self._over_ranks(real.sum().float())
            mean = self._over_ranks(torch.where(keep, rows, 0).sum(0)) / count.clamp(min=1)
            variance = self._over_ranks(torch.where(keep, rows - mean, 0).square().sum(0)) / count.clamp(min=1)
            self._track(mean.detach(), variance.detach(), count)
            valid = real & (count > 1)
        else:
            mean, variance, valid = self.running_mean, self.running_var, real
        normalized = (rows - mean) * (variance + self.eps).rsqrt()
        out = normalized * self.weight + self.bias
        return torch.where(valid[:, None], out, 0).to(x.dtype), valid

    def _over_ranks(self, value: Tensor) -> Tensor:
        return all_reduce_with_gradient(value) if self.synchronized else value

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        weight = torch.where(count > 1, self.momentum, 0.0)
        unbiased = variance * count / (count - 1).clamp(min=1)
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(unbiased, weight)
        self.num_batches_tracked += 1
