"""The fine-tunings of evaluate.py: config, dataset, metrics, length and cost of each, and the published numbers."""

from dataclasses import dataclass
from pathlib import Path

from transfer.evaluation.dataset_files import (
    ADE20K,
    CITYSCAPES_INSTANCES,
    CITYSCAPES_SEMANTIC,
    COCO,
    INAT19,
    VOC,
    DatasetFiles,
)
from transfer.evaluation.training_time import ImageFlops, RunLength
from transfer.frameworks import PACKAGES, TRANSFER, data_root, is_installed

RELEASED = "released"
"""The recipe of a configuration that SlotCon's authors released."""

_PROJECT = "this project's"
_IMAGENET_NORM = "ImageNet normalization"


# Counted with torch.utils.flop_counter.FlopCounterMode on the models of the configs. Segmentation trains on crops. It
# evaluates VOC and ADE20K on images of 4:3 (with the padding that the ViT's config adds), and Cityscapes on 8 windows.
# Detection trains on images of 736 x 960 (COCO) and 928 x 1856 (Cityscapes) px with 512 proposals, 128 of them with a
# mask, and evaluates on images of 800 x 1088 and 1024 x 2048 px with 1000 proposals and 100 masks.
_FCN_STRIDE_16_513 = ImageFlops(238, 104)
_FCN_STRIDE_16_769 = ImageFlops(526, 8 * 176)
_FCN_STRIDE_8_512 = ImageFlops(1237, 528)
_FCN_STRIDE_8_769 = ImageFlops(2836, 8 * 902)
_MASK_RCNN_COCO = ImageFlops(1594, 690)
_MASK_RCNN_CITYSCAPES = ImageFlops(2720, 1147)
_MASK_RCNN_VIT_COCO = ImageFlops(2089, 933)
_SEMANTIC_FPN_VIT = ImageFlops(350, 171)

_VIT_S = "vit_small_patch16_224"
_GTSA = "GTSA, ViT-S/16, 100 epochs on COCO (arXiv 2304.08014)"


@dataclass(frozen=True)
class Published:
    """Numbers that the authors of a method published for a fine-tuning."""

    source: str
    """The method, its pre-training and the paper."""
    arch: str
    """The architecture of the encoder."""
    values: dict[str, float]
    """By the name of the metric."""


