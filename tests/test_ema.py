"""models/teacher.py against the reference, and what stays untouched."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models.ema import copy_and_freeze, ema_update
from tests.reference import ema as reference
from tests.reference.compare import relative_error


def network(seed: int) -> nn.Module:
    """Convolution, batch norm with used statistics, and a 0-dimensional parameter."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    module.scale = nn.Parameter(torch.randn(()))
    module(torch.randn(4, 2, 2, 2) + 5)
    return module


@given(momentum=st.floats(0, 1), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_every_teacher_parameter_moves_as_in_the_reference(momentum: float, seed: int) -> None:
    student, teacher = network(seed), network(seed + 1)
    before = copy.deepcopy(teacher)
    ema_update(student, teacher, momentum)
    for q, k, old in zip(student.parameters(), teacher.parameters(), before.parameters()):
        expected = reference.ema(q.detach().numpy(), old.detach().numpy(), momentum)
        assert relative_error(k.detach(), expected) < 1e-5


def test_the_update_leaves_the_student_and_all_batch_norm_statistics_alone() -> None:
    student, teacher = network(0), network(1)
    student_before, teacher_before = copy.deepcopy(student.state_dict()), copy.deepcopy(teacher.state_dict())
    ema_update(student, teacher, 0.5)
    for name, value in student.state_dict().items():
        assert torch.equal(value, student_before[name])
    for name, value in teacher.named_buffers():
        assert torch.equal(value, teacher_before[name])
    assert not torch.equal(student_before["1.running_mean"], teacher_before["1.running_mean"])


@pytest.mark.parametrize(("momentum", "source"), [(1.0, "teacher"), (0.0, "student")])
def test_momentum_one_keeps_the_teacher_and_zero_takes_the_student(momentum: float, source: str) -> None:
    student, teacher = network(2), network(3)
    expected = copy.deepcopy(student if source == "student" else teacher)
    ema_update(student, teacher, momentum)
    for k, value in zip(teacher.parameters(), expected.parameters()):
        assert torch.equal(k, value)


def test_the_teacher_starts_as_a_frozen_copy_with_buffers() -> None:
    student, teacher = network(4), network(5)
    copy_and_freeze(student, teacher)
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, student.state_dict()[name])
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_training_the_student_does_not_move_the_copy() -> None:
    student, teacher = network(6), network(7)
    copy_and_freeze(student, teacher)
    before = copy.deepcopy(teacher.state_dict())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    student(torch.randn(4, 2, 2, 2))
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_teacher_keeps_its_own_mode() -> None:
    student, teacher = network(8).eval(), network(9).train()
    copy_and_freeze(student, teacher)
    ema_update(student, teacher, 0.9)
    assert all(module.training for module in teacher.modules())
