"""What a frozen encoder sees in labeled images, computed once and kept on disk."""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from transfer.probe.labeled import Labeled
from transfer.probe.scores import VOID
from utils import distributed
from utils.config import at_least
from utils.device import loader_workers
from utils.errors import UsageError
from utils.visualization import normalize

T = TypeVar("T")
See = Callable[[Tensor], Tensor]
"""Normalized images (B, 3, S, S) -> features (B, C, h, w)."""

_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Features:
    """N images as an encoder sees them, and their labels."""

    maps: NDArray[np.float16]
    """(N, h, w, C): a cell's channels lie together."""
    labels: NDArray[np.uint8]
    """(N, S, S) classes and VOID."""

    def cells(self, chosen: NDArray[np.int64]) -> Tensor:
        """The features of cells by their numbers over images, rows and columns: (len(chosen), C) float32."""
        return torch.from_numpy(self.maps.reshape(-1, self.maps.shape[3])[chosen]).float()


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """The flags of running an encoder over images."""
    group.add_argument("--cache", type=Path, default=Path("output/features"), help="folder that keeps features")
    group.add_argument("--batch-size", type=at_least(1), default=16, help="images a GPU sees at once")
    group.add_argument("--num-workers", type=at_least(0), default=8, help="processes that decode images, for each GPU")


def extract(
    see: See, labeled: Labeled, args: argparse.Namespace, device: torch.device, facts: dict[str, object]
) -> Features:
    """The features of all images, from the cache where `facts` and the images are the same.

    Every rank sees its share of the images; all get all features.

    Raises:
        UsageError: an image or mask cannot be used, or the disk does not take the features.
    """
    files = [[(str(path), path.stat().st_mtime_ns) for path in pair] for pair in labeled.pairs]
    key = json.dumps([facts, labeled.size, labeled.classes, files], sort_keys=True)
    folder = args.cache / hashlib.sha256(key.encode()).hexdigest()[:24]
    if not (folder / "facts.json").exists():
        _fill(folder, see, labeled, args, device, {**facts, "images": len(labeled), "first": files[0][0][0]})
    found = Features(np.load(folder / "maps.npy", mmap_mode="r"), np.load(folder / "labels.npy", mmap_mode="r"))
    if all((labels == VOID).all() for labels in found.labels):
        raise UsageError(f"{labeled.pairs[0][1].parent}: no labeled pixel in its {len(labeled)} masks, all is void")
    return found


def _fill(
    folder: Path,
    see: See,
    labeled: Labeled,
    args: argparse.Namespace,
    device: torch.device,
    facts: dict[str, object],
) -> None:
    """Write `maps.npy` and `labels.npy`, and `facts.json` once they are whole."""
    size = labeled.size
    shape = _map_shape(see, size, device)
    count = len(labeled)
    if distributed.is_main_process():
        _make_room(folder, 2 * count * int(np.prod(shape)) + count * size**2)
        try:
            np.lib.format.open_memmap(folder / "maps.npy", "w+", np.float16, (count, *shape)).flush()
            np.lib.format.open_memmap(folder / "labels.npy", "w+", np.uint8, (count, size, size)).flush()
        except OSError as error:
            raise UsageError(f"--cache {folder}: cannot be written ({error.strerror}); use another folder") from None
    distributed.barrier()
    maps, labels = (np.load(folder / f"{name}.npy", mmap_mode="r+") for name in ("maps", "labels"))
    own = range(distributed.rank(), count, distributed.world_size())
    loader = DataLoader(Subset(labeled, own), args.batch_size, num_workers=loader_workers(args.num_workers))
    hidden = not (sys.stderr.isatty() and distributed.is_main_process())
    done = 0
    with tqdm(total=len(own), unit="image", desc="features", disable=hidden) as bar, torch.inference_mode():
        for images, truth in _told(loader):
            where = own[done : done + len(images)]
            seen = see(normalize(images / 255).to(device)).permute(0, 2, 3, 1)
            maps[where] = seen.float().clamp(-_LARGEST, _LARGEST).cpu().numpy()
            labels[where] = truth.numpy()
            done += len(images)
            bar.update(len(images))
    maps.flush()
    labels.flush()
    distributed.barrier()
    if distributed.is_main_process():
        (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
    distributed.barrier()


def _map_shape(see: See, size: int, device: torch.device) -> tuple[int, int, int]:
    """h, w, C of what an image of `size` pixels gives.

    Raises:
        UsageError: its cells do not share out the pixels evenly.
    """
    try:
        with torch.inference_mode():
            channels, height, width = see(torch.zeros(1, 3, size, size, device=device)).shape[1:]
    except AssertionError as error:  # timm's ViTs
        raise UsageError(f"--size {size}: not a whole number of patches ({error})") from None
    if size % height:
        raise UsageError(
            f"--size {size}: does not divide into a map of {height} x {width}; use a multiple of the stride"
        )
    return height, width, channels


def _told(loader: Iterable[T]) -> Iterator[T]:
    """What the loader gives; a mistake in a worker without the worker's traceback, which it is wrapped into."""
    try:
        yield from loader
    except UsageError as error:
        raise UsageError(str(error).strip().rpartition("utils.errors.UsageError: ")[2]) from None


def _make_room(folder: Path, size: int) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--cache {folder}: cannot be made ({error.strerror}); use another folder") from None
    if (free := shutil.disk_usage(folder).free) < size:
        need = f"{size / 2**30:.1f} GiB are needed and {free / 2**30:.1f} free"
        raise UsageError(f"--cache {folder}: {need}; use another folder, or fewer images with --train-images")
