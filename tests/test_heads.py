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

MASK = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1, 0]).bool()


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


@pytest.mark.parametrize("shape", [(2, 5, 3, 3), (1, 5, 1, 2), (3, 5, 2, 4)])
@pytest.mark.parametrize("scale", [0.01, 1.0])  # with 0.01, the variance is about the eps of the batch norm
def test_projector_matches_reference(shape: tuple[int, ...], scale: float) -> None:
    module, maps = build(Projector), scale * random(*shape)
    expected = reference.mlp_on_maps(maps.numpy(), parameters_of(module))
    np.testing.assert_allclose(module(maps).detach(), expected, rtol=0, atol=1e-10)


@given(
    valid=st.sets(st.integers(0, 11), min_size=2),
    dims=st.tuples(*[st.integers(1, 9)] * 3),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.01, 1.0, 20.0]),
)
@settings(max_examples=30)
def test_valid_rows_of_predictor_match_reference(
    valid: set[int], dims: tuple[int, int, int], seed: int, scale: float
) -> None:
    module, rows = build(SlotPredictor, dims, seed), scale * random(12, dims[0], seed=seed)
    mask = torch.zeros(12, dtype=torch.bool).index_fill(0, torch.tensor(sorted(valid)), True)
    outputs, valid_mask = module(rows, mask)
    assert torch.equal(valid_mask, mask)
    expected = reference.mlp(rows[mask].numpy(), parameters_of(module))
    # Each of the two batch norms divides by at least sqrt(eps) = 0.003, however near the rows are to one another.
    np.testing.assert_allclose(outputs[mask].detach(), expected, rtol=1e-8, atol=1e-8)


@given(padding=st.lists(st.floats(-1e6, 1e6), min_size=25, max_size=25))
@settings(max_examples=20)
def test_contents_of_padding_rows_change_nothing(padding: list[float]) -> None:
    """Exactly, because their terms in statistics and gradients are zeros."""

    def train_step(rows: Tensor) -> dict[str, Tensor]:
        module = build(SlotPredictor)
        outputs, valid = module(rows.requires_grad_(), MASK)
        (outputs[valid] * random(4, 3, seed=1)).sum().backward()
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        return {"outputs": outputs[valid], "rows": rows.grad, **gradients, **dict(module.named_buffers())}

    changed = random(9, 5)
    changed[~MASK] = torch.tensor(padding, dtype=torch.float64).view(5, 5)
    expected = train_step(random(9, 5))
    for name, value in train_step(changed).items():
        assert torch.equal(value, expected[name]), name
    assert (expected["rows"][~MASK] == 0).all()


def test_gradients_and_statistics_are_those_of_torch_batch_norm_on_the_valid_rows() -> None:
    module = build(SlotPredictor)
    layers = [nn.BatchNorm1d(8) if i in (1, 4) else copy.deepcopy(layer) for i, layer in enumerate(module.mlp)]
    mlp = nn.Sequential(*layers).double()
    mlp.load_state_dict(module.mlp.state_dict())
    for step in range(3):
        rows = (3 * random(9, 5, seed=step)).requires_grad_()
        valid_rows = rows.detach()[MASK].requires_grad_()
        outputs, expected = module(rows, MASK)[0][MASK], mlp(valid_rows)
        torch.testing.assert_close(outputs, expected, rtol=1e-9, atol=1e-10)
        outputs.sin().sum().backward()
        expected.sin().sum().backward()
        torch.testing.assert_close(rows.grad[MASK], valid_rows.grad, rtol=1e-9, atol=1e-10)
    for ours, theirs in zip(module.parameters(), mlp.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-10)
    for ours, theirs in zip(module.buffers(), mlp.buffers()):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for mask in (MASK, torch.arange(9) == 4):  # evaluation, also of a single row
        outputs, valid = module.eval()(rows, mask)
        assert torch.equal(valid, mask)
        torch.testing.assert_close(outputs[mask], mlp.eval()(rows)[mask], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_valid_rows_become_none_with_zero_gradients_and_unchanged_statistics(count: int) -> None:
    module, rows = build(SlotPredictor), random(6, 5).requires_grad_()
    before = copy.deepcopy(module.state_dict())
    outputs, valid = module(rows, torch.arange(6) < count)
    assert not valid.any()
    torch.where(valid[:, None], outputs, 0).square().sum().backward()
    assert all((tensor.grad == 0).all() for tensor in (rows, *module.parameters()))
    for name, value in module.state_dict().items():
        assert "num_batches" in name or torch.equal(value, before[name])


def test_row_batch_norm_of_half_precision_rows_has_float32_statistics() -> None:
    norm, rows = build(SlotPredictor).mlp[1], random(9, 8).bfloat16()
    expected, _ = copy.deepcopy(norm)(rows.double(), MASK)
    outputs, _ = norm.float()(rows, MASK)
    assert outputs.dtype == torch.bfloat16
    assert norm.running_mean.dtype == torch.float32
    torch.testing.assert_close(outputs.double(), expected, rtol=2**-8, atol=1e-5)  # rounded once, by 2**-9 at most


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
    for i in linear:  # at least 20,000 draws: standard errors of 0.5 % and 0.00014
        assert module.mlp[i].weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert module.mlp[i].weight.mean().item() == pytest.approx(0, abs=0.001)
        assert (module.mlp[i].bias == 0).all()
