"""JPEGs decoded on the device: what a worker sends instead of views, and the views that are cut from it.

The facts are those of `data.views.make_views`. Its pixels come by libjpeg, which interpolates subsampled color, and
are rounded between the two passes of the filter; nvJPEG repeats subsampled color, and `decode_views` rounds once.
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

from data.color import to_device
from data.views import Box, ViewRecipe, rgb_pixels
from utils.batch import Batch, Sources

COARSEST = 16
"""Sides of a square to the longer side of its crop, beyond which pixels are averaged first."""
CHUNK = 64
"""Crops resampled at a time: bounds the float32 copies of them."""


class Source(NamedTuple):
    """An image whose views are still to be cut."""

    size: tuple[int, int]
    """Width and height in pixels."""
    data: Tensor
    """uint8: a JPEG file (n,), or pixels (3, H, W)."""
    name: str
    """Its file."""


def read_source(path: Path) -> Source:
    """A JPEG as it is, its size from the header; pixels of what nvJPEG does not read as Pillow does.

    Damage inside the compressed data shows only when it is decoded.

    Raises:
        OSError, among others: Pillow cannot read the header, or the file has no end.
    """
    data = path.read_bytes()
    file = io.BytesIO(data)
    with Image.open(file) as image:
        if not _is_for_nvjpeg(image):
            return pixel_source(image, str(path))
        scan = file.tell()  # behind the header, which may hold a thumbnail with an end of its own
        if data.rfind(b"\xff\xd9", scan) < 0:
            raise OSError("image file is truncated")
        return Source(image.size, torch.frombuffer(bytearray(data), dtype=torch.uint8), str(path))


def _is_for_nvjpeg(image: Image.Image) -> bool:
    """Gray or YCbCr: nvJPEG does not promise to see what libjpeg takes for stored RGB."""
    if not isinstance(image, JpegImageFile) or image.format != "JPEG":  # MPO holds several
        return False
    components = bytes(component[0] for component in image.layer)
    stored_as_rgb = image.info.get("adobe_transform") == 0 or components == b"RGB"
    return image.mode == "L" or (image.mode == "RGB" and not stored_as_rgb)


def pixel_source(image: Image.Image, name: str = "") -> Source:
    """The pixels of an image of any mode."""
    pixels = np.array(rgb_pixels(image).transpose(2, 0, 1), order="C")
    return Source(image.size, torch.from_numpy(pixels), name)


def pack(sources: Sequence[Source]) -> Sources:
    """The images of a batch in one tensor."""
    data = torch.cat([source.data.flatten() for source in sources])
    return Sources(data, [tuple(source.data.shape) for source in sources], [source.name for source in sources])


def decode_views(batch: Batch, recipes: Sequence[ViewRecipe], device: torch.device | str) -> Batch:
    """The batch with its V views (B, 3, S_v, S_v) uint8 on `device`; a batch that has them comes back as it is.

    Its facts have to be on the host still, and stay there. The host waits for the current stream and for the
    decoder. Files that prove unreadable become black and are added to `unreadable`: no other image can be read here.
    """
    if batch.sources is None:
        return batch
    device = torch.device(device)
    images, unreadable = _decode(batch.sources, device)
    boxes, flips = batch.crops.int().tolist(), to_device(batch.flips, device)
    views = [
        _cut(images, [crops[number] for crops in boxes], flips[:, number], recipe.size)
        for number, recipe in enumerate(recipes)
    ]
    return replace(batch, views=views, sources=None, unreadable=(*batch.unreadable, *unreadable))


def _decode(sources: Sources, device: torch.device) -> tuple[list[Tensor], list[str]]:
    """B images (3, H, W) uint8 on the device, and the files among them that cannot be read."""
    images, unreadable = sources.images(), []
    encoded = [number for number, image in enumerate(images) if image.dim() == 1]
    try:
        for number, image in zip(encoded, _decode_jpegs([images[number] for number in encoded], device)):
            images[number] = image
    except RuntimeError as error:  # one image fails a whole batch
        warnings.warn(f"--decode gpu: a batch is decoded on the host, for {error}", stacklevel=3)
        for number in encoded:
            images[number], readable = _decode_on_host(images[number])
            unreadable += [] if readable else [sources.names[number]]
    return [image if image.is_cuda else to_device(image, device) for image in images], unreadable


def _decode_jpegs(files: list[Tensor], device: torch.device) -> list[Tensor]:
    if device.type == "cuda":
        # nvJPEG writes at once, whatever is queued on any stream (pytorch/vision#9606): into memory, too, that was
        # freed on this stream and that its queued work still reads.
        torch.cuda.current_stream(device).synchronize()
    return decode_jpeg(files, mode=ImageReadMode.RGB, device=device) if files else []


def _decode_on_host(file: Tensor) -> tuple[Tensor, bool]:
    """Pixels (3, H, W) of a JPEG by Pillow, and whether it can be read: if not, they are black."""
    with Image.open(io.BytesIO(file.numpy().tobytes())) as image:
        try:
            return pixel_source(image).data, True
        except Exception:  # damaged files make Pillow's decoders raise nearly anything
            width, height = image.size
            return torch.zeros(3, height, width, dtype=torch.uint8), False


def _cut(images: list[Tensor], boxes: list[Box], flips: Tensor, size: int) -> Tensor:
    """Crop images (3, H, W) uint8, resample to squares, mirror where asked: (B, 3, size, size) uint8.

    Of the values `data.views.cut` has of the same pixels, 15 % differ by one level, fewer than 0.1 % by more.
    """
    parts = []
    for first in range(0, len(images), CHUNK):
        chunk = zip(images[first : first + CHUNK], boxes[first : first + CHUNK])
        crops = [image[None, :, y0:y1, x0:x1].float() for image, (x0, y0, x1, y1) in chunk]
        squares = [F.interpolate(_coarse(crop, size), (size, size), mode="bicubic", antialias=True) for crop in crops]
        parts.append(torch.cat(squares).round_().clamp_(0, 255).to(torch.uint8))
    views = torch.cat(parts)
    return torch.where(flips[:, None, None, None], views.flip(3), views)


def _coarse(crop: Tensor, size: int) -> Tensor:
    """A crop (1, 3, H, W) whose sides are at most `COARSEST` times the square's: far beyond, CUDA's filter fails."""
    factor = -(-max(crop.shape[2:]) // (COARSEST * size))
    return F.avg_pool2d(crop, factor, ceil_mode=True, count_include_pad=False) if factor > 1 else crop