@dataclass(frozen=True)
class FineTuning:
    """One fine-tuning recipe and the metrics that it reports."""

    title: str
    """Dataset, model and length."""
    task: str
    """`detection`, `segmentation` or `classification`: a key of `PACKAGES`, and the folder of its commands."""
    config: str
    """Path below the task's `configs`; `{method}` is SlotCon or SlotFA, whose files differ in their names only.

    For classification, whose recipe is the defaults of finetune.py, its `--dataset`, and the folder of the images.
    """
    dataset: DatasetFiles
    metrics: dict[str, str]
    """Name of each metric -> its keys in the run's `results.json`, joined by dots."""
    length: RunLength
    flops: ImageFlops | None
    """None for the encoder alone, on images of 224 px."""
    recipe: str = RELEASED
    """Where the configuration is from, or how it differs from the released one."""
    arch: str = "resnet50"
    """The architecture that the config is for; empty for any."""
    evaluates_all_images: bool = False
    """Whether its framework has no evaluation on the first images only."""
    published: Published | None = None
    """Numbers to compare with, if there are any."""

    def config_path(self, method: str = "SlotCon") -> Path:
        """Return the file of the config for an encoder of `method`."""
        return TRANSFER / self.task / "configs" / self.config.format(method=method)

    def accepts_arch(self, arch: str) -> bool:
        """Return whether the config is for encoders of this architecture."""
        return not self.arch or arch == self.arch

    def why_unavailable(self, arch: str) -> str:
        """Return why this fine-tuning cannot run on this machine with an encoder `arch`; empty if it can."""
        if not self.accepts_arch(arch):
            return f"the config is for {self.arch}, and the encoder is {arch}"
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
        "segmentation",
        "voc12aug/fcn_d6_r50-d16_513x513_30k_voc12aug_moco.py",
        VOC,
        _MIOU,
        _VOC_30K,
        _FCN_STRIDE_16_513,
    ),
    "coco": FineTuning(
        "COCO, Mask R-CNN R50-FPN, 1x",
        "detection",
        "COCO_R_50_FPN_1x_{method}.yaml",
        COCO,
        _AP,
        RunLength(90000, precise_bn=200),
        _MASK_RCNN_COCO,
        published=Published(
            "SlotCon, 800 epochs on COCO (arXiv 2205.15288)", "resnet50", {"box AP": 41.0, "mask AP": 37.0}
        ),
    ),
    "cityscapes": FineTuning(
        "Cityscapes, FCN d6 stride 16, 90k",
        "segmentation",
        "cityscapes/fcn_d6_r50-d16_769x769_90k_cityscapes_moco.py",
        CITYSCAPES_SEMANTIC,
        _MIOU,
        _CITYSCAPES_90K,
        _FCN_STRIDE_16_769,
    ),
    "ade20k": FineTuning(
        "ADE20K, FCN stride 8, 80k",
        "segmentation",
        "ade20k/fcn_r50-d8_512x512_80k_ade20k.py",
        ADE20K,
        _MIOU,
        RunLength(80000, eval_period=10000),
        _FCN_STRIDE_8_512,
    ),
    "voc12aug_d8": FineTuning(
        "PASCAL VOC, FCN stride 8, 20k",
        "segmentation",
        "voc12aug/fcn_r50-d8_512x512_20k_voc12aug.py",
        VOC,
        _MIOU,
        RunLength(20000, eval_period=5000),
        _FCN_STRIDE_8_512,
    ),
    "cityscapes_d8": FineTuning(
        "Cityscapes, FCN stride 8, 40k",
        "segmentation",
        "cityscapes/fcn_r50-d8_769x769_40k_cityscapes.py",
        CITYSCAPES_SEMANTIC,
        _MIOU,
        RunLength(40000, eval_period=10000),
        _FCN_STRIDE_8_769,
    ),
    "cityscapes_instances": FineTuning(
        "Cityscapes, Mask R-CNN R50-FPN, 24k",
        "detection",
        "Cityscapes_R_50_FPN_{method}.yaml",
        CITYSCAPES_INSTANCES,
        {"mask AP": "segm.AP"},
        RunLength(24000, batch_size=8, precise_bn=200),
        _MASK_RCNN_CITYSCAPES,
        recipe=_PROJECT,
        evaluates_all_images=True,
    ),
    "coco_2x": FineTuning(
        "COCO, Mask R-CNN R50-FPN, 2x",
        "detection",
        "COCO_R_50_FPN_2x_{method}.yaml",
        COCO,
        _AP,
        RunLength(180000, precise_bn=200),
        _MASK_RCNN_COCO,
        recipe=_PROJECT,
    ),
    "coco_vit": FineTuning(
        "COCO, Mask R-CNN ViT-S FPN, 12 epochs",
        "detection",
        "COCO_ViT_S_FPN_1x_GTSA.yaml",
        COCO,
        _AP,
        RunLength(90000, precise_bn=200),
        _MASK_RCNN_VIT_COCO,
        recipe=_PROJECT,
        arch=_VIT_S,
        published=Published(_GTSA, _VIT_S, {"box AP": 35.8, "mask AP": 33.5}),
    ),
    "ade20k_vit": FineTuning(
        "ADE20K, Semantic FPN ViT-S, 40k",
        "segmentation",
        "ade20k/fpn_vit-s16_512x512_40k_ade20k.py",
        ADE20K,
        _MIOU,
        RunLength(40000, eval_period=4000),
        _SEMANTIC_FPN_VIT,
        recipe=_PROJECT,
        arch=_VIT_S,
        published=Published(_GTSA, _VIT_S, {"mIoU": 30.6}),
    ),
    "inat19": FineTuning(
        "iNaturalist 2019, fine-tuning, 100 epochs",
        "classification",
        "inat19",
        INAT19,
        {"top-1": "top1", "top-5": "top5"},
        RunLength(25800, batch_size=1024, eval_period=258, epochs=100),
        None,
        recipe=_PROJECT,
        arch="",
        published=Published(_GTSA, _VIT_S, {"top-1": 59.7}),
    ),
    "voc12aug_imagenet_norm": FineTuning(
        "PASCAL VOC, FCN d6 stride 16, 30k",
        "segmentation",
        "voc12aug/fcn_d6_r50-d16_513x513_30k_voc12aug_moco_imagenet_norm.py",
        VOC,
        _MIOU,
        _VOC_30K,
        _FCN_STRIDE_16_513,
        recipe=_IMAGENET_NORM,
    ),
    "cityscapes_imagenet_norm": FineTuning(
        "Cityscapes, FCN d6 stride 16, 90k",
        "segmentation",
        "cityscapes/fcn_d6_r50-d16_769x769_90k_cityscapes_moco_imagenet_norm.py",
        CITYSCAPES_SEMANTIC,
        _MIOU,
        _CITYSCAPES_90K,
        _FCN_STRIDE_16_769,
        recipe=_IMAGENET_NORM,
    ),
}
"""By their names for --only, in the order in which they run."""

DEFAULT_NAMES = tuple(name for name, fine_tuning in FINE_TUNINGS.items() if fine_tuning.recipe != _IMAGENET_NORM)
"""The fine-tunings that run without --only."""
