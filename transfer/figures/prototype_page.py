"""Build one self-contained HTML page with all prototypes: nearest images and usage, to search and sort."""

from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.colors import to_hex
from torch import Tensor

from transfer.figures.extractor import SlotExtractor
from transfer.figures.page_template import encode_jpeg, fill_template
from transfer.figures.prototype_stats import PrototypeStats
from transfer.figures.strips import render_strips
from utils.visualization import palette

_LARGE_SIDE, _SMALL_SIDE, _MAX_LARGE = 126, 98, 512
"""Sides of an image in pixels: up to `_MAX_LARGE` prototypes, and beyond."""


def build_page(extractor: SlotExtractor, stats: PrototypeStats, alpha: float, details: str) -> bytes:
    """Return the page; its size depends on the number of used prototypes and of nearest images, not on the dataset.

    Args:
        extractor: gives the images and their scores.
        stats: of the images.
        alpha: how much the images are darkened outside of a prototype's region.
        details: model and images in one line.
    """
    used = f"{len(stats.used)} of {len(stats.prototypes)} prototypes used, {stats.slots_per_image:.1f} slots per image"
    data = collect_data(extractor, stats, alpha)
    return fill_template("prototype_cards.js", "Nearest images of each prototype", f"{details} · {used}", data)


def collect_data(extractor: SlotExtractor, stats: PrototypeStats, alpha: float) -> dict[str, Any]:
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
