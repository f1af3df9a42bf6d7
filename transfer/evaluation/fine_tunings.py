"""The fine-tunings of evaluate.py: config, dataset, metrics, length and cost of each, and the published numbers."""

from dataclasses import dataclass
from pathlib import Path

from transfer.evaluation.dataset_files import ADE20K, CITYSCAPES_INSTANCES, CITYSCAPES_SEMANTIC, COCO, VOC, DatasetFiles
from transfer.evaluation.training_time import ImageFlops, RunLength
from transfer.frameworks import PACKAGES, TRANSFER, data_root, is_installed

RELEASED = "released"
"""The recipe of a configuration that SlotCon's authors released."""

_PROJECT = "this project's"
_IMAGENET_NORM = "ImageNet normalization"


# Counted with torch.utils.flop_counter.FlopCounterMode on the models of the configs. Segmentation trains on crops. It
# evaluates VOC and ADE20K on images of 4:3, and Cityscapes on 8 windows. Detection trains on images of 736 x 960
# (COCO) and 928 x 1856 (Cityscapes) px with 512 proposals, 128 of them with a mask, and evaluates on images of
# 800 x 1088 and 1024 x 2048 px with 1000 proposals and 100 masks.
_FCN_STRIDE_16_513 = ImageFlops(238, 104)
_FCN_STRIDE_16_769 = ImageFlops(526, 8 * 176)
_FCN_STRIDE_8_512 = ImageFlops(1237, 528)
_FCN_STRIDE_8_769 = ImageFlops(2836, 8 * 902)
_MASK_RCNN_COCO = ImageFlops(1594, 690)
_MASK_RCNN_CITYSCAPES = ImageFlops(2720, 1147)


@dataclass(frozen=True)
class FineTuning:
    """One fine-tuning recipe and the metrics that it reports."""

    title: str
    """Dataset, model and number of iterations."""
    config: str
    """Path below the task's `configs`; `{method}` is SlotCon or SlotFA, whose files differ in their names only."""
    dataset: DatasetFiles
    metrics: dict[str, str]
    """Name of each metric -> its keys in the run's `results.json`, joined by dots."""
    length: RunLength
    flops: ImageFlops
    recipe: str = RELEASED
    """Where the configuration is from, or how it differs from the released one."""
    evaluates_all_images: bool = False
    """Whether its framework has no evaluation on the first images only."""

    @property
    def task(self) -> str:
        """`detection` (detectron2) or `segmentation` (mmsegmentation), which is also the folder of its commands."""
        return "detection" if self.config.endswith(".yaml") else "segmentation"

    def config_path(self, method: str = "SlotCon") -> Path:
        """Return the file of the config for an encoder of `method`."""
        return TRANSFER / self.task / "configs" / self.config.format(method=method)

    def why_unavailable(self, arch: str) -> str:
        """Return why this fine-tuning cannot run on this machine with an encoder `arch`; empty if it can."""
        if arch != "resnet50":
            return f"the config is for resnet50, and the encoder is {arch}"
        if not is_installed(self.task):
            return f"{PACKAGES[self.task]} is not installed"
        missing = self.dataset.find_missing(data_root(self.task))
        return f"{missing} does not exist" if missing else ""


_AP = {"box AP": "bbox.AP", "mask AP": "segm.AP"}
_MIOU = {"mIoU": "metrics.mIoU"}
_VOC_30K = RunLength(30000, eval_period=5000)
_CITYSCAPES_90K = RunLength(90000, eval_period=15000)

FINE_TUNINGS = {
    "voc12aug": FineTuning(
        "PASCAL VOC, FCN d6 stride 16, 30k",
        "voc12aug/fcn_d6_r50-d16_513x513_30k_voc12aug_moco.py",
        VOC,
        _MIOU,
        _VOC_30K,
        _FCN_STRIDE_16_513,
    ),
    "coco": FineTuning(
        "COCO, Mask R-CNN R50-FPN, 1x",
        "COCO_R_50_FPN_1x_{method}.yaml",
        COCO,
        _AP,
        RunLength(90000, precise_bn=200),
        _MASK_RCNN_COCO,
    ),
    "cityscapes": FineTuning(
        "Cityscapes, FCN d6 stride 16, 90k",
        "cityscapes/fcn_d6_r50-d16_769x769_90k_cityscapes_moco.py",
        CITYSCAPES_SEMANTIC,
        _MIOU,
        _CITYSCAPES_90K,
        _FCN_STRIDE_16_769,
    ),
    "ade20k": FineTuning(
        "ADE20K, FCN stride 8, 80k",
        "ade20k/fcn_r50-d8_512x512_80k_ade20k.py",
        ADE20K,
        _MIOU,
        RunLength(80000, eval_period=10000),
        _FCN_STRIDE_8_512,
    ),
    "voc12aug_d8": FineTuning(
        "PASCAL VOC, FCN stride 8, 20k",
        "voc12aug/fcn_r50-d8_512x512_20k_voc12aug.py",
        VOC,
        _MIOU,
        RunLength(20000, eval_period=5000),
        _FCN_STRIDE_8_512,
    ),
    "cityscapes_d8": FineTuning(
        "Cityscapes, FCN stride 8, 40k",
        "cityscapes/fcn_r50-d8_769x769_40k_cityscapes.py",
        CITYSCAPES_SEMANTIC,
        _MIOU,
        RunLength(40000, eval_period=10000),
        _FCN_STRIDE_8_769,
    ),
    "cityscapes_instances": FineTuning(
        "Cityscapes, Mask R-CNN R50-FPN, 24k",
        "Cityscapes_R_50_FPN_{method}.yaml",
        CITYSCAPES_INSTANCES,
        {"mask AP": "segm.AP"},
        RunLength(24000, batch_size=8, precise_bn=200),
        _MASK_RCNN_CITYSCAPES,
        _PROJECT,
        evaluates_all_images=True,
    ),
    "coco_2x": FineTuning(
        "COCO, Mask R-CNN R50-FPN, 2x",
        "COCO_R_50_FPN_2x_{method}.yaml",
        COCO,
        _AP,
        RunLength(180000, precise_bn=200),
        _MASK_RCNN_COCO,
        _PROJECT,
    ),
    "voc12aug_imagenet_norm": FineTuning(
        "PASCAL VOC, FCN d6 stride 16, 30k",
        "voc12aug/fcn_d6_r50-d16_513x513_30k_voc12aug_moco_imagenet_norm.py",
        VOC,
        _MIOU,
        _VOC_30K,
        _FCN_STRIDE_16_513,
        _IMAGENET_NORM,
    ),
    "cityscapes_imagenet_norm": FineTuning(
        "Cityscapes, FCN d6 stride 16, 90k",
        "cityscapes/fcn_d6_r50-d16_769x769_90k_cityscapes_moco_imagenet_norm.py",
        CITYSCAPES_SEMANTIC,
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
