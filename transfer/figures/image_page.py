"""Build one self-contained HTML page with the features of images: PCA, attention and nearest patches."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from transfer.figures.extractor import FeatureBatch, FeatureExtractor
from transfer.figures.nearest_images import NearestImages
from transfer.figures.nearest_patches import QueryCollector, QueryPatches, find_matches, find_nearest
from transfer.figures.page_template import encode_jpeg, fill_template
from transfer.figures.principal_components import ComponentColors, PrincipalComponents
from transfer.figures.regions import resample
from transfer.figures.tiles import enlarge, mark_patch, tile_side, to_pixels, weight_colors

_VIEW_SIDE, _PATCH_SIDE = 196, 126
"""Sides in pixels of an image with its PCA and attention, and of one with a nearest patch."""


def build_image_page(
    extractor: FeatureExtractor, shown: Sequence[int], indices: Sequence[int], topk: int, seed: int, details: str
) -> bytes:
    """Return the page; its size depends on the number of shown images and of nearest patches, not on the dataset.

    Args:
        extractor: gives the images and their features.
        shown: the images that have a card.
        indices: the images that are searched for nearest patches.
        topk: number of nearest patches, at most one in an image.
        seed: of the query patches.
        details: model and images in one line.
    """
    data = collect_cards(extractor, shown, indices, topk, seed)
    return fill_template("image_cards.js", "Patch features of images", details, data)


def collect_cards(
    extractor: FeatureExtractor, shown: Sequence[int], indices: Sequence[int], topk: int, seed: int
) -> dict[str, Any]:
    """Return what the page shows, as JSON: `names` of the images, titles of the `views`, and the `cards`.

    Of each card: `image` (an index into `names`), `nearest` (pairs of an index into `names` and a cosine similarity),
    and `strips` (the views, and the nearest patches, side by side as JPEGs in base64).
    """
    collector, components = QueryCollector(seed), PrincipalComponents()
    for batch in extractor.extract(shown, "extracting"):
        collector.update(batch)
        components.update(batch.features)
    queries = collector.collect()
    nearest = find_nearest(extractor, queries, indices, topk)
    titles, strips = render_cards(extractor, queries, nearest, components.fit())
    images = queries.indices.tolist()
    rankings = [nearest.ranking(query) for query in range(len(images))]
    named = sorted({*images, *(index for ranking in rankings for index, _ in ranking)})
    position = {index: number for number, index in enumerate(named)}
    cards = [
        {
            "image": position[image],
            "nearest": [[position[index], round(score, 3)] for index, score in ranking],
            "strips": strips[query],
        }
        for query, (image, ranking) in enumerate(zip(images, rankings))
    ]
    return {"names": [extractor.crops.name(index) for index in named], "views": titles, "cards": cards}


def render_cards(
    extractor: FeatureExtractor, queries: QueryPatches, nearest: NearestImages, colors: ComponentColors
) -> tuple[list[str], dict[int, list[str]]]:
    """Return the titles of the views, and for each query the strips of its views and of its nearest patches."""
    titles: list[str] = []
    views: dict[int, str] = {}
    patches: dict[int, dict[int, Tensor]] = defaultdict(dict)
    for batch, matches in find_matches(extractor, queries, nearest):
        titles = ["image", "PCA", *(["attention"] if batch.attention is not None else [])]
        map_side = batch.features.shape[3]
        images = resample(batch.images, tile_side(map_side, _PATCH_SIDE))
        for row, (image, shown) in enumerate(zip(images, matches)):
            for query, rank, position in shown:
                if rank == 0:
                    views[query] = encode_jpeg(to_pixels(torch.cat(_render_views(batch, row, colors, position), dim=2)))
                else:
                    patches[query][rank] = to_pixels(mark_patch(image, position, map_side))
    strips = {query: [views[query]] for query in sorted(views)}
    for query, tiles in patches.items():
        strips[query].append(encode_jpeg(torch.cat([tile for _, tile in sorted(tiles.items())], dim=1)))
    return titles, strips


def _render_views(batch: FeatureBatch, row: int, colors: ComponentColors, position: int) -> list[Tensor]:
    """Return one image of a batch with its query patch marked, its PCA, and its attention if there is one."""
    maps = colors.colors(batch.features[row : row + 1]).cpu()
    map_side = maps.shape[3]
    side = tile_side(map_side, _VIEW_SIDE)
    views = [mark_patch(resample(batch.images[row : row + 1], side)[0], position, map_side), enlarge(maps[0], side)]
    if batch.attention is not None:
        weights = batch.attention[row].mean(dim=0, keepdim=True).cpu()
        views.append(enlarge(weight_colors(weights)[0], side))
    return views
