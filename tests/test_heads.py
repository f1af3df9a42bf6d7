"""models/heads.py against the float64 reference, and what padding rows must not change."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models.heads import MLP
from tests.reference import heads as reference
from tests.reference.compare import gradient, relative_error


def build(maps: bool, dims: tuple[int, int, int] = (5, 8, 3), seed: int = 0) -> MLP:
    """An MLP with weights, biases and BN parameters that all matter."""
    generator = torch.Generator().manual_seed(seed)
    module = MLP(*dims, maps=maps)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5 + 0.2)
    return module.train()


def numpy_parameters(module: MLP) -> dict[str, np.ndarray]:
    return {name: value.detach().double().numpy() for name, value in module.mlp.named_parameters()}


def rows_of(count: int, dim: int, seed: int = 0, scale: float = 20.0) -> torch.Tensor:
    """Rows whose spread is far from BN's eps, where two near rows would magnify float32's own rounding."""
    return (torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) + 0.25) * scale


def pad(rows: torch.Tensor, places: list[int], length: int) -> torch.Tensor:
    """`length` rows of zeros with `rows` at `places`."""
    return torch.zeros(length, rows.shape[1]).index_copy(0, torch.tensor(places, dtype=torch.int64), rows)


@pytest.mark.parametrize("dims", [(5, 8, 3), (1, 2, 1), (16, 32, 16)])
@pytest.mark.parametrize("count", [2, 3, 17])
def test_rows_come_out_as_in_the_reference(dims: tuple[int, int, int], count: int) -> None:
    module, rows = build(False, dims), rows_of(count, dims[0])
    assert relative_error(module(rows).detach(), reference.mlp(rows.numpy(), numpy_parameters(module))) < 1e-5


def test_rows_of_little_spread_feel_the_eps_of_batch_norm_as_in_the_reference() -> None:
    module, rows = build(False), rows_of(9, 5, scale=0.01)
    expected = reference.mlp(rows.numpy(), numpy_parameters(module))
    assert relative_error(module(rows).detach(), expected) < 1e-5
    assert relative_error(module(100 * rows).detach(), expected) > 0.01


@pytest.mark.parametrize("shape", [(2, 3, 3), (1, 1, 2), (3, 2, 4)])
def test_maps_come_out_as_in_the_reference(shape: tuple[int, int, int]) -> None:
    B, H, W = shape
    module = build(True)
    maps = (torch.randn(B, 5, H, W, generator=torch.Generator().manual_seed(1)) + 0.25) * 20
    expected = reference.mlp_on_maps(maps.double().numpy(), numpy_parameters(module))
    assert relative_error(module(maps).detach(), expected) < 1e-5


@given(real=st.sets(st.integers(0, 11), min_size=2), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_rows_of_zeros_change_nothing_for_the_others_and_come_out_as_zeros(real: set[int], seed: int) -> None:
    module = build(False, seed=seed)
    places = sorted(real)
    rows = rows_of(len(places), 5, seed)
    found = module(pad(rows, places, 12)).detach()
    assert relative_error(found[places], reference.mlp(rows.numpy(), numpy_parameters(module))) < 1e-5
    padding = [place for place in range(12) if place not in real]
    assert (found[padding] == 0).all()


def test_gradients_with_padding_are_those_of_the_rows_alone() -> None:
    alone, padded = build(False), build(False)
    rows, more = rows_of(4, 5).requires_grad_(True), pad(rows_of(4, 5), [1, 2, 5, 7], 9).requires_grad_(True)
    weights = torch.randn(9, 3, generator=torch.Generator().manual_seed(3))
    (alone(rows) * weights[[1, 2, 5, 7]]).sum().backward()
    (padded(more) * weights).sum().backward()
    assert rows.grad is not None
    assert more.grad is not None
    torch.testing.assert_close(more.grad[[1, 2, 5, 7]], rows.grad, rtol=1e-4, atol=1e-6)
    assert (more.grad[[0, 3, 4, 6, 8]] == 0).all()
    for a, b in zip(alone.parameters(), padded.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("maps", [False, True])
def test_the_gradient_of_the_input_is_the_slope_of_the_reference(maps: bool) -> None:
    module = build(maps, (3, 4, 2), seed=4)
    x = (torch.randn(2, 3, 1, 2) if maps else rows_of(4, 3, seed=5)).requires_grad_(True)
    module(x).sin().sum().backward()
    forward = reference.mlp_on_maps if maps else reference.mlp
    parameters = numpy_parameters(module)
    slope = gradient(lambda place: float(np.sin(forward(place, parameters)).sum()), x.detach().numpy())
    assert x.grad is not None
    assert relative_error(x.grad, slope) < 1e-4


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_rows_come_out_as_zeros_without_gradient_or_trace(count: int) -> None:
    module = build(False)
    before = copy.deepcopy(module.state_dict())
    x = pad(rows_of(count, 5), list(range(count)), 6).requires_grad_(True)
    found = module(x)
    assert (found == 0).all()
    found.square().sum().backward()
    assert x.grad is not None
    assert (x.grad == 0).all()
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert (parameter.grad == 0).all()
    for name, value in module.state_dict().items():
        assert "num_batches" in name or torch.equal(value, before[name])


def test_running_statistics_are_those_of_torch_batch_norm_on_the_real_rows() -> None:
    module = build(False)
    twin = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 8), nn.BatchNorm1d(8))
    twin.load_state_dict({k: v for k, v in module.mlp.state_dict().items() if not k.startswith("6.")})
    for step in range(3):
        rows = rows_of(3 + step, 5, seed=step)
        module(pad(rows, list(range(2, 5 + step)), 9))
        twin(rows)
    for name, value in twin.named_buffers():
        torch.testing.assert_close(module.mlp.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_evaluation_uses_the_running_statistics_and_takes_a_single_row() -> None:
    module = build(False)
    module(rows_of(8, 5))
    module.eval()
    rows = rows_of(3, 5, seed=6)
    together = module(rows)
    assert (together != 0).all()
    for i in range(3):
        torch.testing.assert_close(module(rows[i : i + 1])[0], together[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("maps", [False, True])
def test_parameters_carry_the_names_and_shapes_of_published_checkpoints(maps: bool) -> None:
    def kernel(shape: tuple[int, int]) -> tuple[int, ...]:
        return (*shape, 1, 1) if maps else shape

    expected = {
        "mlp.0.weight": kernel((8, 5)),
        "mlp.0.bias": (8,),
        "mlp.3.weight": kernel((8, 8)),
        "mlp.3.bias": (8,),
        "mlp.6.weight": kernel((3, 8)),
        "mlp.6.bias": (3,),
    }
    for index in (1, 4):
        expected |= {f"mlp.{index}.{name}": (8,) for name in ("weight", "bias", "running_mean", "running_var")}
        expected[f"mlp.{index}.num_batches_tracked"] = ()
    state = MLP(5, 8, 3, maps=maps).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == expected


@pytest.mark.parametrize("maps", [False, True])
def test_weights_start_at_a_standard_deviation_of_two_hundredths_and_biases_at_zero(maps: bool) -> None:
    torch.manual_seed(0)
    module = MLP(200, 200, 200, maps=maps)
    for index in (0, 3, 6):
        assert module.mlp[index].weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert module.mlp[index].weight.mean().item() == pytest.approx(0, abs=0.001)
        assert (module.mlp[index].bias == 0).all()
