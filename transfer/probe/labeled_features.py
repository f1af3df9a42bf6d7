"""Labeled images in the layouts of common datasets, and their features from a frozen encoder, cached on disk."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from data import demo
from data.datasets import SUFFIXES, check_folder
from transfer.probe import cocostuff
from transfer.probe.image_files import read_image
from utils import distributed
from utils.device import loader_workers
from utils.errors import UsageError
from utils.visualization import normalize

VOID = 255
"""The label of pixels without a class, which no metric counts."""

T = TypeVar("T")
Pairs = list[tuple[Path, Path]]
DenseEncoder = Callable[[Tensor], Tensor]
"""Normalized images (B, 3, S, S) -> features (B, C, h, w)."""

_FLOAT16_MAX = float(np.finfo(np.float16).max)


# Datasets


@dataclass(frozen=True)
class DatasetLayout:
    """The file layout of a labeled dataset, and the meaning of the values in its masks."""

    pairs: Callable[[Path, str], Pairs]
    """Root and name of a split -> sorted pairs of image and mask."""
    classes: Sequence[str] = ()
    """Names of the classes; if empty, the largest value in the masks determines their number."""
    first_value: int = 0
    """The value of the first class; smaller values are void."""
    void_value: int = VOID
    """A value that means void in addition to 255."""
    splits: tuple[str, str] = ("train", "val")
    """The dataset's names of its training and validation split."""


def _paired_folders(
    images: str, masks: str, image_suffix: str = "", mask_suffix: str = ""
) -> Callable[[Path, str], Pairs]:
    """Pair the images of one folder with the masks of another one.

    Args:
        images, masks: the folders below the root, with `{split}` in them.
        image_suffix, mask_suffix: the ends of a pair's names, which are equal up to them.
    """

    def find_pairs(root: Path, split: str) -> Pairs:
        image_root, mask_root = root / images.format(split=split), root / masks.format(split=split)
        pairs = []
        for image in sorted(image_root.rglob("*")):
            if image.suffix.lower() in SUFFIXES and image.stem.endswith(image_suffix):
                mask_name = image.stem.removesuffix(image_suffix) + mask_suffix + ".png"
                pairs.append((image, mask_root / image.parent.relative_to(image_root) / mask_name))
        return [(image, mask) for image, mask in pairs if mask.exists()]

    return find_pairs


