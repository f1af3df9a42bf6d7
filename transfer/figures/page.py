"""One self-contained page with every prototype of a model: its nearest images, its usage, a search and an order."""

import base64
import html
import json
from collections import defaultdict
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from transfer.figures.looking import Observer
from transfer.figures.pictures import lit_regions
from transfer.figures.survey import Survey

_TEMPLATE = Path(__file__).with_name("page.html")
_LARGE, _SMALL, _MANY = 126, 98, 512
"""Sides of a picture in pixels: up to `_MANY` prototypes, and beyond."""
_QUALITY = 68
"""Of the JPEG pictures; one strip a prototype, for a file's tables weigh as much as a small picture."""


def build_page(observer: Observer, survey: Survey, alpha: float, facts: str) -> bytes:
    """The page; its size grows with the number of used prototypes and of nearest images, not with the data set's."""
    nearest = {prototype: survey.nearest.of(prototype) for prototype in range(len(survey.prototypes))}
    strips = _strips(
        observer, {prototype: [image for image, _ in found] for prototype, found in nearest.items()}, alpha
    )
    similar = _similar(survey.prototypes)
    shown = sorted({image for found in nearest.values() for image, _ in found})
    place = {image: number for number, image in enumerate(shown)}
    data = {
        "images": survey.images,
        "names": [observer.squares.name(image) for image in shown],
        "prototypes": [
            {
                "images": int(survey.images_using[prototype]),
                "area": round(float(survey.area[prototype]) / survey.images, 7),
                "nearest": [[place[image], round(score, 3)] for image, score in found],
                "similar": similar[prototype],
                "strip": strips.get(prototype, ""),
            }
            for prototype, found in nearest.items()
        ],
    }
    used = (
        f"{len(survey.used)} of {len(survey.prototypes)} prototypes used, {survey.slots_per_image:.1f} slots an image"
    )
    words = _TEMPLATE.read_text(encoding="utf-8")
    words = words.replace("{{facts}}", html.escape(facts)).replace("{{used}}", html.escape(used))
    return words.replace("{{data}}", _in_script(data)).encode()


def _in_script(data: dict[str, Any]) -> str:
    """JSON that no file name can end early: `</script>` has no `<` in it."""
    return json.dumps(data, separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c")


def _similar(prototypes: Tensor, count: int = 4) -> list[list[list[float]]]:
    """The closest other prototypes of each, and their cosines: K lists of [number, cosine]."""
    unit = F.normalize(prototypes.float(), dim=1)
    cosines = (unit @ unit.T).fill_diagonal_(-torch.inf)
    best, others = cosines.topk(min(count, len(unit) - 1), dim=1)
    return [
        [[number, round(cosine, 2)] for number, cosine in zip(*pair)] for pair in zip(others.tolist(), best.tolist())
    ]


def _strips(observer: Observer, nearest: dict[int, list[int]], alpha: float) -> dict[int, str]:
    """Each prototype's pictures side by side, as base64 of one JPEG."""
    about = _LARGE if len(nearest) <= _MANY else _SMALL
    waiting: dict[int, dict[int, Tensor]] = defaultdict(dict)
    strips = {}
    pictures = lit_regions(observer, nearest, about, alpha, what="pictures")
    for lit in pictures:
        waiting[lit.prototype][lit.rank] = lit.picture
        if len(waiting[lit.prototype]) == len(nearest[lit.prototype]):
            ranked = waiting.pop(lit.prototype)
            strips[lit.prototype] = _jpeg(torch.cat([ranked[rank] for rank in sorted(ranked)], dim=1))
    return strips


def _jpeg(picture: Tensor) -> str:
    file = BytesIO()
    Image.fromarray(picture.numpy()).save(file, format="jpeg", quality=_QUALITY, optimize=True)
    return base64.b64encode(file.getvalue()).decode()
