"""Build one self-contained HTML page with all prototypes: nearest images and usage, to search and sort."""

import base64
import html
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.colors import to_hex
from PIL import Image
from torch import Tensor

from transfer.figures.extractor import FeatureExtractor
from transfer.figures.prototype_stats import PrototypeStats
from transfer.figures.strips import render_strips
from utils.visualization import palette

_TEMPLATE = Path(__file__).with_name("page.html")
_LARGE_SIDE, _SMALL_SIDE, _MAX_LARGE = 126, 98, 512
"""Sides of an image in pixels: up to `_MAX_LARGE` prototypes, and beyond."""
_QUALITY = 68
"""JPEG quality. The images of a prototype share one file, whose header is as large as a small image."""


def build_page(extractor: FeatureExtractor, stats: PrototypeStats, alpha: float, details: str) -> bytes:
    """Return the page; its size depends on the number of used prototypes and of nearest images, not on the dataset.

    Args:
        extractor: gives the images and their scores.
        stats: of the images.
        alpha: how much the images are darkened outside of a prototype's region.
        details: model and images in one line.
    """
    used = f"{len(stats.used)} of {len(stats.prototypes)} prototypes used, {stats.slots_per_image:.1f} slots per image"
    page = _TEMPLATE.read_text(encoding="utf-8")
    page = page.replace("{{details}}", html.escape(details)).replace("{{used}}", html.escape(used))
    # JSON inside a script element: without "<", no file name can end the element.
    data = json.dumps(collect_data(extractor, stats, alpha), separators=(",", ":")).replace("<", "\\u003c")
    return page.replace("{{data}}", data).encode()


def collect_data(extractor: FeatureExtractor, stats: PrototypeStats, alpha: float) -> dict[str, Any]:
    """Return what the page shows, as JSON: `images` (how many), `names` of the shown ones, and the `prototypes`.

    Of each prototype: `color` (as `#rrggbb`), `images` (how many use it), `area` (share of all images), `nearest`
    (pairs of an index into `names` and a cosine similarity), `similar` (pairs of a prototype and a cosine similarity)
    and `strip` (the nearest images side by side as a JPEG in base64).
    """
    rankings = {prototype: stats.nearest.ranking(prototype) for prototype in range(len(stats.prototypes))}
    side = _LARGE_SIDE if len(rankings) <= _MAX_LARGE else _SMALL_SIDE
    strips = {prototype: encode_jpeg(strip) for prototype, strip in render_strips(extractor, rankings, side, alpha)}
    similar = most_similar(stats.prototypes)
    shown = sorted({index for ranking in rankings.values() for index, _ in ranking})
    position = {index: number for number, index in enumerate(shown)}
    colors = [to_hex(color) for color in palette(len(rankings)).tolist()]
    prototypes = [
        {
            "color": colors[prototype],
            "images": int(stats.image_counts[prototype]),
            "area": round(float(stats.area[prototype]) / stats.num_images, 7),
            "nearest": [[position[index], round(score, 3)] for index, score in ranking],
            "similar": similar[prototype],
            "strip": strips.get(prototype, ""),
        }
        for prototype, ranking in rankings.items()
    ]
    names = [extractor.crops.name(index) for index in shown]
    return {"images": stats.num_images, "names": names, "prototypes": prototypes}


def most_similar(prototypes: Tensor, count: int = 4) -> list[list[list[float]]]:
    """Return the `count` most similar other prototypes of each: K lists of [number, cosine similarity]."""
    unit = F.normalize(prototypes.float(), dim=1)
    cosines = (unit @ unit.T).fill_diagonal_(-torch.inf)
    values, indices = cosines.topk(min(count, len(unit) - 1), dim=1)
    return [
        [[number, round(cosine, 2)] for number, cosine in zip(*row)] for row in zip(indices.tolist(), values.tolist())
    ]


def encode_jpeg(pixels: Tensor) -> str:
    """Encode pixels (H, W, 3) uint8 as a JPEG in base64."""
    file = BytesIO()
    Image.fromarray(pixels.numpy()).save(file, format="jpeg", quality=_QUALITY, optimize=True)
    return base64.b64encode(file.getvalue()).decode()
