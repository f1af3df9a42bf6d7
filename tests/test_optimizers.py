"""utils/optimizers.py: LARS and clipping against the reference, weight decay by group, skipped steps, resuming."""

import argparse
import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.reference import optimizers as reference
from utils.optimizers import LARS, build_optimizer, clip_gradients, set_hyperparameters, skip_if

SHAPES: list[tuple[int, ...]] = [(4, 3, 2, 2), (5, 6), (1, 1), (7,), (1,)]


def make_parameters(seed: int, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def set_gradients(params: list[nn.Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype) * scale


def build(name: str, params: list[nn.Parameter], weight_decay: float = 0.1) -> Optimizer:
    args = argparse.Namespace(optimizer=name, momentum=0.9, weight_decay=weight_decay)
    optimizer = build_optimizer(args, nn.ParameterList(params))
    set_hyperparameters(optimizer, 1.0, weight_decay)
    return optimizer


def copy_state(optimizer: Optimizer) -> list[Tensor]:
    entries = (entry for state in optimizer.state.values() for entry in state.values())
    return [entry.clone() for entry in entries if isinstance(entry, Tensor)]


@settings(max_examples=30)
@given(
    seed=st.integers(0, 1000),
    lr=st.floats(1e-3, 5),
    momentum=st.sampled_from([0.0, 0.9]),
    weight_decay=st.sampled_from([0.0, 1e-5, 0.1]),
    trust=st.sampled_from([0.001, 0.02]),
)
def test_lars_matches_the_reference(seed: int, lr: float, momentum: float, weight_decay: float, trust: float) -> None:
    params = make_parameters(seed, torch.float64)
    optimizer = LARS(params, lr, momentum=momentum, weight_decay=weight_decay, trust_coefficient=trust)
    values = [param.detach().numpy().copy() for param in params]
    buffers = [np.zeros(shape) for shape in SHAPES]
    for step in range(3):
        set_gradients(params, seed + step)
        rate = optimizer.param_groups[0]["lr"] = lr / (step + 1)
        optimizer.step()
        for i, param in enumerate(params):
            gradient = param.grad.numpy()
            values[i], buffers[i] = reference.lars_step(
                values[i], gradient, buffers[i], rate, momentum, weight_decay, trust
            )
            np.testing.assert_allclose(param.detach(), values[i], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("zero", ["parameter", "gradient"])
def test_lars_trust_ratio_is_one_where_a_norm_is_zero(zero: str) -> None:
    param = nn.Parameter(torch.zeros(3, 4) if zero == "parameter" else torch.ones(3, 4))
    param.grad = torch.zeros(3, 4) if zero == "gradient" else torch.full((3, 4), 2.0)
    LARS([param], 0.5).step()
    assert torch.equal(param.detach(), torch.full((3, 4), -1.0 if zero == "parameter" else 1.0))


def test_lars_leaves_vectors_without_decay_and_parameters_without_gradient() -> None:
    bias, unused = nn.Parameter(torch.full((4,), 10.0)), nn.Parameter(torch.ones(2, 2))
    bias.grad = torch.ones(4)
    LARS([bias, unused], 0.5, weight_decay=0.1).step()
    assert torch.equal(bias.detach(), torch.full((4,), 9.5))
    assert torch.equal(unused.detach(), torch.ones(2, 2))


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_scheduled_weight_decay_reaches_matrices_only(name: str) -> None:
    """Without a gradient, a step moves a parameter by its weight decay alone."""
    params = make_parameters(0)
    optimizer = build(name, params, weight_decay=0.0)
    set_hyperparameters(optimizer, lr=0.5, weight_decay=0.2)
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for param, old in zip(params, before):
        trust = 0.001 / 0.2 if name == "lars" else 1.0  # LARS normalizes 0.2 p to 0.001 |p|
        expected = old * (1 - 0.5 * 0.2 * trust) if param.ndim > 1 else old
        torch.testing.assert_close(param.detach(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("per_parameter", [False, True])
@pytest.mark.parametrize("max_norm", [0.3, 2.0, 1e3])
def test_clipping_matches_the_reference(per_parameter: bool, max_norm: float) -> None:
    params = make_parameters(0, torch.float64)
    set_gradients(params, 0)
    params[1].grad *= 0.01  # a gradient that is clipped with all others, but not on its own
    before = [param.grad.numpy().copy() for param in params]
    norm = clip_gradients(nn.ParameterList(params), max_norm, per_parameter)
    clip = reference.clip_each if per_parameter else reference.clip_global
    assert norm.item() == pytest.approx(np.sqrt(sum((g**2).sum() for g in before)), rel=1e-12)
    for param, expected in zip(params, clip(before, max_norm), strict=True):
        np.testing.assert_allclose(param.grad, expected, rtol=1e-5)  # torch adds 1e-6 to the norm


def test_a_max_norm_of_zero_does_not_clip() -> None:
    params = make_parameters(0)
    set_gradients(params, 0)
    before = [param.grad.clone() for param in params]
    clip_gradients(nn.ParameterList(params), 0.0)
    assert all(torch.equal(param.grad, gradient) for param, gradient in zip(params, before))


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_skipped_step_changes_nothing(name: str, steps_before: int) -> None:
    params, undisturbed = make_parameters(2), make_parameters(2)
    optimizer, expected = build(name, params), build(name, undisturbed)
    for step in range(steps_before):
        for some, other in ((params, optimizer), (undisturbed, expected)):
            set_gradients(some, step)
            other.step()
    values, state = [param.detach().clone() for param in params], copy_state(optimizer)
    for bad in (float("inf"), float("nan")):
        set_gradients(params, 77, scale=bad)
        skip_if(optimizer, torch.tensor(1.0))
        optimizer.step()
        assert all(torch.equal(param, value) for param, value in zip(params, values))
        assert all(torch.equal(a, b) for a, b in zip(copy_state(optimizer)[: len(state)], state))
    skip_if(optimizer, torch.tensor(0.0))
    for some, other in ((params, optimizer), (undisturbed, expected)):
        set_gradients(some, 5)
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(params, undisturbed))


@pytest.mark.parametrize("unscale_first", [True, False])
def test_a_gradient_scaler_skips_overflows_of_lars(unscale_first: bool) -> None:
    params, unscaled = make_parameters(3), make_parameters(3)
    optimizer, expected = LARS(params, 1.0, weight_decay=1e-5), LARS(unscaled, 1.0, weight_decay=1e-5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale(torch.ones(()))  # the scaler creates its scale on first use
    for step in range(4):
        set_gradients(params, step, scaler.get_scale())
        if step == 2:
            params[0].grad.view(-1)[0] = float("inf")
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step != 2:
            set_gradients(unscaled, step)
            expected.step()
        assert all(torch.equal(p, q) for p, q in zip(params, unscaled))  # scales are powers of two
    assert scaler.get_scale() == 2.0**11


def test_a_resumed_optimizer_takes_the_same_next_step() -> None:
    params = make_parameters(4)
    optimizer = LARS(params, 1.0, weight_decay=1e-5)
    for step in range(2):
        set_gradients(params, step)
        optimizer.step()
    restored = [nn.Parameter(param.detach().clone()) for param in params]
    resumed = LARS(restored, 0.123)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for some, other in ((params, optimizer), (restored, resumed)):
        set_gradients(some, 9)
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(params, restored))
