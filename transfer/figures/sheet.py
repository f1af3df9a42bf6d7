"""A sheet of pictures and text, laid out in inches from the upper left corner."""

from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from utils.errors import UsageError
from utils.files import atomic_write

INK, PALE = "#222222", "#6b6b6b"
_LARGEST = 16_000
"""Pixels of a sheet's longer side, beyond which hardly any program opens it."""

FORMATS = (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".webp", ".tif", ".tiff")


class Sheet:
    """A page of `width` x `height` inches."""

    def __init__(self, width: float, height: float, dpi: int):
        """Make an empty page.

        Raises:
            UsageError: it would have too many pixels.
        """
        if max(width, height) * dpi > _LARGEST:
            size = f"{width * dpi:.0f} x {height * dpi:.0f} pixels"
            raise UsageError(f"the figure would have {size}; lower --sampling, --topk or --dpi, or use --html")
        self.dpi = dpi
        self.figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.autoscale(False)
        self.axes.axis("off")

    def picture(self, pixels: NDArray[np.uint8], x: float, y: float, width: float, height: float) -> None:
        """Pixels (h, w, 3) in a box whose upper left corner is (x, y)."""
        self.axes.imshow(pixels, extent=(x, x + width, y + height, y), aspect="auto", interpolation="antialiased")

    def text(self, words: str, x: float, y: float, size: float = 8, color: str = INK, **more: Any) -> Any:
        """Words whose upper left corner is (x, y), `size` in points."""
        place = {"ha": "left", "va": "top"} | more
        return self.axes.text(x, y, words, fontsize=size, color=color, parse_math=False, **place)

    def title(self, title: str, facts: str, x: float = 0.25) -> None:
        """The two lines at the top, which take 0.75 inch."""
        self.text(title, x, 0.22, size=11, weight="bold")
        self.text(facts, x, 0.45, size=8, color=PALE)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure whole or not at all.

    Raises:
        UsageError: the disk does not take it.
    """
    written = BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "slots", "pdf.fonttype": 42}):
        dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower(), {})
        figure.savefig(written, format=path.suffix[1:].lower(), metadata=dates)
    write(path, written.getvalue())


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        UsageError: the disk does not take it.
    """
    try:
        atomic_write(path, lambda file: file.write(content))
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from None


def columns(count: int, width: float, height: float, aspect: float = 1.3) -> int:
    """In how many columns `count` blocks of `width` x `height` fill a page of about `aspect`, width over height."""

    def first_mismatch(across: int) -> float:
        down = -(-count // across)
        ratio = across * width / (down * height)
        return max(ratio / aspect, aspect / ratio) * (across * down / count) ** 2

    return min(range(1, count + 1), key=first_mismatch)


def shorten(words: str, length: int) -> str:
    """`words` in at most `length` characters, the middle left out."""
    if len(words) <= length:
        return words
    return f"{words[: (length - 1) // 2]}…{words[-(length // 2) :]}"
