"""What is computed in float32 whatever the networks are computed in, and without waiting for the device."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import main_pretrain
from data.datasets import build_dataset
from data.loader import EpochSampler, build_loader, prefetch
from models.alignment import align
from models.grouping import Grouping
from models.losses import distillation, slot_contrast
from utils.device import choose_device
from utils.finite import FiniteGuard
from utils.meter import Meter


def compute_all() -> list[Tensor]:
    """Apply all operators between the outputs of the networks and the loss to fixed inputs in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 6, 4, 4, generator=generator).bfloat16()
    torch.manual_seed(0)
    slots, scores = Grouping(5, 6, 0.07)(features)
    boxes, flips = torch.tensor([[0.1, 0.2, 0.9, 1.0]]).repeat(3, 1), torch.tensor([True, False, True])
    aligned = align(scores, boxes, flips)
    group = distillation(aligned, aligned.flip(0), torch.zeros(1, 5), 0.1, 0.07, flips)
    rows = slots.flatten(0, 1)
    mask = torch.arange(len(rows)) % 4 != 1
    contrast = slot_contrast(rows, mask, rows.flip(1), mask, torch.arange(len(rows)), 0.2)
    return [slots, scores, aligned, group, contrast]


def test_losses_are_float32_under_autocast() -> None:
    expected = compute_all()
    with torch.autocast("cpu", torch.bfloat16):
        results = compute_all()
    assert all(value.dtype == torch.float32 for value in results)
    assert all(torch.equal(a, b) for a, b in zip(results, expected))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("flags", [["--amp", "bf16"], ["--amp", "fp16", "--clip-grad", "1"], ["--optimizer", "adamw"]])
def test_gpu_step_does_not_synchronize(flags: list[str], tiny: Callable[..., list[str]]) -> None:
    args = main_pretrain.parse_args(tiny("--device", "cuda", "--no-compile", *flags))
    device, dataset = choose_device(args), build_dataset(args)
    run = main_pretrain.build_run(args, device, len(dataset))
    loader = build_loader(dataset, EpochSampler(run.plan, 0, args.seed), 0, pin_memory=True)
    batches = prefetch(loader, device)
    guard, meter = FiniteGuard(run.method, device), Meter(device, len(dataset), run.method.build_monitor(2))
    main_pretrain.train_step(run, run.method, batches, guard, meter, 0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        main_pretrain.train_step(run, run.method, batches, guard, meter, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
