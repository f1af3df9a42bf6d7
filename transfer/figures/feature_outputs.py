"""Write what shows the features of an encoder: figures, the page of images, and the export."""

import argparse
from collections.abc import Sequence

from matplotlib.figure import Figure

from transfer.figures.attention import draw_attention
from transfer.figures.extractor import FeatureExtractor
from transfer.figures.feature_export import export_features
from transfer.figures.image_page import build_image_page
from transfer.figures.loaded_model import LoadedModel
from transfer.figures.patches import draw_patches
from transfer.figures.pca import draw_pca
from transfer.figures.sampling import DEFAULT_SAMPLING, sample_sorted
from transfer.figures.vit_attention import has_class_token
from utils.files import write_output

_NUM_QUERIES = 200
"""Number of images on the page, and of those with a query patch in the export."""


def draw_features(
    args: argparse.Namespace, model: LoadedModel, extractor: FeatureExtractor, indices: Sequence[int]
) -> Figure:
    """Draw one of the figures of an encoder."""
    sampled = sample_sorted(indices, args.sampling or DEFAULT_SAMPLING, args.seed)
    if args.figure == "patches":
        details = model.describe(extractor.crops, args.dataset, len(indices))
        return draw_patches(extractor, sampled, indices, args.topk, args.seed, args.dpi, details)
    draw = {"pca": draw_pca, "attention": draw_attention}[args.figure]
    return draw(extractor, sampled, args.dpi, model.describe(extractor.crops, args.dataset, len(sampled)))


def write_features(
    args: argparse.Namespace, model: LoadedModel, extractor: FeatureExtractor, indices: Sequence[int]
) -> None:
    """Write the page and the export of a model without slots."""
    sampled = sample_sorted(indices, args.sampling or _NUM_QUERIES, args.seed)
    if args.html:
        details = model.describe(extractor.crops, args.dataset, len(indices))
        page = build_image_page(extractor, sampled, indices, args.topk, args.seed, details)
        write_output("--html", args.html, lambda file: file.write(page))
    if args.export:
        metadata = model.metadata(extractor.crops, args.dataset)
        has_attention = has_class_token(model.encoder)
        export_features(args.export, extractor, indices, sampled, args.topk, args.seed, metadata, has_attention)
