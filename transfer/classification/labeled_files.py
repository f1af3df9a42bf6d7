"""The image files of the splits of a labeled dataset, by class."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from data.datasets import check_folder, evenly_spaced
from utils.errors import UsageError

DATASETS = ("folder", "inat19")


@dataclass(frozen=True)
class LabeledFiles:
    """The image files of a split and their classes."""

    root: Path
    files: Sequence[str]
    """Relative to `root`."""
    labels: Sequence[int]
    """Indices into `classes`."""
    classes: Sequence[str]

    def limit(self, count: int | None) -> "LabeledFiles":
        """Return at most `count` evenly spaced files, or all of them."""
        kept = evenly_spaced(len(self.files), count)
        return replace(
            self, files=[self.files[number] for number in kept], labels=[self.labels[number] for number in kept]
        )


def list_labeled_files(dataset: str, root: Path, split: str) -> LabeledFiles:
    """Return the files of a split.

    Args:
        dataset: one of `DATASETS`.
        root: `--data-dir`. A `folder` has `SPLIT/CLASS/*.jpg` as for torchvision's `ImageFolder`; `inat19` has
            `SPLIT2019.json` and the images that it names.
        split: `train` or `val`.

    Raises:
        UsageError: a folder or a file is missing or damaged, or a class has no images.
    """
    check_folder("--data-dir", root)
    return _list_folder(root, split) if dataset == "folder" else _list_inat19(root, split)


def _list_folder(root: Path, split: str) -> LabeledFiles:
    folder = root / split
    check_folder("--data-dir", folder)
    try:
        classes, class_indices = find_classes(str(folder))
    except FileNotFoundError:
        raise UsageError(f"--data-dir {folder}: no class folders in it; it needs {split}/CLASS/*.jpg") from None
    samples = make_dataset(str(folder), class_indices, IMG_EXTENSIONS, allow_empty=True)
    used = {label for _, label in samples}
    for name, label in class_indices.items():
        if label not in used:
            raise UsageError(f"--data-dir {folder / name}: no images in it; add some, or remove the folder")
    files = [os.path.relpath(path, root) for path, _ in samples]
    return LabeledFiles(root, files, [label for _, label in samples], classes)


def _list_inat19(root: Path, split: str) -> LabeledFiles:
    path = root / f"{split}2019.json"
    if not path.is_file():
        raise UsageError(f"--data-dir {root}: --dataset inat19 needs the file {path.name} in it, which is missing")
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        files = {image["id"]: str(image["file_name"]) for image in content["images"]}
        categories = {item["image_id"]: int(item["category_id"]) for item in content["annotations"]}
        numbers = sorted(files)
        labels = [categories[number] for number in numbers]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"--data-dir: {path} is damaged ({reason}); download it again") from None
    if not files:
        raise UsageError(f"--data-dir: {path} names no images; download it again")
    first = root / files[numbers[0]]
    if not first.is_file():
        raise UsageError(
            f"--data-dir {root}: {path.name} names {files[numbers[0]]}, which is missing; unpack the images"
        )
    ids = sorted(set(labels))
    indices = {number: index for index, number in enumerate(ids)}
    return LabeledFiles(
        root,
        [files[number] for number in numbers],
        [indices[label] for label in labels],
        [str(number) for number in ids],
    )


def check_same_classes(train: LabeledFiles, val: LabeledFiles) -> None:
    """Check that both splits have the same classes.

    Raises:
        UsageError: it names a class of only one of them.
    """
    for split, classes, others in (("train", train.classes, val.classes), ("val", val.classes, train.classes)):
        if extra := sorted(set(classes) - set(others)):
            more = f" and {len(extra) - 1} others" if len(extra) > 1 else ""
            raise UsageError(f"--data-dir {train.root}: only the {split} split has the class {extra[0]}{more}")
