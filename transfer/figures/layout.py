"""Create figures in the common style, arrange panels in a grid, and save figures."""

import math
import textwrap
from io import BytesIO
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from utils.errors import UsageError
from utils.files import write_output

TEXT_COLOR, MUTED_COLOR = "#222222", "#6b6b6b"
MARK_COLOR = (1.0, 0.78, 0.0)
"""Of the outlines of regions and the boxes around patches, in images."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".webp", ".tif", ".tiff")
_MAX_PIXELS = 16_000
"""Largest side of a figure in pixels; few programs open larger images."""

_CHARACTERS_PER_INCH, _MIN_CHARACTERS, _LINE_HEIGHT = 14, 36, 0.14
"""Of the details: the characters that fit into an inch, at least in a line, and the height of a line in inches."""


def new_figure(size: tuple[float, float], dpi: int, title: str, details: str) -> Figure:
    """Create a figure of (width, height) in inches with a title, and details below its panels.

    Lines of the details that are too long are wrapped; the figure grows by all lines after the first.

    Raises:
        UsageError: the figure would have too many pixels.
    """
    length = max(_MIN_CHARACTERS, round(_CHARACTERS_PER_INCH * size[0]))
    lines = [line for paragraph in details.splitlines() for line in textwrap.wrap(paragraph, length)]
    size = size[0], size[1] + _LINE_HEIGHT * (len(lines) - 1)
    width, height = (round(side * dpi) for side in size)
    if max(width, height) > _MAX_PIXELS:
        raise UsageError(f"a figure of {width} x {height} pixels is too large; lower --sampling, --topk or --dpi")
    layout = ConstrainedLayoutEngine(compress=True, w_pad=0.05, h_pad=0.06)
    figure = Figure(figsize=size, dpi=dpi, layout=layout)
    figure.suptitle(title, x=0, ha="left", fontsize=11, weight="bold", color=TEXT_COLOR)
    figure.supxlabel("\n".join(lines), x=0, ha="left", fontsize=8, color=MUTED_COLOR, parse_math=False)
    return figure


def grid_shape(count: int, width: float, height: float, aspect: float = 1.3) -> tuple[int, int]:
    """Return the rows and columns that give `count` panels of `width` x `height` about the aspect ratio `aspect`."""
    columns = min(count, max(1, round(math.sqrt(count * aspect * height / width))))
    rows = math.ceil(count / columns)
    return rows, math.ceil(count / rows)


def save_figure(flag: str, path: Path, figure: Figure) -> None:
    """Write a figure in the format of its suffix; the same figure gives the same bytes.

    Args:
        flag: the flag that names the file, which begins the message.

    Raises:
        UsageError: the file cannot be written.
    """
    content = BytesIO()
    dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower())
    with matplotlib.rc_context({"svg.hashsalt": "slots", "pdf.fonttype": 42}):
        figure.savefig(content, format=path.suffix[1:].lower(), metadata=dates, bbox_inches="tight", pad_inches=0.2)
    write_output(flag, path, lambda file: file.write(content.getvalue()))


def shorten(text: str, length: int) -> str:
    """Shorten `text` to at most `length` characters by leaving out its middle."""
    if len(text) <= length:
        return text
    return f"{text[: (length - 1) // 2]}…{text[-(length // 2) :]}"
