"""The fine-tunings of evaluate.py: config, data, metrics, length and cost of each, and the published numbers."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from transfer.training_time import Gflop, Schedule

TRANSFER = Path(__file__).resolve().parent
PACKAGES = {"detection": "detectron2", "segmentation": "mmseg"}
"""Task -> the package that trains it."""

CONFIG_GPUS = 8
"""The number of GPUs that the detection configs are for, from which --auto-scale scales them."""

RELEASED = "released"
"""The recipe of a configuration that SlotCon's authors released."""

_PROJECT = "this project's"
_IMAGENET_NORM = "ImageNet normalization"


# Counted with torch.utils.flop_counter.FlopCounterMode on the models of the configs. Segmentation trains on crops. It
# evaluates VOC and ADE20K on images of 4:3, and Cityscapes on 8 windows. Detection trains on images of 736 x 960
# (COCO) and 928 x 1856 (Cityscapes) px with 512 proposals, 128 of them with a mask, and evaluates on images of
# 800 x 1088 and 1024 x 2048 px with 1000 proposals and 100 masks.
_FCN_STRIDE_16_513 = Gflop(238, 104)
_FCN_STRIDE_16_769 = Gflop(526, 8 * 176)
_FCN_STRIDE_8_512 = Gflop(1237, 528)
_FCN_STRIDE_8_769 = Gflop(2836, 8 * 902)
_MASK_RCNN_COCO = Gflop(1594, 690)
_MASK_RCNN_CITYSCAPES = Gflop(2720, 1147)


@dataclass(frozen=True)
class Data:
    """The files of a dataset, as paths below the task's data folder, in which `*` may occur."""

    required: tuple[str, ...]
    """All files and folders that a config reads."""
    val_images: str
    """The images of the evaluation, or a text file with one of them in each line."""

    def find_missing(self, root: Path) -> Path | None:
        """Return the first required path that does not exist below `root`; None if there is none."""
        return next((root / path for path in self.required if next(root.glob(path), None) is None), None)

    def count_val_images(self, root: Path) -> int:
        """Return the number of images of the evaluation."""
        if self.val_images.endswith(".txt"):
            return len((root / self.val_images).read_text().split())
        return sum(1 for _ in root.glob(self.val_images))


@dataclass(frozen=True)
class FineTuning:
    """One fine-tuning recipe and the metrics that it reports."""

    title: str
    """Dataset, model and number of iterations."""
    config: str
    """Path below the task's `configs`; `{method}` is SlotCon or SlotFA, whose files differ in their names only."""
    data: Data
    metrics: dict[str, str]
    """Name of each metric -> its keys in the run's `results.json`, joined by dots."""
    schedule: Schedule
    gflop: Gflop
    recipe: str = RELEASED
    """Where the configuration is from, or how it differs from the released one."""

    @property
    def task(self) -> str:
        """`detection` (detectron2) or `segmentation` (mmsegmentation), which is also the folder of its commands."""
        return "detection" if self.config.endswith(".yaml") else "segmentation"

    def why_unavailable(self, arch: str) -> str:
        """Return why this fine-tuning cannot run on this machine with an encoder `arch`; empty if it can."""
        if arch != "resnet50":
            return f"the config is for resnet50, and the encoder is {arch}"
        if not is_installed(self.task):
            return f"{PACKAGES[self.task]} is not installed"
        missing = self.data.find_missing(data_root(self.task))
        return f"{missing} does not exist" if missing else ""


def is_installed(task: str) -> bool:
    """Return whether the package that trains `detection` or `segmentation` is installed."""
    return find_spec(PACKAGES[task]) is not None


def data_root(task: str) -> Path:
    """Return the folder that holds the datasets of `detection` or `segmentation`."""
    if task == "detection":
        return Path(os.environ.get("DETECTRON2_DATASETS", TRANSFER / "detection" / "datasets")).expanduser()
    return Path(os.environ.get("SEGMENTATION_DATA", TRANSFER / "segmentation" / "data")).expanduser()


