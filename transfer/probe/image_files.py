"""Read image files of datasets."""

from pathlib import Path

from PIL import Image

from utils.errors import UsageError


def read_image(path: Path, mode: str | None = None) -> Image.Image:
    """Read and decode an image file.

    Args:
        mode: Pillow's mode to convert the image to, such as `RGB`; None for that of the file.

    Raises:
        UsageError: the file is missing, damaged or not an image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return image.convert(mode) if mode else image
    except Exception as error:  # Pillow raises errors of many types for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{path}: cannot be read ({reason})") from None
