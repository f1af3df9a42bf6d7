"""Decode JPEG files on the device (nvJPEG), and crop and resize the views there.

Crops, flips, rotations and colors are those of `data.views.make_views`. The pixels differ a little: libjpeg
interpolates subsampled chroma where nvJPEG repeats it, and `data.views.resample` rounds after each of the two passes of
the filter, `decode_views` only once.
"""

import io
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from data.views import Box, rgb_pixels
from utils.batch import Batch, EncodedImages
from utils.device import to_device
from utils.view_recipes import ViewRecipe

MAX_REDUCTION = 16
"""Largest ratio of the longer side of a crop to the side of its view that is resampled in one pass."""
CHUNK = 64
"""Crops resampled at a time, which bounds the memory of their float32 copies."""


class EncodedImage(NamedTuple):
    """An image as a worker sends it for decoding on the device: a JPEG file, or decoded pixels."""

    size: tuple[int, int]
    """Width and height in pixels."""
    data: Tensor
    """uint8: a JPEG file (n,), or pixels (3, H, W)."""
    name: str
    """The name of its file."""


def read_encoded(path: Path) -> EncodedImage:
    """Read a JPEG file undecoded, with its size from the header; decode what nvJPEG reads differently from Pillow.

    Damage inside the compressed data shows only when it is decoded.

    Raises:
        OSError, among others: Pillow cannot read the header, or the file is truncated.
    """
    data = path.read_bytes()
    file = io.BytesIO(data)
    with Image.open(file) as image:
        if not _is_for_nvjpeg(image):
            return pixel_image(image, str(path))
        scan = file.tell()  # after the header, which may hold a thumbnail with an end marker of its own
        if data.rfind(b"\xff\xd9", scan) < 0:
            raise OSError("image file is truncated")
        return EncodedImage(image.size, torch.frombuffer(bytearray(data), dtype=torch.uint8), str(path))


def _is_for_nvjpeg(image: Image.Image) -> bool:
    """Whether nvJPEG decodes an image as libjpeg does: gray or YCbCr, not RGB stored without a color transform."""
    if not isinstance(image, JpegImageFile) or image.format != "JPEG":  # MPO files hold several images
        return False
    components = bytes(component[0] for component in image.layer)
    stored_as_rgb = image.info.get("adobe_transform") == 0 or components == b"RGB"
    return image.mode == "L" or (image.mode == "RGB" and not stored_as_rgb)


def pixel_image(image: Image.Image, name: str = "") -> EncodedImage:
    """Return the decoded pixels of an image of any mode."""
    pixels = np.array(rgb_pixels(image).transpose(2, 0, 1), order="C")
    return EncodedImage(image.size, torch.from_numpy(pixels), name)


def pack(images: Sequence[EncodedImage]) -> EncodedImages:
    """Concatenate the images of a batch into one tensor."""
    data = torch.cat([image.data.flatten() for image in images])
    return EncodedImages(data, [tuple(image.data.shape) for image in images], [image.name for image in images])


def decode_views(batch: Batch, recipes: Sequence[ViewRecipe], device: torch.device | str) -> Batch:
    """Decode the images of a batch, and crop and resize their V views (B, 3, S_v, S_v) uint8 on `device`.

    A batch that already has its views is returned unchanged. The geometry of the batch stays on the host. The host
    waits for the current stream and for the decoder. A file that turns out to be damaged becomes a black image and is
    added to `unreadable`.
    """
    if batch.encoded is None:
        return batch
    device = torch.device(device)
    images, unreadable = _decode(batch.encoded, device)
    boxes, flips = batch.crops.int().tolist(), to_device(batch.flips, device)
    views = []
    for number, recipe in enumerate(recipes):
        view = _crop_and_resize(images, [crops[number] for crops in boxes], flips[:, number], recipe)
        views.append(_rotate(view, batch.rotations[:, number].tolist()) if recipe.rotate else view)
    return replace(batch, views=views, encoded=None, unreadable=(*batch.unreadable, *unreadable))


def _decode(encoded: EncodedImages, device: torch.device) -> tuple[list[Tensor], list[str]]:
    """Return B images (3, H, W) uint8 on the device, and the names of the files that are damaged."""
    images, unreadable = encoded.unpack(), []
    jpegs = [number for number, image in enumerate(images) if image.dim() == 1]
    try:
        for number, image in zip(jpegs, _decode_jpegs([images[number] for number in jpegs], device)):
            images[number] = image
    except RuntimeError as error:  # one damaged image fails a whole batch
        warnings.warn(f"--decode gpu: decoding a batch on the host instead ({error})", stacklevel=3)
        for number in jpegs:
            images[number], readable = _decode_on_host(images[number])
            unreadable += [] if readable else [encoded.names[number]]
    return [image if image.is_cuda else to_device(image, device) for image in images], unreadable


def _decode_jpegs(files: list[Tensor], device: torch.device) -> list[Tensor]:
    if device.type == "cuda":
        # nvJPEG ignores stream order (pytorch/vision#9606): it may write into memory that was freed on this stream
        # and that queued work still reads.
        torch.cuda.current_stream(device).synchronize()
    return decode_jpeg(files, mode=ImageReadMode.RGB, device=device) if files else []


def _decode_on_host(file: Tensor) -> tuple[Tensor, bool]:
    """Decode a JPEG file with Pillow: pixels (3, H, W), black if it is damaged, and whether it could be read."""
    with Image.open(io.BytesIO(file.numpy().tobytes())) as image:
        try:
            return pixel_image(image).data, True
        except Exception:  # damaged files make the decoders of Pillow raise nearly any exception
            width, height = image.size
            return torch.zeros(3, height, width, dtype=torch.uint8), False


def _crop_and_resize(images: list[Tensor], boxes: list[Box], flips: Tensor, recipe: ViewRecipe) -> Tensor:
    """Crop images (3, H, W) uint8, resample the crops to squares and flip where asked: (B, 3, size, size) uint8.

    Compared with `data.views.resample` on the same pixels, 15 % of the values differ by one level, fewer than 0.1 %
    by more.
    """
    parts, size, mode = [], recipe.size, recipe.interpolation
    for first in range(0, len(images), CHUNK):
        chunk = zip(images[first : first + CHUNK], boxes[first : first + CHUNK])
        crops = [_reduce(image[None, :, y0:y1, x0:x1].float(), size) for image, (x0, y0, x1, y1) in chunk]
        squares = [F.interpolate(crop, (size, size), mode=mode, antialias=True) for crop in crops]
        parts.append(torch.cat(squares).round_().clamp_(0, 255).to(torch.uint8))
    views = torch.cat(parts)
    return torch.where(flips[:, None, None, None], views.flip(3), views)


def _rotate(views: Tensor, rotations: list[int]) -> Tensor:
    """Rotate views (B, 3, S, S) by their numbers of counter-clockwise quarter turns."""
    return torch.stack([view.rot90(rotation, (1, 2)) for view, rotation in zip(views, rotations)])


def _reduce(crop: Tensor, size: int) -> Tensor:
    """Average the pixels of a crop (1, 3, H, W) that is more than `MAX_REDUCTION` times its view (a CUDA limit)."""
    factor = -(-max(crop.shape[2:]) // (MAX_REDUCTION * size))
    return F.avg_pool2d(crop, factor, ceil_mode=True, count_include_pad=False) if factor > 1 else crop
