"""The exponential moving average (EMA) teacher: copy the student, then follow it."""

import torch
from torch import nn


def copy_and_freeze(student: nn.Module, teacher: nn.Module) -> None:
    """Copy parameters and buffers of the student to the teacher, and exclude the teacher from the gradient."""
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)


@torch.no_grad()
def ema_update(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """Set `teacher = momentum * teacher + (1 - momentum) * student`, parameters only.

    Buffers are left alone: the teacher keeps batch norm statistics of its own.
    """
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
