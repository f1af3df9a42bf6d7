"""Figure: query patches and their nearest patches in other images."""

from collections import defaultdict
from collections.abc import Sequence

from matplotlib.figure import Figure
from torch import Tensor

from transfer.figures.extractor import FeatureExtractor
from transfer.figures.layout import shorten
from transfer.figures.nearest_patches import collect_queries, find_matches, find_nearest
from transfer.figures.regions import resample
from transfer.figures.strip_panels import Strip, draw_strips, pixels_per_image
from transfer.figures.tiles import mark_patch, tile_side


def draw_patches(
    extractor: FeatureExtractor,
    query_images: Sequence[int],
    indices: Sequence[int],
    topk: int,
    seed: int,
    dpi: int,
    details: str,
) -> Figure:
    """Draw a patch of each query image, and the images with the most similar patches.

    Args:
        extractor: gives the images and their features.
        query_images: the images to draw a query patch in.
        indices: the images to search.
        topk: number of nearest patches, at most one in an image.
        seed: of the query patches.
        dpi: pixels per inch.
        details: the text below the figure.
    """
    queries = collect_queries(extractor, query_images, seed)
    nearest = find_nearest(extractor, queries, indices, topk)
    tiles: dict[int, dict[int, Tensor]] = defaultdict(dict)
    for batch, matches in find_matches(extractor, queries, nearest):
        map_side = batch.features.shape[3]
        images = resample(batch.images, tile_side(map_side, pixels_per_image(dpi)))
        for image, shown in zip(images, matches):
            for query, rank, position in shown:
                tiles[query][rank] = mark_patch(image, position, map_side)
    strips = []
    for query, index in enumerate(queries.indices.tolist()):
        scores = [f"{score:.3f}" for _, score in nearest.ranking(query)]
        title = shorten(extractor.crops.name(index), 36)
        strips.append(Strip(title, [tile for _, tile in sorted(tiles[query].items())], ["query", *scores]))
    details = f"{details}\ncosine similarity of the most similar patch of each of the nearest images"
    return draw_strips(strips, dpi, "Nearest patches in other images", details)