def _voc_pairs(root: Path, split: str) -> Pairs:
    name_list = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    names = name_list.read_text().split() if name_list.exists() else []
    return [(root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClass" / f"{name}.png") for name in names]


_VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_CITYSCAPES_CLASSES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "light", "sign", "vegetation", "terrain", "sky"),
    *("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
_CAMVID_CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)

LAYOUTS = {
    "folder": DatasetLayout(_paired_folders("{split}/images", "{split}/masks")),
    "demo": DatasetLayout(_paired_folders("{split}/images", "{split}/masks"), demo.CLASSES),
    "coco-stuff-27": DatasetLayout(_paired_folders("{split}2017", "semantic27/{split}2017"), cocostuff.CLASSES),
    "ade20k": DatasetLayout(
        _paired_folders("images/{split}", "annotations/{split}"),
        [f"class {number}" for number in range(1, 151)],
        first_value=1,
        splits=("training", "validation"),
    ),
    "voc": DatasetLayout(_voc_pairs, _VOC_CLASSES),
    "cityscapes": DatasetLayout(
        _paired_folders("leftImg8bit/{split}", "gtFine/{split}", "_leftImg8bit", "_gtFine_labelTrainIds"),
        _CITYSCAPES_CLASSES,
    ),
    "camvid": DatasetLayout(_paired_folders("{split}", "{split}annot"), _CAMVID_CLASSES, void_value=11),
}
"""Value of --dataset -> layout of the folder --data-dir."""


class SegmentationDataset(Dataset[tuple[Tensor, Tensor]]):
    """One split of a labeled dataset: index -> image (3, S, S) uint8 and labels (S, S) int64, VOID for void.

    An image is resized to a short side of S pixels, of which the center square is taken.

    Args:
        layout_name: a key of `LAYOUTS`.
        root: the dataset's folder; the demo's scenes are drawn there.
        split: `train` or `val`.
        size: S.
        max_images: the number of images to use, the first ones; None for all.
        name_list: a file of image names, one a line, to restrict the split to.
        flag: the flag that gave `root`, for error messages.

    Raises:
        UsageError: `root` is missing, or has no pairs of image and mask; or, at an index, a file cannot be read, a mask
            differs in size from its image, or it holds a value that is no class.
    """

    def __init__(
        self,
        layout_name: str,
        root: Path,
        split: str,
        size: int,
        max_images: int | None = None,
        name_list: Path | None = None,
        flag: str = "--data-dir",
    ):
        self.size, self.split, self.layout = size, split, LAYOUTS[layout_name]
        if layout_name == "demo":
            folder = demo.make_demo(root / "demo", seed=0)
        else:
            check_folder(flag, folder := root)
        pairs = self.layout.pairs(folder, self.layout.splits[split == "val"])
        self.pairs = (_select(pairs, name_list) if name_list else pairs)[:max_images]
        if not self.pairs:
            raise UsageError(
                f"{flag} {root}: no pairs of image and mask of {layout_name}'s {split} split; transfer/probe/README.md "
                "lists the files of each dataset"
            )
        for path in (path for pair in self.pairs for path in pair):
            if not path.is_file():
                raise UsageError(f"{path}: listed in the dataset, but there is no such file")
        self.classes = tuple(self.layout.classes) or self._unnamed_classes()

    def _unnamed_classes(self) -> tuple[str, ...]:
        """Name as many classes as the largest value in the masks implies."""
        masks = (_read_mask(mask) for _, mask in self.pairs)
        largest = max(int(values[values != VOID].max(initial=-1)) for values in masks)
        return tuple(f"class {number}" for number in range(largest + 1))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image_path, mask_path = self.pairs[index]
        image = read_image(image_path, "RGB")
        values = _read_mask(mask_path)
        if values.shape[::-1] != image.size:
            sizes = f"{values.shape[1]} x {values.shape[0]}, its image {image.width} x {image.height}"
            raise UsageError(f"{mask_path}: is {sizes}; a mask needs the size of its image")
        first = self.layout.first_value
        void = (values == VOID) | (values == self.layout.void_value) | (values < first)
        labels = np.where(void, VOID, values - first)
        if (invalid := (labels != VOID) & (labels >= len(self.classes))).any():
            valid = f"0 to {len(self.classes) - 1 + first}, or {VOID}"
            raise UsageError(
                f"{mask_path}: holds the value {values[invalid].max()}; {len(self.classes)} classes are {valid}"
            )
        return _resize_and_center_crop(image, labels, self.size)


def _select(pairs: Pairs, name_list: Path) -> Pairs:
    """Keep the pairs whose image is in a list of names."""
    if not name_list.is_file():
        raise UsageError(f"--val-list {name_list}: no such file")
    names = {Path(name).stem for name in name_list.read_text(errors="replace").split()}
    selected = [pair for pair in pairs if pair[0].stem in names]
    if missing := len(names - {image.stem for image, _ in selected}):
        raise UsageError(f"--val-list {name_list}: {missing} of its {len(names)} names have no image and mask")
    return selected


def _read_mask(path: Path) -> NDArray[np.int64]:
    """Read the values (H, W) of a mask with one channel, or the indices of one with a palette."""
    values = np.array(read_image(path))
    if values.ndim != 2:
        raise UsageError(f"{path}: has {values.shape[-1]} channels; a mask has one, of class indices")
    if values.max(initial=0) > VOID:
        raise UsageError(f"{path}: holds the value {values.max()}; classes are 0 to {VOID - 1}, and {VOID} is void")
    return values.astype(np.int64)


def _resize_and_center_crop(image: Image.Image, labels: NDArray[np.int64], size: int) -> tuple[Tensor, Tensor]:
    """Resize the short side to `size` (bicubic; labels by the nearest pixel) and crop the center square."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    box = (left, top, left + size, top + size)
    pixels = image.resize((width, height), Image.Resampling.BICUBIC).crop(box)
    mask = Image.fromarray(labels.astype(np.int32)).resize((width, height), Image.Resampling.NEAREST).crop(box)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1), torch.from_numpy(np.array(mask)).long()


# Features


@dataclass(frozen=True)
class LabeledFeatures:
    """The feature maps of N images and their labels; both may be memory-mapped files."""

    maps: NDArray[np.float16]
    """(N, h, w, C)."""
    labels: NDArray[np.uint8]
    """(N, S, S), classes and VOID."""

    def positions(self, indices: NDArray[np.int64]) -> Tensor:
        """Return the features (len(indices), C) float32 of positions, numbered over images, rows and columns."""
        return torch.from_numpy(self.maps.reshape(-1, self.maps.shape[3])[indices]).float()

    def soft_labels(self, num_classes: int) -> NDArray[np.float32]:
        """Return the fraction of each position's pixels that each class has: (N, h, w, num_classes).

        The fractions of a position sum to one minus that of its void pixels.
        """
        height, width = self.maps.shape[1:3]
        size = self.labels.shape[1]
        rows, columns = np.arange(size) * height // size, np.arange(size) * width // size
        position_of_pixel = (rows[:, None] * width + columns[None]).ravel()
        pixels_per_position = np.bincount(position_of_pixel, minlength=height * width)
        soft_labels = np.empty((len(self.labels), height, width, num_classes), dtype=np.float32)
        for number, mask in enumerate(self.labels):
            flat = mask.ravel()
            valid = flat != VOID
            bins = position_of_pixel[valid] * num_classes + flat[valid]
            counts = np.bincount(bins, minlength=height * width * num_classes).reshape(-1, num_classes)
            soft_labels[number] = (counts / pixels_per_position[:, None]).reshape(height, width, num_classes)
        return soft_labels


def extract_features(
    network: DenseEncoder,
    dataset: SegmentationDataset,
    cache: Path,
    metadata: dict[str, object],
    device: torch.device,
    batch_size: int = 16,
    num_workers: int = 0,
) -> LabeledFeatures:
    """Return the features of all images, from the cache if `metadata` and the files are the same as before.

    The images are divided over the ranks; every rank returns all features.

    Args:
        cache: a folder, in which each combination of `metadata` and files has its own folder.
        metadata: what identifies the network, such as its checkpoint's hash.

    Raises:
        UsageError: an image or mask is not valid, all pixels are void, or the cache cannot be written.
    """
    files = [[(str(path), path.stat().st_mtime_ns) for path in pair] for pair in dataset.pairs]
    key = json.dumps([metadata, dataset.size, dataset.classes, files], sort_keys=True)
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:24]
    if not (folder / "metadata.json").exists():
        shape = _map_shape(network, dataset.size, device)
        if distributed.is_main_process():
            _create_arrays(folder, len(dataset), shape, dataset.size)
        distributed.barrier()
        _fill_arrays(folder, network, dataset, device, batch_size, num_workers)
        distributed.barrier()
        if distributed.is_main_process():  # written last: it marks the arrays as complete
            content = {**metadata, "images": len(dataset), "first": files[0][0][0]}
            (folder / "metadata.json").write_text(json.dumps(content, indent=2) + "\n")
        distributed.barrier()
    features = LabeledFeatures(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("maps", "labels")))
    if all((labels == VOID).all() for labels in features.labels):
        raise UsageError(f"{dataset.pairs[0][1].parent}: all pixels of its {len(dataset)} masks are void")
    return features


def _map_shape(network: DenseEncoder, size: int, device: torch.device) -> tuple[int, int, int]:
    """Return h, w, C of the features of an image of `size` pixels.

    Raises:
        UsageError: the pixels cannot be divided evenly into positions.
    """
    with torch.inference_mode():
        channels, height, width = network(torch.zeros(1, 3, size, size, device=device)).shape[1:]
    if size % height:
        raise UsageError(f"--size {size}: not divisible into a map of {height} x {width}; use a multiple of the stride")
    return height, width, channels


def _create_arrays(folder: Path, count: int, shape: tuple[int, int, int], size: int) -> None:
    """Allocate the files `maps.npy` and `labels.npy`."""
    required = count * (2 * int(np.prod(shape)) + size**2)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(folder).free) < required:
            space = f"{required / 2**30:.1f} GiB are needed and {free / 2**30:.1f} GiB free"
            raise UsageError(f"--cache {folder}: {space}; use another folder, or fewer images with --train-images")
        np.lib.format.open_memmap(folder / "maps.npy", "w+", np.float16, (count, *shape)).flush()
        np.lib.format.open_memmap(folder / "labels.npy", "w+", np.uint8, (count, size, size)).flush()
    except OSError as error:
        raise UsageError(f"--cache {folder}: cannot be written ({error.strerror}); use another folder") from None


def encode_images(network: DenseEncoder, images: Tensor, device: torch.device) -> NDArray[np.float16]:
    """Return the features (B, h, w, C) of images (B, 3, S, S) uint8, clamped to the range of float16."""
    features = network(normalize(images / 255).to(device)).permute(0, 2, 3, 1)
    return features.float().clamp(-_FLOAT16_MAX, _FLOAT16_MAX).half().cpu().numpy()


def _fill_arrays(
    folder: Path,
    network: DenseEncoder,
    dataset: SegmentationDataset,
    device: torch.device,
    batch_size: int,
    workers: int,
) -> None:
    """Compute this rank's share of the features: every world-size-th image."""
    maps, labels = (np.load(folder / f"{name}.npy", mmap_mode="r+") for name in ("maps", "labels"))
    indices = range(distributed.rank(), len(dataset), distributed.world_size())
    loader = DataLoader(Subset(dataset, indices), batch_size, num_workers=loader_workers(workers))
    done = 0
    with (
        tqdm(
            total=len(indices), unit="image", desc=f"extracting {dataset.split}", disable=not has_progress_bar()
        ) as bar,
        torch.inference_mode(),
    ):
        for images, masks in _unwrap_worker_errors(loader):
            batch = indices[done : done + len(images)]
            maps[batch] = encode_images(network, images, device)
            labels[batch] = masks.numpy()
            done += len(images)
            bar.update(len(images))
    maps.flush()
    labels.flush()


def has_progress_bar() -> bool:
    """Return whether this process shows progress: the main process does on a terminal, but not in a log."""
    return sys.stderr.isatty() and distributed.is_main_process()


def _unwrap_worker_errors(loader: Iterable[T]) -> Iterator[T]:
    """Iterate; a UsageError of a worker process loses the traceback that the loader wraps it in."""
    try:
        yield from loader
    except UsageError as error:
        raise UsageError(str(error).strip().rpartition("utils.errors.UsageError: ")[2]) from None
