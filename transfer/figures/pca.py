"""Figure: images beside the first principal components of their patch features as colors."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from transfer.figures.extractor import FeatureExtractor
from transfer.figures.layout import shorten
from transfer.figures.principal_components import ComponentColors, fit_colors
from transfer.figures.regions import resample
from transfer.figures.strip_panels import Strip, draw_strips, pixels_per_image
from transfer.figures.tiles import enlarge, tile_side


def draw_pca(extractor: FeatureExtractor, indices: Sequence[int], dpi: int, details: str) -> Figure:
    """Draw each image beside the colors of its patches.

    Args:
        extractor: gives the images and their features.
        indices: of the images.
        dpi: pixels per inch.
        details: the text below the figure.
    """
    colors = fit_colors(extractor, indices)
    strips = []
    for batch in extractor.extract(indices, "rendering"):
        maps = colors.colors(batch.features).cpu()
        side = tile_side(maps.shape[3], pixels_per_image(dpi))
        for index, image, patches in zip(batch.indices.tolist(), resample(batch.images, side), enlarge(maps, side)):
            strips.append(Strip(shorten(extractor.crops.name(index), 36), (image, patches), ()))
    return draw_strips(strips, dpi, "PCA of patch features", f"{details}\n{describe_colors(colors)}")


def describe_colors(colors: ComponentColors) -> str:
    """Return in a sentence what the colors show."""
    shares = ", ".join(f"{100 * share:.0f}%" for share in colors.explained())
    return f"red, green, blue: the first three principal components of all patches ({shares} of the variance)"