_COCO = Data(
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


def _cityscapes(annotation: str) -> Data:
    """Return the data of Cityscapes with the annotation files `*_gtFine_{annotation}.png`, made by its scripts."""
    files = (f"cityscapes/gtFine/{split}/*/*_gtFine_{annotation}.png" for split in ("train", "val"))
    return Data((*_CITYSCAPES_FOLDERS, *files), _CITYSCAPES_IMAGES)


_VOC_LISTS = "VOCdevkit/VOC2012/ImageSets/Segmentation"
_VOC = Data(
    (
        "VOCdevkit/VOC2012/JPEGImages",
        "VOCdevkit/VOC2012/SegmentationClass",
        "VOCdevkit/VOC2012/SegmentationClassAug",
        *(f"{_VOC_LISTS}/{split}.txt" for split in ("train", "aug", "val")),
    ),
    f"{_VOC_LISTS}/val.txt",
)
_ADE = Data(
    tuple(
        f"ade/ADEChallengeData2016/{kind}/{split}"
        for kind in ("images", "annotations")
        for split in ("training", "validation")
    ),
    "ade/ADEChallengeData2016/images/validation/*.jpg",
)
_AP = {"box AP": "bbox.AP", "mask AP": "segm.AP"}
_MIOU = {"mIoU": "metrics.mIoU"}
_VOC_30K = Schedule(30000, eval_period=5000)
_CITYSCAPES_90K = Schedule(90000, eval_period=15000)

FINE_TUNINGS = {
    "voc12aug": FineTuning(
        "PASCAL VOC, FCN d6 stride 16, 30k",
        "voc12aug/fcn_d6_r50-d16_513x513_30k_voc12aug_moco.py",
        _VOC,
        _MIOU,
        _VOC_30K,
        _FCN_STRIDE_16_513,
    ),
    "coco": FineTuning(
        "COCO, Mask R-CNN R50-FPN, 1x",
        "COCO_R_50_FPN_1x_{method}.yaml",
        _COCO,
        _AP,
        Schedule(90000, precise_bn=200),
        _MASK_RCNN_COCO,
    ),
    "cityscapes": FineTuning(
        "Cityscapes, FCN d6 stride 16, 90k",
        "cityscapes/fcn_d6_r50-d16_769x769_90k_cityscapes_moco.py",
        _cityscapes("labelTrainIds"),
        _MIOU,
        _CITYSCAPES_90K,
        _FCN_STRIDE_16_769,
    ),
    "ade20k": FineTuning(
        "ADE20K, FCN stride 8, 80k",
        "ade20k/fcn_r50-d8_512x512_80k_ade20k.py",
        _ADE,
        _MIOU,
        Schedule(80000, eval_period=10000),
        _FCN_STRIDE_8_512,
    ),
    "voc12aug_d8": FineTuning(
        "PASCAL VOC, FCN stride 8, 20k",
        "voc12aug/fcn_r50-d8_512x512_20k_voc12aug.py",
        _VOC,
        _MIOU,
        Schedule(20000, eval_period=5000),
        _FCN_STRIDE_8_512,
    ),
    "cityscapes_d8": FineTuning(
        "Cityscapes, FCN stride 8, 40k",
        "cityscapes/fcn_r50-d8_769x769_40k_cityscapes.py",
        _cityscapes("labelTrainIds"),
        _MIOU,
        Schedule(40000, eval_period=10000),
        _FCN_STRIDE_8_769,
    ),
    "cityscapes_instances": FineTuning(
        "Cityscapes, Mask R-CNN R50-FPN, 24k",
        "Cityscapes_R_50_FPN_{method}.yaml",
        _cityscapes("instanceIds"),
        {"mask AP": "segm.AP"},
        Schedule(24000, batch_size=8, precise_bn=200),
        _MASK_RCNN_CITYSCAPES,
        _PROJECT,
    ),
    "coco_2x": FineTuning(
        "COCO, Mask R-CNN R50-FPN, 2x",
        "COCO_R_50_FPN_2x_{method}.yaml",
        _COCO,
        _AP,
        Schedule(180000, precise_bn=200),
        _MASK_RCNN_COCO,
        _PROJECT,
    ),
    "voc12aug_imagenet_norm": FineTuning(
        "PASCAL VOC, FCN d6 stride 16, 30k",
        "voc12aug/fcn_d6_r50-d16_513x513_30k_voc12aug_moco_imagenet_norm.py",
        _VOC,
        _MIOU,
        _VOC_30K,
        _FCN_STRIDE_16_513,
        _IMAGENET_NORM,
    ),
    "cityscapes_imagenet_norm": FineTuning(
        "Cityscapes, FCN d6 stride 16, 90k",
        "cityscapes/fcn_d6_r50-d16_769x769_90k_cityscapes_moco_imagenet_norm.py",
        _cityscapes("labelTrainIds"),
        _MIOU,
        _CITYSCAPES_90K,
        _FCN_STRIDE_16_769,
        _IMAGENET_NORM,
    ),
}
"""By their names for --only, in the order in which they run."""

DEFAULT_NAMES = tuple(name for name, fine_tuning in FINE_TUNINGS.items() if fine_tuning.recipe != _IMAGENET_NORM)
"""The fine-tunings that run without --only."""

PUBLISHED = {("coco", "box AP"): 41.0, ("coco", "mask AP"): 37.0}
"""(name, metric) -> SlotCon's number after 800 epochs on COCO (arXiv 2205.15288)."""
