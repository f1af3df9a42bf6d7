"""Helpers of several test modules: flags of small runs, batches, expected usage errors, and two ranks."""

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch import nn

from models import METHODS, build_method
from models.backbones import Encoder
from models.vit import ViTEncoder
from utils import distributed
from utils.batch import Batch, ViewRecord

_TINY = ["--arch", "resnet18", "--image-size", "64", "--device", "cpu", "--num-workers", "0"]
_TINY += ["--batch-size", "8", "--epochs", "2", "--warmup-epoch", "1"]
_DIMS = ["--dim-hidden", "32", "--dim-out", "16"]
_TINY_METHODS = {
    "slotcon": [*_DIMS, "--num-prototypes", "8"],
    "slotfa": [*_DIMS, "--num-prototypes", "8"],
    "gtsa": [*_DIMS, "--local-size", "32", "--local-views", "2", "--correspondence-epoch", "1"],
}


def tiny_flags(*flags: str) -> list[str]:
    """Return the flags of a small run, followed by `flags`: four steps on the 16 images of the fixture `images`."""
    method = flags[flags.index("--method") + 1] if "--method" in flags[:-1] else "slotcon"
    return [*_TINY, *_TINY_METHODS.get(method, []), *flags]


TINY = tiny_flags()
"""The flags of a small run of SlotCon."""

METHOD_FLAGS = {
    "slotcon": ["--method", "slotcon"],
    "slotfa_paper": ["--method", "slotfa"],
    "slotfa_contrast": ["--method", "slotfa", "--group-loss-weight", "0.5", "--fa-train-prototypes"],
    "slotfa_released": ["--method", "slotfa", "--no-fa-gradient"],
    "slotfa_encoder": ["--method", "slotfa", "--fa-level", "encoder", "--fa-slot-ratio", "0.5"],
    "gtsa": ["--method", "gtsa"],
}
"""The flags of every method and preset."""


class SmallEncoder(Encoder, nn.Sequential):
    """An encoder that costs nearly nothing; the fixture `small_encoder` puts it in the place of a ResNet."""

    width, stride = 12, 8

    def __init__(self, *_options: object) -> None:
        super().__init__(nn.Conv2d(3, self.width, 8, 8), nn.BatchNorm2d(self.width), nn.ReLU())


def build_small_vit(_arch: str, _output_stride: int = 32, drop_path: float = 0.0) -> ViTEncoder:
    """Build a ViT of two blocks with patches of 16 px, in the place of `build_encoder`."""
    sizes = {"patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
    vit = ViTEncoder(**sizes, dynamic_img_size=True, drop_path_rate=drop_path)
    vit.width, vit.stride = 24, 16
    return vit


@contextmanager
def use_small_encoder(build: Callable[..., Encoder] = SmallEncoder) -> Iterator[None]:
    """Build the encoders of all methods as `SmallEncoder`, or by `build`."""
    with patch("models.slotcon.build_encoder", build), patch("models.gtsa.build_encoder", build):
        yield


def build_small_method(args: argparse.Namespace, build: Callable[..., Encoder] = SmallEncoder) -> Any:
    """Build a method with `SmallEncoder` or `build`, also in other processes, where fixtures have no effect."""
    with use_small_encoder(build):
        return build_method(args)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_expecting_usage_error(
    main: Callable[[list[str]], None], argv: list[str], capsys: pytest.CaptureFixture[str]
) -> str:
    """Run a command, expect exit status 2 and a single line on stderr, and return that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    return output.err


def make_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Draw soft colored forms with edges, noise, and black and white in them."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    forms = np.array(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    forms[height // 4 : height // 2, width // 3 :] = 255 - forms[height // 4 : height // 2, width // 3 :]
    pixels = 1.2 * (forms - 128) + 128 + rng.normal(0, 8, forms.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_batch(num_images: int = 6, sizes: Sequence[int] = (64, 64), seed: int = 3) -> Batch:
    """Make a batch of noise whose views, of the given sides, overlap in every image; half of them are flipped."""
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(num_images, 3, size, size, generator=generator) for size in sizes]
    number = torch.arange(len(sizes), dtype=torch.float32)[:, None] % 3
    crops = torch.tensor([[0.0, 0.0, 60.0, 60.0]]) + number * torch.tensor([[20.0, 10.0, 30.0, 20.0]])
    flips = torch.rand(num_images, len(sizes), generator=generator) < 0.5
    rotations = torch.zeros(num_images, len(sizes), dtype=torch.int64)
    return Batch(views, crops.repeat(num_images, 1, 1), flips, rotations, torch.arange(num_images))


def make_method_batch(args: argparse.Namespace, num_images: int = 6, seed: int = 3) -> Batch:
    """Make a batch as `make_batch` does, with the sizes, flips and rotations of the views of a method."""
    recipes = METHODS[args.method].view_recipes(args)
    batch = make_batch(num_images, [recipe.size for recipe in recipes], seed)
    generator = torch.Generator().manual_seed(seed)
    quarters = torch.randint(4, batch.rotations.shape, generator=generator)
    flips = batch.flips & torch.tensor([recipe.flip_p > 0 for recipe in recipes])
    return replace(batch, flips=flips, rotations=quarters * torch.tensor([recipe.rotate for recipe in recipes]))


def shard(batch: Batch) -> Batch:
    """Return the images of this rank: an equal share, or all of them with one process."""
    count = len(batch.index) // distributed.world_size()
    rows = slice(distributed.rank() * count, (distributed.rank() + 1) * count)

    def select(value: Any) -> Any:
        return [view[rows] for view in value] if isinstance(value, list) else value[rows]

    values = {item.name: getattr(batch, item.name) for item in fields(ViewRecord)}
    return replace(batch, **{name: select(value) for name, value in values.items() if value is not None})


def run_on_two_ranks(function: Callable[..., dict[str, Any]], *args: Any) -> list[dict[str, Any]]:
    """Call a function of a module, with these arguments, in two processes of one gloo group; return both results."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_run_on_rank, (folder, function, args), nprocs=2, start_method=_start_method())
        return [torch.load(Path(folder, f"{rank}.pth"), weights_only=True) for rank in range(2)]


def _start_method() -> str:
    """Choose the server that imports torch once and forks each process, where the platform has it."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.set_forkserver_preload(["main_pretrain", "pytest", "hypothesis"])
    return "forkserver"


def _run_on_rank(rank: int, folder: str, function: Callable[..., dict[str, Any]], args: tuple[Any, ...]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    torch.save(function(*args), Path(folder, f"{rank}.pth"))
    dist.destroy_process_group()
