"""Small data sets in the layouts of VOC, Cityscapes and ADE20K, and options that make a config fit for them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from data.demo import render_scene
from tests.conftest import PHOTOGRAPHS

FOLDER = Path(__file__).parents[1] / "transfer" / "segmentation"
CONFIGS = sorted(path for path in FOLDER.glob("configs/*/*.py") if path.parent.name != "_base_")
SIZE = 128


def photographs(count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of a small RGB image and its labels 0..26, 255 void: real ones where they lie beside the project."""
    masks = sorted((PHOTOGRAPHS / "semantic27" / "val2017").glob("*.png"))[:count]
    for mask in masks:
        image = Image.open(PHOTOGRAPHS / "val2017" / f"{mask.stem}.jpg").convert("RGB").resize((160, SIZE))
        yield np.array(image), np.array(Image.open(mask).resize((160, SIZE), Image.Resampling.NEAREST))
    for number in range(count - len(masks)):
        yield render_scene(0, "val", number, SIZE, 160)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def make_data(root: Path) -> Path:
    """`VOCdevkit`, `cityscapes` and `ade` of six images each, in their published layouts, below `root`."""
    voc, ade = root / "VOCdevkit" / "VOC2012", root / "ade" / "ADEChallengeData2016"
    lists: dict[str, list[str]] = {"train": [], "aug": [], "val": []}
    for number, (image, labels) in enumerate(photographs(6)):
        name, part = f"image_{number}", ("train", "aug", "val")[number // 2]
        void = labels == 255
        lists[part].append(name)
        masks = "SegmentationClassAug" if part == "aug" else "SegmentationClass"
        save(voc / "JPEGImages" / f"{name}.jpg", image)
        save(voc / masks / f"{name}.png", np.where(void, 255, labels % 21).astype(np.uint8))

        part = "val" if part == "val" else "train"
        save(root / "cityscapes" / "leftImg8bit" / part / "city" / f"{name}_leftImg8bit.png", image)
        masks = np.where(void, 255, labels % 19).astype(np.uint8)
        save(root / "cityscapes" / "gtFine" / part / "city" / f"{name}_gtFine_labelTrainIds.png", masks)

        part = "validation" if part == "val" else "training"
        save(ade / "images" / part / f"{name}.jpg", image)
        save(ade / "annotations" / part / f"{name}.png", np.where(void, 0, labels + 1).astype(np.uint8))
    (voc / "ImageSets" / "Segmentation").mkdir(parents=True)
    for part, names in lists.items():
        (voc / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("".join(f"{name}\n" for name in names))
    return root


def small(config: Path, iterations: int = 3) -> list[str]:
    """Options that make a config fit for a CPU: crops of 128 px, two images a step, a few steps."""
    loader = "train_dataloader.dataset"
    sets = [f"{loader}.datasets.{number}" for number in (0, 1)] if "voc" in config.name else [loader]
    options = [f"{dataset}.pipeline.2.scale=({2 * SIZE},{SIZE})" for dataset in sets]
    options += [f"{dataset}.pipeline.3.crop_size=({SIZE},{SIZE})" for dataset in sets]
    for part in ("val", "test"):
        options.append(f"{part}_dataloader.dataset.pipeline.1.scale=({2 * SIZE},{SIZE})")
        options.append(f"{part}_dataloader.num_workers=0")
    if "cityscapes" in config.name:
        options += [f"model.test_cfg.crop_size=({SIZE},{SIZE})", "model.test_cfg.stride=(86,86)"]
    options += [f"model.data_preprocessor.size=({SIZE},{SIZE})", "train_dataloader.num_workers=0"]
    options += ["auto_scale_lr.base_batch_size=2", "default_hooks.logger.interval=1"]
    options += [f"train_cfg.max_iters={iterations}", f"train_cfg.val_interval={iterations}"]
    return ["--cfg-options", *options, f"default_hooks.checkpoint.interval={iterations}"]
