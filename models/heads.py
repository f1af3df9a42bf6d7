"""Heads: MLPs on feature maps, on masked rows and on vectors, and 3x3 convolutions with layer norm."""

import itertools
from collections.abc import Callable

import torch.nn.functional as F
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


class ConvBlock(nn.Module):
    """A 3x3 convolution, layer norm over the channels without parameters, and GELU."""

    def __init__(self, dim_in: int, dim_out: int, residual: bool):
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim_out, 3, padding=1)
        self.residual = residual and dim_in == dim_out

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, dim_in, h, w) to (B, dim_out, h, w)."""
        rows = self.conv(features).permute(0, 2, 3, 1)
        # Mixed precision norms in float32; without the conversion, all that follows would stay in it.
        normalized = F.layer_norm(rows, rows.shape[-1:]).to(rows.dtype)
        output = F.gelu(normalized).permute(0, 3, 1, 2)
        return features + output if self.residual else output


class ConvHead(nn.Sequential):
    """Convolutional blocks on a feature map, then a 1x1 convolution: the projector and the predictor of GTSA.

    Args:
        dims: channels of the input, of the output of each block, and of the output of the head.
        residual: whether a block whose input and output have the same number of channels adds its input.
    """

    def __init__(self, dims: tuple[int, ...], residual: bool):
        blocks = [ConvBlock(dim_in, dim_out, residual) for dim_in, dim_out in itertools.pairwise(dims[:-1])]
        super().__init__(*blocks, nn.Conv2d(dims[-2], dims[-1], 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)


class RotationHead(nn.Sequential):
    """Logits of the four rotations from the mean of an encoder's feature map: an MLP with layer norm."""

    def __init__(self, dim_in: int, dims_hidden: tuple[int, int, int] = (768, 768, 128), num_rotations: int = 4):
        first, second, third = dims_hidden
        super().__init__(
            *(nn.Linear(dim_in, first), nn.LayerNorm(first), nn.GELU()),
            *(nn.Linear(first, second), nn.LayerNorm(second), nn.GELU()),
            *(nn.Linear(second, third), nn.LayerNorm(third)),
            nn.Linear(third, num_rotations),
        )
