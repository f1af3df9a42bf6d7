"""The files of the datasets that evaluate.py fine-tunes on, in the layouts that the configs read."""

import json
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UsageError


@dataclass(frozen=True)
class DatasetFiles:
    """The files of a dataset, as paths below the task's data folder, in which `*` may occur."""

    required: tuple[str, ...]
    """All files and folders that a config reads."""
    val_images: str
    """The images of the evaluation, or a file that lists them: text with one in each line, or JSON like COCO's."""

    def find_missing(self, root: Path) -> Path | None:
        """Return the first required path that does not exist below `root`; None if there is none."""
        return next((root / path for path in self.required if next(root.glob(path), None) is None), None)

    def count_val_images(self, root: Path) -> int:
        """Return the number of images of the evaluation.

        Raises:
            UsageError: the file that lists them is damaged.
        """
        if self.val_images.endswith(".txt"):
            return len((root / self.val_images).read_text().split())
        if self.val_images.endswith(".json"):
            return _count_listed_images(root / self.val_images)
        return sum(1 for _ in root.glob(self.val_images))


def _count_listed_images(path: Path) -> int:
    try:
        return len(json.loads(path.read_text())["images"])
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path}: damaged, it lists no images; download it again") from None


COCO = DatasetFiles(
    (
        "coco/train2017",
        "coco/val2017",
        "coco/annotations/instances_train2017.json",
        "coco/annotations/instances_val2017.json",
    ),
    "coco/val2017/*.jpg",
)
_CITYSCAPES_FOLDERS = tuple(
    f"cityscapes/{kind}/{split}" for kind in ("leftImg8bit", "gtFine") for split in ("train", "val")
)
_CITYSCAPES_IMAGES = "cityscapes/leftImg8bit/val/*/*_leftImg8bit.png"


def _cityscapes(annotation: str) -> DatasetFiles:
    """Return the files of Cityscapes with the annotation files `*_gtFine_{annotation}.png`, made by its scripts."""
    files = (f"cityscapes/gtFine/{split}/*/*_gtFine_{annotation}.png" for split in ("train", "val"))
    return DatasetFiles((*_CITYSCAPES_FOLDERS, *files), _CITYSCAPES_IMAGES)


CITYSCAPES_SEMANTIC = _cityscapes("labelTrainIds")
CITYSCAPES_INSTANCES = _cityscapes("instanceIds")

_VOC_LISTS = "VOCdevkit/VOC2012/ImageSets/Segmentation"
VOC = DatasetFiles(
    (
        "VOCdevkit/VOC2012/JPEGImages",
        "VOCdevkit/VOC2012/SegmentationClass",
        "VOCdevkit/VOC2012/SegmentationClassAug",
        *(f"{_VOC_LISTS}/{split}.txt" for split in ("train", "aug", "val")),
    ),
    f"{_VOC_LISTS}/val.txt",
)
ADE20K = DatasetFiles(
    tuple(
        f"ade/ADEChallengeData2016/{kind}/{split}"
        for kind in ("images", "annotations")
        for split in ("training", "validation")
    ),
    "ade/ADEChallengeData2016/images/validation/*.jpg",
)
INAT19 = DatasetFiles(
    ("inat19/train_val2019", "inat19/train2019.json", "inat19/val2019.json"),
    "inat19/val2019.json",
)
