"""Small datasets in the layouts of COCO and Cityscapes, as detectron2 reads them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from data.demo import GROUNDS, render_scene

WIDTH, HEIGHT = 192, 96


def make_coco(folder: Path, categories: list[dict[str, Any]]) -> None:
    """Write `train2017`, `val2017` and their annotations: the objects of rendered scenes, with their boxes as masks."""
    things = [category for category in categories if category.get("isthing", 1)]
    kept = [{"id": category["id"], "name": category["name"]} for category in things]
    for split, count in (("train", 6), ("val", 3)):
        annotations = folder / "annotations" / f"instances_{split}2017.json"
        write_scenes(folder / f"{split}2017", annotations, split, count, kept)


def make_custom_data(folder: Path) -> None:
    """Write `train.json`, `val.json` and the folders `train` and `val`: two classes, whose ids are not 1 and 2."""
    categories = [{"id": 40, "name": "second"}, {"id": 7, "name": "first"}]
    for split, count in (("train", 6), ("val", 3)):
        write_scenes(folder / split, folder / f"{split}.json", split, count, categories)


def write_scenes(
    folder: Path, annotations_file: Path, split: str, count: int, categories: list[dict[str, Any]]
) -> None:
    """Write images of rendered scenes, and the boxes of their objects in COCO's format."""
    folder.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(count):
        pixels, labels = render_scene(0, split, number, WIDTH, HEIGHT)
        name = f"{number:012}.jpg"
        Image.fromarray(pixels).save(folder / name)
        images.append({"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT})
        for label in np.unique(labels[labels >= len(GROUNDS)]):
            rows, columns = np.nonzero(labels == label)
            x, y, right, bottom = (int(value) for value in (columns.min(), rows.min(), columns.max(), rows.max()))
            polygon = [x, y, right + 1, y, right + 1, bottom + 1, x, bottom + 1]
            box = [x, y, right + 1 - x, bottom + 1 - y]
            category = categories[label % len(categories)]["id"]
            annotation = {"id": len(annotations) + 1, "image_id": number, "category_id": category}
            annotation |= {"bbox": box, "area": box[2] * box[3], "segmentation": [polygon], "iscrowd": 0}
            annotations.append(annotation)
    annotations_file.parent.mkdir(exist_ok=True)
    content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    annotations_file.write_text(json.dumps(content))


def make_cityscapes(folder: Path) -> None:
    """Write two training images and one for validation, each with two cars and a person."""
    for split, number in (("train", 0), ("train", 1), ("val", 2)):
        stem = f"town_{number:06}_000019"
        image, labels, instances = (Image.new(mode, (WIDTH, HEIGHT)) for mode in ("RGB", "L", "I"))
        objects = []
        for index, (name, label, x) in enumerate((("car", 26, 10), ("car", 26, 80), ("person", 24, 140))):
            box = [x + 5 * number, 20, x + 5 * number + 40, 80]
            ImageDraw.Draw(image).rectangle(box, fill=(200, 60 * index, 90))
            ImageDraw.Draw(labels).rectangle(box, fill=label)
            ImageDraw.Draw(instances).rectangle(box, fill=label * 1000 + index)
            polygon = [[box[0], box[1]], [box[2], box[1]], [box[2], box[3]], [box[0], box[3]]]
            objects.append({"label": name, "polygon": polygon})
        images, annotations = folder / "leftImg8bit" / split / "town", folder / "gtFine" / split / "town"
        images.mkdir(parents=True, exist_ok=True)
        annotations.mkdir(parents=True, exist_ok=True)
        image.save(images / f"{stem}_leftImg8bit.png")
        labels.save(annotations / f"{stem}_gtFine_labelIds.png")
        Image.fromarray(np.asarray(instances).astype(np.uint16)).save(annotations / f"{stem}_gtFine_instanceIds.png")
        polygons = {"imgHeight": HEIGHT, "imgWidth": WIDTH, "objects": objects}
        (annotations / f"{stem}_gtFine_polygons.json").write_text(json.dumps(polygons))
