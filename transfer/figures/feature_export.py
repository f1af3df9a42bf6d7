"""Export patch features, their colors and the attention of the class token as files for other tools."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from transfer.figures.export_folder import ExportFolder, encode_npz
from transfer.figures.extractor import FeatureBatch, FeatureExtractor
from transfer.figures.nearest_images import NearestImages
from transfer.figures.nearest_patches import QueryPatches, collect_queries, find_matches, update_nearest
from transfer.figures.principal_components import ComponentColors, fit_colors
from transfer.figures.tiles import to_pixels

_README = """Patch features of {model} in {images} images.

features/NAME.npz   features: float16 (C, h, w), the output of the encoder;
                    crop: int64 (4,), x0 y0 x1 y1 of the square in pixels of the image that the map covers.
pca/NAME.png        the first three principal components of the features of all images as red, green and blue:
                    a square of one color for each position of the map; {side} x {side}.
{attention}images.csv          for each image: its file, the files above and the crop.
nearest_patches.csv for a query patch of each of {queries} images, the most similar patches in other images, at most one
                    in each; query_image, query_row, query_column: the query patch; rows and
                    columns of the map start at 0; rank, from 1; image, row, column: the patch at this rank;
                    score: the cosine similarity.
metadata.json       model, dataset and settings; the share of the variance along each component.
"""
_ATTENTION = """\
attention/NAME.npz  attention: float16 (heads, h, w), of the class token to the patches in the last block;
                    crop: as above.
"""


def export_features(
    folder: Path,
    extractor: FeatureExtractor,
    indices: Sequence[int],
    query_images: Sequence[int],
    topk: int,
    seed: int,
    metadata: dict[str, object],
    attention: bool,
) -> None:
    """Write the features of images, the colors by the principal components of all of them, and nearest patches.

    Args:
        folder: to write into.
        extractor: gives the images and their features.
        indices: of the images.
        query_images: those of the images whose query patches are searched for in all of them.
        topk: number of nearest patches, at most one in an image.
        seed: of the query patches.
        metadata: of the model and the images.
        attention: whether the encoder has a class token, whose attention is written as well.

    Raises:
        UsageError: a file cannot be written.
    """
    kinds = ("features", "pca", *(["attention"] if attention else []))
    files = ExportFolder(folder, extractor.crops, kinds)
    colors = fit_colors(extractor, indices)
    rows: list[Sequence[object]] = [("image", *kinds, "x0", "y0", "x1", "y1")]
    queries = collect_queries(extractor, query_images, seed)
    nearest = NearestImages(len(queries.indices), topk, queries.features.device)
    for batch in extractor.extract(indices, "exporting"):
        rows += _write_batch(files, batch, colors)
        update_nearest(nearest, queries, batch)
    files.write_table("nearest_patches.csv", _nearest_rows(extractor, queries, nearest))
    readme = _README.format(
        model=metadata["model"],
        images=len(rows) - 1,
        side=extractor.crops.size,
        queries=len(queries.indices),
        attention=_ATTENTION if attention else "",
    )
    explained = [round(share, 4) for share in colors.explained()]
    files.write_texts(rows, metadata | {"explained_variance": explained}, readme)


def _write_batch(files: ExportFolder, batch: FeatureBatch, colors: ComponentColors) -> list[Sequence[object]]:
    """Write the files of a batch, and return its rows of `images.csv`."""
    rows: list[Sequence[object]] = []
    # The size of a map does not always divide that of the image, with ResNets.
    colored = F.interpolate(colors.colors(batch.features).cpu(), files.crops.size, mode="nearest-exact")
    for position, (index, box) in enumerate(zip(batch.indices.tolist(), batch.boxes)):
        name = files.name(index)
        contents = {
            f"features/{name}.npz": encode_npz(features=_half(batch.features[position]), crop=box.numpy()),
            f"pca/{name}.png": _encode_png(to_pixels(colored[position])),
        }
        if batch.attention is not None:
            contents[f"attention/{name}.npz"] = encode_npz(attention=_half(batch.attention[position]), crop=box.numpy())
        for path, content in contents.items():
            files.write(path, content)
        rows.append((files.crops.name(index), *contents, *box.tolist()))
    return rows


def _nearest_rows(extractor: FeatureExtractor, queries: QueryPatches, nearest: NearestImages) -> list[Sequence[object]]:
    """Return the rows of `nearest_patches.csv`, in order of query and rank, below their head."""
    patches: dict[tuple[int, int], tuple[str, int, int]] = {}
    for batch, matches in find_matches(extractor, queries, nearest):
        for index, shown in zip(batch.indices.tolist(), matches):
            for query, rank, position in shown:
                patches[query, rank] = (extractor.crops.name(index), *divmod(position, batch.features.shape[3]))
    head = ("query_image", "query_row", "query_column", "rank", "image", "row", "column", "score")
    return [
        head,
        *(
            (*patches[query, 0], rank, *patches[query, rank], round(score, 5))
            for query in range(len(queries.indices))
            for rank, (_, score) in enumerate(nearest.ranking(query), start=1)
        ),
    ]


def _half(values: Tensor) -> np.ndarray:
    return values.half().cpu().numpy()


def _encode_png(pixels: Tensor) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels.numpy()).save(file, format="png")
    return file.getvalue()
