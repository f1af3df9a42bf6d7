"""Projector and slot predictor against the float64 reference and torch's batch norm; padding rows change nothing."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models.heads import Projector, SlotPredictor
from tests.reference import heads as reference

VALID = [1, 2, 5, 7]
"""The rows that are no padding, of 9."""
MASK = torch.zeros(9, dtype=torch.bool).index_fill(0, torch.tensor(VALID), True)


def build(kind: type[nn.Module], dims: tuple[int, int, int] = (5, 8, 3), seed: int = 0) -> nn.Module:
    """A head in float64 whose weights, biases and batch norm parameters all matter."""
    generator = torch.Generator().manual_seed(seed)
    module = kind(*dims).double().train()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5 + 0.2)
    return module


def parameters_of(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in module.mlp.named_parameters()}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch_norm_mlp(module: nn.Module) -> nn.Sequential:
    """The same MLP from torch's own layers, for rows without padding."""
    layers = (nn.Linear(5, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.GELU())
    mlp = nn.Sequential(*layers, nn.Linear(8, 3)).double().train()
    mlp.load_state_dict(module.mlp.state_dict())
    return mlp


@pytest.mark.parametrize("shape", [(2, 5, 3, 3), (1, 5, 1, 2), (3, 5, 2, 4)])
@pytest.mark.parametrize("scale", [0.01, 1.0], ids=["small", "unit"])
def test_projector_matches_reference(shape: tuple[int, ...], scale: float) -> None:
    """Maps of small variance feel the eps of the batch norm."""
    module, maps = build(Projector), scale * random(*shape)
    expected = reference.mlp_on_maps(maps.numpy(), parameters_of(module))
    np.testing.assert_allclose(module(maps).detach(), expected, rtol=0, atol=1e-10)


@given(
    valid=st.sets(st.integers(0, 11), min_size=2),
    dims=st.tuples(*[st.integers(1, 9)] * 3),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.01, 1.0, 20.0]),
)
@settings(max_examples=40)
def test_valid_rows_of_predictor_match_reference(
    valid: set[int], dims: tuple[int, int, int], seed: int, scale: float
) -> None:
    module, rows = build(SlotPredictor, dims, seed), scale * random(12, dims[0], seed=seed)
    mask = torch.zeros(12, dtype=torch.bool).index_fill(0, torch.tensor(sorted(valid)), True)
    outputs, valid_mask = module(rows, mask)
    assert torch.equal(valid_mask, mask)
    expected = reference.mlp(rows[mask].numpy(), parameters_of(module))
    # Two near rows divide by a deviation of sqrt(eps) = 0.003 at least, once in each of the two batch norms.
    np.testing.assert_allclose(outputs[mask].detach(), expected, rtol=1e-8, atol=1e-8)


