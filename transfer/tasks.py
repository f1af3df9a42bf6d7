"""The evaluations there are: what each fine-tunes, which data and which framework it needs, and what was published."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Task:
    """One fine-tuning and the numbers that come of it."""

    title: str
    config: str
    """Below the framework's `configs`; `{method}` is SlotCon or SlotFA, whose files differ in name alone."""
    data: tuple[str, ...]
    """What must be there, below the framework's folder of data."""
    metrics: dict[str, str]
    """Their names, and their places in `results.json`, dots between the levels."""

    @property
    def framework(self) -> str:
        """`detection` or `segmentation`: the folder of its commands."""
        return "detection" if self.config.endswith(".yaml") else "segmentation"

    def missing(self, arch: str) -> str:
        """Why this task cannot run on this machine with an encoder of `arch`, and what to do; empty if it can."""
        if arch != "resnet50":
            return f"its config is for a resnet50, and the encoder is a {arch}"
        module = {"detection": "detectron2", "segmentation": "mmseg"}[self.framework]
        if find_spec(module) is None:
            return f"{module} is not installed; transfer/README.md says how"
        for part in self.data:
            if not (path := _data_folder(self.framework) / part).exists():
                return f"{path} is not there; link the data as transfer/README.md shows"
        return ""


def _data_folder(framework: str) -> Path:
    if framework == "detection":
        return Path(os.environ.get("DETECTRON2_DATASETS", FOLDER / "detection" / "datasets"))
    return Path(os.environ.get("SEGMENTATION_DATA", FOLDER / "segmentation" / "data"))


_COCO = ("coco/train2017", "coco/val2017", "coco/annotations")
_CITYSCAPES = ("cityscapes/leftImg8bit/train", "cityscapes/gtFine/train")
_VOC = ("VOCdevkit/VOC2012/JPEGImages", "VOCdevkit/VOC2012/SegmentationClassAug")
_ADE = ("ade/ADEChallengeData2016/images", "ade/ADEChallengeData2016/annotations")
_AP = {"box AP": "bbox.AP", "mask AP": "segm.AP"}
_MIOU = {"mIoU": "metrics.mIoU"}

TASKS = {
    "voc12aug": Task(
        "PASCAL VOC, FCN d6 s16, 30k", "voc12aug/fcn_d6_r50-d16_513x513_30k_voc12aug_moco.py", _VOC, _MIOU
    ),
    "coco": Task("COCO, Mask R-CNN R50-FPN, 1x", "COCO_R_50_FPN_1x_{method}.yaml", _COCO, _AP),
    "cityscapes": Task(
        "Cityscapes, FCN d6 s16, 90k", "cityscapes/fcn_d6_r50-d16_769x769_90k_cityscapes_moco.py", _CITYSCAPES, _MIOU
    ),
    "ade20k": Task("ADE20K, FCN s8, 80k", "ade20k/fcn_r50-d8_512x512_80k_ade20k.py", _ADE, _MIOU),
    "voc12aug_d8": Task("PASCAL VOC, FCN s8, 20k", "voc12aug/fcn_r50-d8_512x512_20k_voc12aug.py", _VOC, _MIOU),
    "cityscapes_d8": Task(
        "Cityscapes, FCN s8, 40k", "cityscapes/fcn_r50-d8_769x769_40k_cityscapes.py", _CITYSCAPES, _MIOU
    ),
    "cityscapes_instances": Task(
        "Cityscapes, Mask R-CNN R50-FPN, 24k", "Cityscapes_R_50_FPN_{method}.yaml", _CITYSCAPES, {"mask AP": "segm.AP"}
    ),
    "coco_2x": Task("COCO, Mask R-CNN R50-FPN, 2x", "COCO_R_50_FPN_2x_{method}.yaml", _COCO, _AP),
}
"""In the order in which they run: those of the papers first."""

PUBLISHED = {("coco", "box AP"): 41.0, ("coco", "mask AP"): 37.0}
"""Of SlotCon after 800 epochs of COCO (arXiv 2205.15288), where known here."""
