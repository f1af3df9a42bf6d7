"""Check an annotation of a COCO-style file, and complete its optional fields."""

import math
from collections.abc import Sequence
from typing import Any

from utils.errors import UsageError


def to_annotation(
    where: str, number: int, annotation: dict[str, Any], class_ids: dict[int, int], size: tuple[int, int]
) -> dict[str, Any] | None:
    """Return an annotation with all of COCO's fields; None if its box or mask has no area within the image.

    Args:
        where: the flag and its file, which begin a message.
        number: the position of the annotation in the file, from 1 on, which becomes its id.
        class_ids: category id of the file -> that of the result.
        size: width and height of the image.

    Raises:
        UsageError: a field of the annotation is invalid.
    """
    described = f"{where}: annotation {annotation.get('id', number)}"
    box, (width, height) = annotation["bbox"], size
    if len(box) != 4 or not _are_numbers(box):
        raise UsageError(f"{described}: its bbox {box} is not [x, y, width, height]")
    right, bottom = min(box[0] + box[2], width), min(box[1] + box[3], height)
    if right <= max(box[0], 0) or bottom <= max(box[1], 0):
        return None
    area = annotation.get("area", box[2] * box[3])
    if not _are_numbers([area]):
        raise UsageError(f"{described}: its area {area!r} is not a number")
    result = {
        "id": number,  # COCO's evaluation takes an object with the id 0 for one that was not found
        "image_id": annotation["image_id"],
        "category_id": class_ids[annotation["category_id"]],
        "bbox": box,
        "area": area,
        "iscrowd": int(_is_crowd(described, annotation)),
    }
    if not annotation.get("segmentation"):
        return result
    mask = _to_mask(described, annotation["segmentation"], size)
    return result | {"segmentation": mask} if mask else None


def _is_crowd(described: str, annotation: dict[str, Any]) -> bool:
    """Return whether an annotation marks a crowd, or objects that the evaluation ignores in the same way."""
    values = {field: annotation.get(field, 0) for field in ("iscrowd", "ignore")}
    for field, value in values.items():
        if value not in (0, 1):
            raise UsageError(f"{described}: its {field} {value!r} is not 0 or 1")
    return any(values.values())


def _to_mask(described: str, mask: Any, size: tuple[int, int]) -> list[list[float]] | dict[str, Any] | None:
    """Return a mask as a run-length code or as its polygons of at least three points; None if it has none of these."""
    width, height = size
    if isinstance(mask, dict):
        counts = mask.get("counts")
        is_code = isinstance(counts, str) or (isinstance(counts, list) and _are_numbers(counts))
        if not is_code or mask.get("size") != [height, width]:
            raise UsageError(f"{described}: its segmentation is not a run-length code of size [{height}, {width}]")
        if isinstance(counts, list) and sum(counts) != width * height:
            raise UsageError(f"{described}: the counts of its segmentation do not add up to {width} x {height} pixels")
        return {"size": [height, width], "counts": counts}
    if not isinstance(mask, list) or not all(isinstance(part, list) and _are_numbers(part) for part in mask):
        raise UsageError(f"{described}: its segmentation is neither a list of polygons nor a run-length code")
    return [part for part in mask if len(part) >= 6 and len(part) % 2 == 0] or None


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(type(value) in (int, float) and math.isfinite(value) for value in values)
