"""Read a COCO-style JSON file with its image folder, check it completely, and return what detectron2 trains on."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from data.datasets import check_folder
from transfer.detection.coco_annotation import to_annotation
from utils.errors import UsageError

_REQUIRED = {
    "images": {"id": int, "file_name": str},
    "categories": {"id": int, "name": str},
    "annotations": {"image_id": int, "category_id": int, "bbox": list},
}
"""The lists of a COCO-style file, and the fields that each of their entries must have."""

_ORIENTATION = 0x0112  # the EXIF tag; from 5 on, rows and columns are exchanged


@dataclass(frozen=True)
class CocoData:
    """A set of annotated images."""

    classes: list[str]
    """Names in the order of their ids."""
    content: dict[str, Any]
    """The same data in COCO's format, with the categories 1 to the number of classes and with every optional field."""
    num_ignored: int
    """Number of annotations that were left out, because their boxes have no area within their image."""

    @property
    def objects(self) -> list[dict[str, Any]]:
        """The annotations that a detector learns: those that do not mark a crowd."""
        return [annotation for annotation in self.content["annotations"] if not annotation["iscrowd"]]

    @property
    def num_training_images(self) -> int:
        """Number of images with at least one object; detectron2 does not train on the others."""
        return len({annotation["image_id"] for annotation in self.objects})

    @property
    def has_masks(self) -> bool:
        """Whether an object has a mask."""
        return any("segmentation" in annotation for annotation in self.objects)

    @property
    def without_mask(self) -> list[int]:
        """Positions in the file of the annotations without a mask; COCO's evaluation needs those of crowds as well."""
        return [annotation["id"] - 1 for annotation in self.content["annotations"] if "segmentation" not in annotation]

    @property
    def has_encoded_masks(self) -> bool:
        """Whether a mask is run-length encoded; the others are polygons."""
        return any(isinstance(annotation.get("segmentation"), dict) for annotation in self.objects)


def read_coco(split: str, path: Path, folder: Path, classes: list[str] | None = None) -> CocoData:
    """Read the file of --`split`-json and check it against the folder of --`split`-images.

    Args:
        split: `train` or `val`.
        classes: names of the training data, of which the file may have some; None for the training data itself.

    Raises:
        UsageError: the file or the folder is missing, the file is not COCO-style, an entry of it refers to something
            that is not there, or it has other categories than `classes`.
    """
    where = f"--{split}-json {path}"
    content = _load(where, path, ("images", "categories", "annotations"))
    names = _class_names(where, content)
    _check_references(where, content)
    check_folder(f"--{split}-images", folder)
    sizes = _read_sizes(f"--{split}-images {folder}", content["images"], folder)
    if classes is not None and (unknown := [name for name in names if name not in classes]):
        raise UsageError(f"{where}: category {unknown[0]!r} is not in --train-json; use the same categories")
    class_ids = {item["id"]: (classes or names).index(item["name"]) + 1 for item in content["categories"]}
    annotations = [
        to_annotation(where, number, annotation, class_ids, sizes[annotation["image_id"]])
        for number, annotation in enumerate(content["annotations"], start=1)
    ]
    kept = [annotation for annotation in annotations if annotation]
    if all(annotation["iscrowd"] for annotation in kept):
        raise UsageError(f"{where}: no object in it, only crowds or boxes without area; annotate its images")
    images = [
        {"id": image["id"], "file_name": image["file_name"], "width": width, "height": height}
        for image in content["images"]
        for width, height in [sizes[image["id"]]]
    ]
    listed = [{"id": number, "name": name} for number, name in enumerate(classes or names, start=1)]
    normalized = {"info": {}, "images": images, "categories": listed, "annotations": kept}
    return CocoData(classes or names, normalized, len(annotations) - len(kept))


def read_classes(path: Path) -> list[str]:
    """Read the class names of the file of --train-json, in the order of their ids; its images need not exist.

    Raises:
        UsageError: the file is missing, or its categories are not COCO-style.
    """
    where = f"--train-json {path}"
    return _class_names(where, _load(where, path, ("categories",)))


def _load(where: str, path: Path, keys: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return a file whose lists `keys` have the required fields, with their types."""
    if not path.is_file():
        raise UsageError(f"{where}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{where}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: invalid JSON ({error})") from None
    for key in keys:
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise UsageError(f"{where}: not COCO-style, because it has no list {key!r}")
        if not entries:
            raise UsageError(f"{where}: the list {key!r} is empty")
        for number, entry in enumerate(entries):
            for field, kind in _REQUIRED[key].items():
                if not isinstance(entry, dict) or type(entry.get(field)) is not kind:
                    kinds = {int: "a whole number", str: "a string", list: "a list"}
                    raise UsageError(f"{where}: not COCO-style, because {key}[{number}].{field} is not {kinds[kind]}")
    return content


def _class_names(where: str, content: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return the names of the categories, which have to be unique, in the order of their ids."""
    for field in ("id", "name"):
        _check_unique(where, content, "categories", field)
    return [category["name"] for category in sorted(content["categories"], key=lambda category: category["id"])]


def _check_unique(where: str, content: dict[str, list[dict[str, Any]]], key: str, field: str) -> None:
    value, count = Counter(entry[field] for entry in content[key]).most_common(1)[0]
    if count > 1:
        raise UsageError(f"{where}: {count} of the {key} have the {field} {value!r}; it must be unique")


def _check_references(where: str, content: dict[str, list[dict[str, Any]]]) -> None:
    """Check that the ids of images are unique and that annotations refer to existing images and categories."""
    _check_unique(where, content, "images", "id")
    for key, field in (("images", "image_id"), ("categories", "category_id")):
        known = {entry["id"] for entry in content[key]}
        unknown = [entry[field] for entry in content["annotations"] if entry[field] not in known]
        if unknown:
            raise UsageError(
                f"{where}: {len(unknown)} of {len(content['annotations'])} annotations refer to {key} that are not in "
                f"the file; the first has {field} {unknown[0]}"
            )


def _read_sizes(where: str, images: list[dict[str, Any]], folder: Path) -> dict[int, tuple[int, int]]:
    """Return width and height of each image by its id, from the headers of the files, which all have to exist."""
    missing = [image["file_name"] for image in images if not (folder / image["file_name"]).is_file()]
    if missing:
        raise UsageError(f"{where}: {len(missing)} of {len(images)} images are missing, the first is {missing[0]}")
    sizes = {}
    for image in images:
        name = image["file_name"]
        try:
            with Image.open(folder / name) as file:
                exchanged = file.getexif().get(_ORIENTATION, 1) >= 5
                sizes[image["id"]] = file.size[::-1] if exchanged else file.size
        except Exception:  # a damaged file raises errors of many types
            raise UsageError(f"{where}: {name} is not an image that can be read") from None
        width, height = sizes[image["id"]]
        stated = (image.get("width") or width, image.get("height") or height)
        if stated != (width, height):
            raise UsageError(f"{where}: {name} is {width} x {height}, and by the JSON {stated[0]} x {stated[1]} pixels")
    return sizes
