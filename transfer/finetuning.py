"""The fine-tunings of evaluate.py: config, dataset and metrics of each, and the published numbers."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

TRANSFER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class FineTuning:
    """One fine-tuning recipe and the metrics that it reports."""

    title: str
    """Dataset, model and number of iterations."""
    config: str
    """Path below the task's `configs`; `{method}` is SlotCon or SlotFA, whose files differ in their names only."""
    data: tuple[str, ...]
    """Required files and folders, below the task's data folder."""
    metrics: dict[str, str]
    """Name of each metric -> its keys in the run's `results.json`, joined by dots."""

    @property
    def task(self) -> str:
        """`detection` (detectron2) or `segmentation` (mmsegmentation), which is also the folder of its commands."""
        return "detection" if self.config.endswith(".yaml") else "segmentation"

    def why_unavailable(self, arch: str) -> str:
        """Return why this fine-tuning cannot run on this machine with an encoder `arch`; empty if it can."""
        if arch != "resnet50":
            return f"the config is for resnet50, and the encoder is {arch}"
        package = {"detection": "detectron2", "segmentation": "mmseg"}[self.task]
        if find_spec(package) is None:
            return f"{package} is not installed; see transfer/README.md"
        for path in (data_root(self.task) / part for part in self.data):
            if not path.exists():
                return f"{path} does not exist; link the data as described in transfer/README.md"
        return ""


def data_root(task: str) -> Path:
    """Return the folder that holds the datasets of `detection` or `segmentation`."""
    if task == "detection":
        return Path(os.environ.get("DETECTRON2_DATASETS", TRANSFER / "detection" / "datasets")).expanduser()
    return Path(os.environ.get("SEGMENTATION_DATA", TRANSFER / "segmentation" / "data")).expanduser()


_COCO_FOLDERS = ("coco/train2017", "coco/val2017", "coco/annotations")
_CITYSCAPES_FOLDERS = ("cityscapes/leftImg8bit/train", "cityscapes/gtFine/train")
_VOC_FOLDERS = ("VOCdevkit/VOC2012/JPEGImages", "VOCdevkit/VOC2012/SegmentationClassAug")
_ADE_FOLDERS = ("ade/ADEChallengeData2016/images", "ade/ADEChallengeData2016/annotations")
_AP = {"box AP": "bbox.AP", "mask AP": "segm.AP"}
_MIOU = {"mIoU": "metrics.mIoU"}

FINE_TUNINGS = {
    "voc12aug": FineTuning(
        "PASCAL VOC, FCN d6 stride 16, 30k", "voc12aug/fcn_d6_r50-d16_513x513_30k_voc12aug_moco.py", _VOC_FOLDERS, _MIOU
    ),
    "coco": FineTuning("COCO, Mask R-CNN R50-FPN, 1x", "COCO_R_50_FPN_1x_{method}.yaml", _COCO_FOLDERS, _AP),
    "cityscapes": FineTuning(
        "Cityscapes, FCN d6 stride 16, 90k",
        "cityscapes/fcn_d6_r50-d16_769x769_90k_cityscapes_moco.py",
        _CITYSCAPES_FOLDERS,
        _MIOU,
    ),
    "ade20k": FineTuning("ADE20K, FCN stride 8, 80k", "ade20k/fcn_r50-d8_512x512_80k_ade20k.py", _ADE_FOLDERS, _MIOU),
    "voc12aug_d8": FineTuning(
        "PASCAL VOC, FCN stride 8, 20k", "voc12aug/fcn_r50-d8_512x512_20k_voc12aug.py", _VOC_FOLDERS, _MIOU
    ),
    "cityscapes_d8": FineTuning(
        "Cityscapes, FCN stride 8, 40k", "cityscapes/fcn_r50-d8_769x769_40k_cityscapes.py", _CITYSCAPES_FOLDERS, _MIOU
    ),
    "cityscapes_instances": FineTuning(
        "Cityscapes, Mask R-CNN R50-FPN, 24k",
        "Cityscapes_R_50_FPN_{method}.yaml",
        _CITYSCAPES_FOLDERS,
        {"mask AP": "segm.AP"},
    ),
    "coco_2x": FineTuning("COCO, Mask R-CNN R50-FPN, 2x", "COCO_R_50_FPN_2x_{method}.yaml", _COCO_FOLDERS, _AP),
}
"""By their names for --only, in the order in which they run."""

PUBLISHED = {("coco", "box AP"): 41.0, ("coco", "mask AP"): 37.0}
"""(name, metric) -> SlotCon's number after 800 epochs on COCO (arXiv 2205.15288)."""
