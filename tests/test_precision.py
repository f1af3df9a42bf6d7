"""What is computed in float32 whatever the networks are computed in, and without waiting for the device."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import main_pretrain
from data.loader import prefetch
from models.alignment import align
from models.grouping import Grouping
from models.losses import distillation, slot_contrast
from utils.device import choose_device
from utils.finite import FiniteGuard
from utils.meter import Meter


def everything() -> list[Tensor]:
    """All operators between the networks' outputs and the loss, on fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 6, 4, 4, generator=generator).bfloat16()
    torch.manual_seed(0)
    slots, scores = Grouping(5, 6, 0.07)(features)
    boxes, flips = torch.tensor([[0.1, 0.2, 0.9, 1.0]]).repeat(3, 1), torch.tensor([True, False, True])
    aligned = align(scores, boxes, flips)
    group = distillation(aligned, aligned.flip(0), torch.zeros(1, 5), 0.1, 0.07, flips)
    rows = slots.flatten(0, 1)
    contrast = slot_contrast(rows, rows.flip(1), torch.arange(len(rows)), 0.2)
    return [slots, scores, aligned, group, contrast]


def test_losses_are_float32_under_autocast() -> None:
    plain = everything()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = everything()
    assert all(value.dtype == torch.float32 for value in mixed)
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("flags", [["--amp", "bf16"], ["--amp", "fp16", "--clip-grad", "1"], ["--optimizer", "adamw"]])
def test_a_step_on_a_gpu_never_waits_for_it(flags: list[str], tiny: Callable[..., list[str]]) -> None:
    args = main_pretrain.parse_args(tiny("--device", "cuda", *flags))
    device = choose_device(args)
    dataset = main_pretrain.data.datasets.build_dataset(args)
    run = main_pretrain.build_run(args, device, len(dataset))
    sampler = main_pretrain.EpochSampler(run.plan, 0, args.seed)
    batches = prefetch(main_pretrain.build_loader(dataset, sampler, 0, pin_memory=True), device)
    guard, meter = FiniteGuard(run.method, device), Meter(device, len(dataset), 4)
    main_pretrain.optimize(run, run.method, batches, guard, meter, 0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        main_pretrain.optimize(run, run.method, batches, guard, meter, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
