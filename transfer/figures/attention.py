"""Figure: attention of a ViT's class token to the patches, in the last block."""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure

from transfer.figures.extractor import FeatureExtractor
from transfer.figures.layout import shorten
from transfer.figures.regions import resample
from transfer.figures.strip_panels import Strip, draw_strips, pixels_per_image
from transfer.figures.tiles import enlarge, tile_side, weight_colors


def draw_attention(extractor: FeatureExtractor, indices: Sequence[int], dpi: int, details: str) -> Figure:
    """Draw each image beside the attention of the class token: the mean of the heads, then each head.

    Args:
        extractor: gives the images and their attention.
        indices: of the images.
        dpi: pixels per inch.
        details: the text below the figure.
    """
    strips = []
    for batch in extractor.extract(indices, "rendering"):
        assert batch.attention is not None, "the encoder has no class token"
        heads = batch.attention.cpu()
        side = tile_side(heads.shape[3], pixels_per_image(dpi))
        captions = ["image", "mean", *(f"head {number}" for number in range(heads.shape[1]))]
        for index, image, weights in zip(batch.indices.tolist(), resample(batch.images, side), heads):
            maps = enlarge(weight_colors(torch.cat([weights.mean(dim=0, keepdim=True), weights])), side)
            strips.append(Strip(shorten(extractor.crops.name(index), 36), (image, *maps), captions))
    title = "Attention of the class token in the last block"
    return draw_strips(
        strips, dpi, title, f"{details}\neach map from its smallest weight (black) to its largest (yellow)"
    )
