"""The precision of losses and statistics under mixed precision."""

import torch
from torch import Tensor


def upcast(tensor: Tensor) -> Tensor:
    """Convert bfloat16 and float16 to float32; float32 and float64 are returned as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
