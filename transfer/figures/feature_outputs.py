"""Write what shows the features of an encoder: figures, the page of images, and the export."""

import argparse
from collections.abc import Sequence

from matplotlib.figure import Figure

from data.datasets import evenly_spaced
from transfer.figures.attention import draw_attention
from transfer.figures.extractor import FeatureExtractor
from transfer.figures.feature_export import export_features
from transfer.figures.image_page import build_image_page
from transfer.figures.loaded_model import LoadedModel
from transfer.figures.patches import draw_patches
from transfer.figures.pca import draw_pca
from transfer.figures.sampling import DEFAULT_SAMPLING, sample_sorted
from transfer.figures.vit_attention import has_class_token
from utils.errors import UsageError
from utils.files import write_output

_PAGE_IMAGES = 200


def draw_features(
    args: argparse.Namespace, model: LoadedModel, extractor: FeatureExtractor, indices: Sequence[int]
) -> Figure:
    """Draw one of the figures of an encoder.

    Raises:
        UsageError: there is only one image, and the figure needs others.
    """
    if args.figure == "patches" and len(indices) == 1:
        raise UsageError("--figure patches: there is only one image; use a larger --max-images or --data-dir")
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
    if args.html:
        sampled = evenly_spaced(len(indices), args.sampling or _PAGE_IMAGES)
        details = model.describe(extractor.crops, args.dataset, len(indices))
        shown = [indices[position] for position in sampled]
        page = build_image_page(extractor, shown, indices, args.topk, args.seed, details)
        write_output("--html", args.html, lambda file: file.write(page))
    if args.export:
        metadata = model.metadata(extractor.crops, args.dataset)
        export_features(args.export, extractor, indices, metadata, has_class_token(model.encoder))
