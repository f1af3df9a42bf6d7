"""utils/optimizers.py against the reference, and its behavior under mixed precision and resume."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import optimizers as reference
from tests.reference.compare import relative_error
from utils.optimizers import LARS

SHAPES: list[tuple[int, ...]] = [(4, 3, 2, 2), (5, 6), (1, 1), (7,), (1,)]


def parameters(seed: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def set_gradients(params: list[torch.nn.Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) * scale


@given(
    seed=st.integers(0, 1000),
    lr=st.floats(1e-3, 5),
    momentum=st.sampled_from([0.0, 0.9]),
    weight_decay=st.sampled_from([0.0, 1e-5, 0.1]),
    trust=st.sampled_from([0.001, 0.02]),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_steps_are_those_of_the_reference(
    seed: int, lr: float, momentum: float, weight_decay: float, trust: float
) -> None:
    params = parameters(seed)
    optimizer = LARS(params, lr, momentum=momentum, weight_decay=weight_decay, trust_coefficient=trust)
    values = [param.detach().double().numpy().copy() for param in params]
    buffers = [np.zeros(shape) for shape in SHAPES]
    for step in range(3):
        set_gradients(params, seed + step)
        optimizer.param_groups[0]["lr"] = lr / (step + 1)
        optimizer.step()
        for i, param in enumerate(params):
            values[i], buffers[i] = reference.lars_step(
                values[i], param.grad.numpy(), buffers[i], lr / (step + 1), momentum, weight_decay, trust
            )
            assert relative_error(param.detach(), values[i]) < 1e-5


def test_the_published_defaults_are_momentum_a_tenth_off_one_and_trust_one_thousandth() -> None:
    (param,) = params = parameters(0)[:1]
    value = param.detach().numpy().copy()
    optimizer = LARS(params, 1.0)
    set_gradients(params, 0)
    first, buffer = reference.lars_step(value, param.grad.numpy(), 0 * value, 1.0, 0.9, 0.0, 0.001)
    optimizer.step()
    second, _ = reference.lars_step(first, param.grad.numpy(), buffer, 1.0, 0.9, 0.0, 0.001)
    optimizer.step()
    assert relative_error(param.detach() - torch.from_numpy(value), second - value) < 1e-4


@pytest.mark.parametrize("zero", ["parameter", "gradient"])
def test_the_trust_ratio_is_one_where_a_norm_is_zero(zero: str) -> None:
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(3, 4) * (zero != "parameter"))
    before = param.detach().numpy().copy()
    optimizer = LARS([param], 0.5)
    param.grad = torch.randn(3, 4) * (zero != "gradient")
    optimizer.step()
    expected, _ = reference.lars_step(before, param.grad.numpy(), 0 * before, 0.5, weight_decay=0.0)
    assert relative_error(param.detach(), expected) < 1e-5
    if zero == "parameter":
        assert torch.equal(param.detach(), -0.5 * param.grad)


def test_biases_and_batch_norm_see_neither_decay_nor_trust_ratio() -> None:
    param = torch.nn.Parameter(torch.full((4,), 10.0))
    param.grad = torch.ones(4)
    LARS([param], 0.5, weight_decay=0.1).step()
    assert torch.equal(param.detach(), torch.full((4,), 9.5))


def test_a_parameter_without_gradient_stays() -> None:
    used, unused = parameters(1)[:2]
    before = unused.detach().clone()
    optimizer = LARS([used, unused], 1.0, weight_decay=0.1)
    used.grad = torch.ones_like(used)
    optimizer.step()
    assert torch.equal(unused.detach(), before)


def tensors_of_state(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    entries = (entry for state in optimizer.state.values() for entry in state.values())
    return [entry.clone() for entry in entries if isinstance(entry, torch.Tensor)]


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_step_with_found_inf_changes_nothing_and_the_next_good_one_goes_on(steps_before: int, bad: float) -> None:
    params, undisturbed = parameters(2), parameters(2)
    optimizer, expected = LARS(params, 1.0, weight_decay=0.1), LARS(undisturbed, 1.0, weight_decay=0.1)
    for step in range(steps_before):
        set_gradients(params, step)
        set_gradients(undisturbed, step)
        optimizer.step()
        expected.step()
    values, state = [param.detach().clone() for param in params], tensors_of_state(optimizer)

    set_gradients(params, 77, scale=bad)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(param, value) for param, value in zip(params, values))
    assert all(torch.equal(a, b) for a, b in zip(tensors_of_state(optimizer)[: len(state)], state))

    set_gradients(params, 5)
    set_gradients(undisturbed, 5)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    expected.step()
    assert all(torch.equal(a, b) for a, b in zip(params, undisturbed))


@pytest.mark.parametrize("unscaled_first", [True, False])
def test_a_gradient_scaler_skips_overflows_and_otherwise_steps_as_in_full_precision(
    unscaled_first: bool,
) -> None:
    params, plain = parameters(3), parameters(3)
    optimizer, expected = LARS(params, 1.0, weight_decay=1e-5), LARS(plain, 1.0, weight_decay=1e-5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale(torch.ones(()))  # the scaler makes its scale on first use
    for step in range(5):
        overflow = step == 2
        set_gradients(params, step, scaler.get_scale())
        if overflow:
            params[0].grad.view(-1)[0] = float("inf")
        before = [param.detach().clone() for param in params]
        if unscaled_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            assert all(torch.equal(param, value) for param, value in zip(params, before))
        else:
            set_gradients(plain, step)
            expected.step()
            assert all(relative_error(p.detach(), q.detach()) < 1e-6 for p, q in zip(params, plain))
    assert scaler.get_scale() == 2.0**11


def test_a_resumed_optimizer_takes_the_same_next_step() -> None:
    params = parameters(4)
    optimizer = LARS(params, 1.0, weight_decay=1e-5)
    for step in range(2):
        set_gradients(params, step)
        optimizer.step()
    others = [torch.nn.Parameter(param.detach().clone()) for param in params]
    resumed = LARS(others, 0.123)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    set_gradients(params, 9)
    set_gradients(others, 9)
    optimizer.step()
    resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(params, others))