def train_step(module: nn.Module, rows: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """The outputs of the valid rows, all gradients and buffers."""
    module, rows = copy.deepcopy(module), rows.clone().requires_grad_()
    outputs, valid = module(rows, MASK)
    (outputs[valid] * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"outputs": outputs[valid].detach(), "rows": rows.grad, **gradients, **dict(module.named_buffers())}


@given(padding=st.lists(st.floats(-1e6, 1e6), min_size=25, max_size=25))
@settings(max_examples=20)
def test_contents_of_padding_rows_change_nothing(padding: list[float]) -> None:
    """Exactly: their statistics and gradients are multiplied by zero."""
    module, rows, weights = build(SlotPredictor), random(9, 5), random(4, 3, seed=1)
    expected = train_step(module, rows, weights)
    rows[~MASK] = torch.tensor(padding, dtype=torch.float64).view(5, 5)
    for name, value in train_step(module, rows, weights).items():
        assert torch.equal(value, expected[name]), name
    assert (expected["rows"][~MASK] == 0).all()


def test_gradients_and_running_statistics_are_those_of_torch_on_the_valid_rows() -> None:
    module, weights = build(SlotPredictor), random(4, 3, seed=1)
    mlp = batch_norm_mlp(module)
    for step in range(3):
        module.zero_grad()
        mlp.zero_grad()
        rows = (3 * random(9, 5, seed=step)).requires_grad_()
        valid_rows = rows.detach()[MASK].requires_grad_()
        (module(rows, MASK)[0][MASK] * weights).sum().backward()
        (mlp(valid_rows) * weights).sum().backward()
        torch.testing.assert_close(rows.grad[MASK], valid_rows.grad, rtol=1e-9, atol=1e-10)
        for ours, theirs in zip(module.parameters(), mlp.parameters()):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-10)
        for (name, ours), theirs in zip(module.named_buffers(), mlp.buffers()):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_valid_rows_become_none_with_zero_gradients_and_unchanged_statistics(count: int) -> None:
    module = build(SlotPredictor)
    before = copy.deepcopy(module.state_dict())
    rows = random(6, 5).requires_grad_()
    outputs, valid = module(rows, torch.arange(6) < count)
    assert not valid.any()
    torch.where(valid[:, None], outputs, 0).square().sum().backward()
    for tensor in (rows, *module.parameters()):
        assert tensor.grad is not None
        assert (tensor.grad == 0).all()
    for name, value in module.state_dict().items():
        assert "num_batches" in name or torch.equal(value, before[name])


def test_evaluation_uses_running_statistics_and_accepts_a_single_row() -> None:
    module = build(SlotPredictor)
    module(random(9, 5), MASK)
    mlp, rows = batch_norm_mlp(module).eval(), random(9, 5, seed=6)
    for mask in (MASK, torch.arange(9) == 4):
        outputs, valid = module.eval()(rows, mask)
        assert torch.equal(valid, mask)
        torch.testing.assert_close(outputs[mask], mlp(rows)[mask], rtol=1e-12, atol=1e-12)


def test_batch_norm_of_rows_has_float32_statistics_under_autocast() -> None:
    module, rows = build(SlotPredictor).float(), random(9, 5)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, _ = module(rows.float(), MASK)
    assert outputs.dtype == torch.bfloat16
    assert all(buffer.dtype == torch.float32 for buffer in module.mlp[1].buffers() if buffer.ndim)
    norm = module.mlp[1]
    normalized, _ = copy.deepcopy(norm).train()(rows[:, :1].repeat(1, 8).bfloat16(), MASK)
    expected, _ = copy.deepcopy(norm).double().train()(rows[:, :1].repeat(1, 8).bfloat16().double(), MASK)
    assert normalized.dtype == torch.bfloat16
    # One rounding to bfloat16, of 2**-9.
    torch.testing.assert_close(normalized.double(), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("kind", [Projector, SlotPredictor])
def test_parameters_have_the_names_shapes_and_initial_values_of_published_checkpoints(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module, kernel = kind(100, 200, 150), (1, 1) if kind is Projector else ()
    linear, norm = {0: (200, 100), 3: (200, 200), 6: (150, 200)}, ("weight", "bias", "running_mean", "running_var")
    expected: dict[str, tuple[int, ...]] = {f"mlp.{i}.weight": (*shape, *kernel) for i, shape in linear.items()}
    expected |= {f"mlp.{i}.bias": shape[:1] for i, shape in linear.items()}
    expected |= {f"mlp.{i}.{name}": (200,) for i in (1, 4) for name in norm}
    expected |= {f"mlp.{i}.num_batches_tracked": () for i in (1, 4)}
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == expected
    for i in linear:
        # 15,000 draws and more: their deviation is known to 0.6 %, their mean to 0.02 / sqrt(15000) = 0.00016.
        assert module.mlp[i].weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert module.mlp[i].weight.mean().item() == pytest.approx(0, abs=0.001)
        assert (module.mlp[i].bias == 0).all()
