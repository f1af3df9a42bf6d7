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
from transfer.figures.pca import fit_colors
from transfer.figures.principal_components import ComponentColors
from utils.visualization import to_uint8

_README = """Patch features of {model} in {images} images.

features/NAME.npz   features: float16 (C, h, w), the output of the encoder;
                    crop: int64 (4,), x0 y0 x1 y1 of the square in pixels of the image that the map covers.
pca/NAME.png        the first three principal components of the features of all images as red, green and blue:
                    a square of one color for each position of the map; {side} x {side}.
{attention}images.csv          for each image: its file, the files above and the crop.
metadata.json       model, dataset and settings; the share of the variance along each component.
"""
_ATTENTION = """\
attention/NAME.npz  attention: float16 (heads, h, w), of the class token to the patches in the last block;
                    crop: as above.
"""


def export_features(
    folder: Path, extractor: FeatureExtractor, indices: Sequence[int], metadata: dict[str, object], attention: bool
) -> None:
    """Write the features of images, and the colors by the principal components of all of them.

    Args:
        folder: to write into.
        extractor: gives the images and their features.
        indices: of the images.
        metadata: of the model and the images.
        attention: whether the encoder has a class token, whose attention is written as well.

    Raises:
        UsageError: a file cannot be written.
    """
    kinds = ("features", "pca", *(["attention"] if attention else []))
    files = ExportFolder(folder, extractor.crops, kinds)
    colors = fit_colors(extractor, indices)
    rows: list[Sequence[object]] = [("image", *kinds, "x0", "y0", "x1", "y1")]
    for batch in extractor.extract(indices, "exporting"):
        rows += _write_batch(files, batch, colors)
    readme = _README.format(
        model=metadata["model"],
        images=len(rows) - 1,
        side=extractor.crops.size,
        attention=_ATTENTION if attention else "",
    )
    explained = [round(share, 4) for share in colors.explained()]
    files.write_texts(rows, metadata | {"explained_variance": explained}, readme)


def _write_batch(files: ExportFolder, batch: FeatureBatch, colors: ComponentColors) -> list[Sequence[object]]:
    """Write the files of a batch, and return its rows of `images.csv`."""
    rows: list[Sequence[object]] = []
    colored = F.interpolate(colors.colors(batch.features).cpu(), files.crops.size, mode="nearest-exact")
    pixels = to_uint8(colored)
    for position, (index, box) in enumerate(zip(batch.indices.tolist(), batch.boxes)):
        name = files.name(index)
        contents = {
            f"features/{name}.npz": encode_npz(features=_half(batch.features[position]), crop=box.numpy()),
            f"pca/{name}.png": _encode_png(pixels[position]),
        }
        if batch.attention is not None:
            contents[f"attention/{name}.npz"] = encode_npz(attention=_half(batch.attention[position]), crop=box.numpy())
        for path, content in contents.items():
            files.write(path, content)
        rows.append((files.crops.name(index), *contents, *box.tolist()))
    return rows


def _half(values: Tensor) -> np.ndarray:
    return values.half().cpu().numpy()


def _encode_png(pixels: Tensor) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, format="png")
    return file.getvalue()
