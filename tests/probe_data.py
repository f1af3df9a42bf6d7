"""Labeled images and small checkpoints for the tests of probes, encoders and fine-tunings."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import main_pretrain
from data.demo import render_scene
from models import build_method
from tests.checkpoint_data import RELEASED_GTSA
from tests.helpers import TINY, make_image

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


def make_inat19(root: Path) -> None:
    """Write three images of the categories 7 and 30, in the layout of iNaturalist 2019."""
    names = {11: "train_val2019/Birds/30/a.jpg", 5: "train_val2019/Plants/7/b.jpg", 8: "train_val2019/Plants/7/c.jpg"}
    for number, name in names.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        make_image(40, 30, number).save(root / name)
    categories = {11: 30, 5: 7, 8: 7}
    content = {
        "images": [{"id": number, "file_name": name} for number, name in names.items()],
        "annotations": [{"id": n, "image_id": n, "category_id": categories[n]} for n in (5, 8, 11)],
    }
    for split in ("train", "val"):
        (root / f"{split}2019.json").write_text(json.dumps(content))


def make_method(*flags: str) -> Any:
    """Build a small SlotCon whose teacher differs from its student."""
    args = main_pretrain.parse_args(["--dataset", "folder", "--data-dir", ".", *TINY, *flags])
    torch.manual_seed(1)
    method = build_method(args)
    for name, value in method.state_dict().items():
        if "_k." in name and value.is_floating_point():
            value += 0.01 * torch.rand_like(value)
    return method.eval()


def make_vit_method(method: str) -> Any:
    """Build GTSA, or a small SlotCon, with a small ViT."""
    argv = ["--dataset", "folder", "--data-dir", ".", "--device", "cpu", *([] if method == "gtsa" else TINY)]
    args = main_pretrain.parse_args([*argv, "--method", method, "--arch", "vit_tiny_patch16_224"])
    torch.manual_seed(1)
    return build_method(args).eval()


def save_vit_checkpoint(path: Path, method: str, released: bool = False) -> Path:
    """Save a method with a ViT, as a pre-training run or the authors of GTSA do."""
    weights = make_vit_method(method).state_dict()
    if released:
        released_names = {ours: theirs for theirs, ours in RELEASED_GTSA.items()}
        renamed = {}
        for name, value in weights.items():
            part, _, rest = name.partition(".")
            renamed[f"module.{released_names[part]}.{rest}"] = value
        torch.save({"state_dict": renamed}, path)
    else:
        torch.save({"model": weights, "args": {"method": method}, "epoch": 3}, path)
    return path


def save_checkpoint(path: Path, *flags: str) -> Path:
    """Save the small method as a pre-training run does."""
    torch.save({"model": make_method(*flags).state_dict(), "args": {"method": "slotcon"}, "epoch": 3}, path)
    return path
