"""MLP heads: the projector on feature maps and the slot predictor on masked rows."""

from collections.abc import Callable

from torch import Tensor, nn

from models.norm import RowBatchNorm


class Projector(nn.Module):
    """Two hidden layers with batch norm and exact GELU, then a linear layer, as 1x1 convolutions on a feature map."""

    def __init__(self, dim_in: int, dim_hidden: int, dim_out: int):
        super().__init__()
        self.mlp = _mlp((dim_in, dim_hidden, dim_out), lambda ins, outs: nn.Conv2d(ins, outs, 1), nn.BatchNorm2d)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, dim_in, h, w) to (B, dim_out, h, w)."""
        return self.mlp(features)


class SlotPredictor(nn.Module):
    """The MLP of `Projector` on rows (N, D), some of which are padding.

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
        for layer in self.mlp:
            if isinstance(layer, RowBatchNorm):
                rows, mask = layer(rows, mask)
            else:
                rows = layer(rows)
        return rows, mask


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
