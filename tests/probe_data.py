"""Labeled scenes and small checkpoints for the tests of probes and encoders."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import main_pretrain
from data.demo import render_scene
from models import build_method
from tests.helpers import TINY

VOID = 255


def write_image(path: Path, values: Any) -> Path:
    """Write values 0..255, (H, W) or (H, W, 3)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(path)
    return path


def make_folder(root: Path, train: int = 4, val: int = 3) -> Path:
    """Write scenes of 96 x 72 pixels with a void strip, in the layout `folder`."""
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            pixels, mask = render_scene(0, split, number, 96, 72)
            mask[:, 12:20] = VOID
            write_image(root / split / "images" / f"{number}.png", pixels)
            write_image(root / split / "masks" / f"{number}.png", mask)
    return root


def make_method(*flags: str) -> Any:
    """Build a small SlotCon whose teacher differs from its student."""
    args = main_pretrain.parse_args(["--dataset", "folder", "--data-dir", ".", *TINY, *flags])
    torch.manual_seed(1)
    method = build_method(args)
    for name, value in method.state_dict().items():
        if "_k." in name and value.is_floating_point():
            value += 0.01 * torch.rand_like(value)
    return method.eval()


def save_checkpoint(path: Path, *flags: str) -> Path:
    """Save the small method as a pre-training run does."""
    torch.save({"model": make_method(*flags).state_dict(), "args": {"method": "slotcon"}, "epoch": 3}, path)
    return path
