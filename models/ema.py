"""The EMA pair: copy, freeze, one foreach update."""

import torch
from torch import nn


def copy_and_freeze(student: nn.Module, teacher: nn.Module) -> None:
    """Start the teacher as the student, buffers included, and take it out of the gradient."""
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)


@torch.no_grad()
def ema_update(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """`teacher = momentum * teacher + (1 - momentum) * student`, parameters only.

    Buffers stay: the teacher keeps batch-norm statistics of its own.
    """
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
