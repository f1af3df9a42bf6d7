"""The EMA teacher: every parameter moves, and nothing else does."""

import copy

import pytest
import torch
from torch import nn

from models.ema import copy_and_freeze, ema_update


def network(seed: int) -> nn.Module:
    """A network with used batch norm statistics and a 0-dimensional parameter."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    module.scale = nn.Parameter(torch.randn(()))
    module(torch.randn(4, 2, 2, 2) + 5)
    return module.double()


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.99, 1.0])
def test_update_averages_parameters_and_leaves_student_and_buffers_alone(momentum: float) -> None:
    student, teacher = network(0), network(1)
    student_before, teacher_before = copy.deepcopy(student.state_dict()), copy.deepcopy(teacher.state_dict())
    ema_update(student, teacher, momentum)
    for name, value in student.state_dict().items():
        assert torch.equal(value, student_before[name])
    parameters = dict(teacher.named_parameters())
    for name, value in teacher.state_dict().items():
        before = teacher_before[name]
        expected = momentum * before + (1 - momentum) * student_before[name] if name in parameters else before
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-14 if name in parameters else 0)


def test_teacher_starts_as_a_frozen_copy_that_shares_no_memory() -> None:
    student, teacher = network(4), network(5)
    copy_and_freeze(student, teacher)
    before = copy.deepcopy(student.state_dict())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    student(torch.randn(4, 2, 2, 2, dtype=torch.float64))
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())
