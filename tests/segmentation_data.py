"""Small datasets in the layouts of VOC, Cityscapes and ADE20K, and config overrides for fast runs on a CPU."""

from pathlib import Path

import numpy as np
from PIL import Image

from data.demo import render_scene

SEGMENTATION = Path(__file__).parents[1] / "transfer" / "segmentation"
FCN_CONFIGS = sorted(
    path for folder in ("ade20k", "cityscapes", "voc12aug") for path in SEGMENTATION.glob(f"configs/{folder}/fcn*.py")
)
VIT_CONFIG = SEGMENTATION / "configs/ade20k/fpn_vit-s16_512x512_40k_ade20k.py"
VIT_FOLDER_CONFIG = SEGMENTATION / "configs/folder/fpn_vit-s16_512x512_folder.py"
FOLDER_CONFIG = SEGMENTATION / "configs/folder/fcn_r50-d8_512x512_folder.py"
VOC_CONFIG = SEGMENTATION / "configs/voc12aug/fcn_d6_r50-d16_513x513_30k_voc12aug_moco.py"
SIZE = 64


def save_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def make_data(root: Path) -> Path:
    """Write `VOCdevkit`, `cityscapes` and `ade` below `root`, each with the same four training and two test images."""
    voc, ade = root / "VOCdevkit" / "VOC2012", root / "ade" / "ADEChallengeData2016"
    splits: dict[str, list[str]] = {"train": [], "aug": [], "val": []}
    for number in range(6):
        image, labels = render_scene(0, "train", number, SIZE + 16, SIZE)
        name, split = f"image_{number}", ("train", "aug", "val")[number // 2]
        splits[split].append(name)
        masks = "SegmentationClassAug" if split == "aug" else "SegmentationClass"
        save_image(voc / "JPEGImages" / f"{name}.jpg", image)
        save_image(voc / masks / f"{name}.png", labels)

        split = "val" if split == "val" else "train"
        save_image(root / "cityscapes" / "leftImg8bit" / split / "city" / f"{name}_leftImg8bit.png", image)
        save_image(root / "cityscapes" / "gtFine" / split / "city" / f"{name}_gtFine_labelTrainIds.png", labels)

        split = "validation" if split == "val" else "training"
        save_image(ade / "images" / split / f"{name}.jpg", image)
        save_image(ade / "annotations" / split / f"{name}.png", labels + 1)  # 0 is void
    (voc / "ImageSets" / "Segmentation").mkdir(parents=True)
    for split, names in splits.items():
        (voc / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return root


def make_folder(root: Path, suffixes: tuple[str, ...] = (".jpg", ".png", ".jpg", ".jpg", ".jpg")) -> Path:
    """Write `{train,val}/images` and `{train,val}/masks` with a scene for each suffix, and one image without a mask.

    The first rows of a mask are void.
    """
    for split in ("train", "val"):
        for number, suffix in enumerate(suffixes):
            image, labels = render_scene(0, split, number, SIZE + 16, SIZE)
            labels[:2] = 255
            save_image(root / split / "images" / f"{number}{suffix}", image)
            save_image(root / split / "masks" / f"{number}.png", labels)
    save_image(root / "train" / "images" / "unlabeled.jpg", image)
    return root


def small_run(config: Path, iterations: int) -> list[str]:
    """Return overrides that train a config for a few iterations with two crops of 64 px each."""
    train = "train_dataloader.dataset"
    datasets = [f"{train}.datasets.{number}" for number in (0, 1)] if "voc" in config.name else [train]
    overrides = [f"{dataset}.pipeline.2.scale=({2 * SIZE},{SIZE})" for dataset in datasets]
    overrides += [f"{dataset}.pipeline.3.crop_size=({SIZE},{SIZE})" for dataset in datasets]
    overrides += ["train_dataloader.num_workers=0", f"model.data_preprocessor.size=({SIZE},{SIZE})"]
    for split in ("val", "test"):
        overrides.append(f"{split}_dataloader.dataset.pipeline.1.scale=({2 * SIZE},{SIZE})")
        overrides.append(f"{split}_dataloader.num_workers=0")
    if "cityscapes" in config.name:
        overrides += [f"model.test_cfg.crop_size=({SIZE},{SIZE})", "model.test_cfg.stride=(43,43)"]
    overrides += ["auto_scale_lr.base_batch_size=2", "default_hooks.logger.interval=1"]
    overrides += [f"train_cfg.max_iters={iterations}", f"train_cfg.val_interval={iterations}"]
    return ["--cfg-options", *overrides, f"default_hooks.checkpoint.interval={iterations}"]
