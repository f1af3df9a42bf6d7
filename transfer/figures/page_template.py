"""Fill the template of self-contained HTML pages: cards with images, to search and sort."""

import base64
import html
import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

_FOLDER = Path(__file__).parent
_QUALITY = 68
"""JPEG quality. The images of a row share one file, whose header is as large as a small image."""


def fill_template(cards: str, title: str, details: str, data: Mapping[str, Any]) -> bytes:
    """Return the page.

    Args:
        cards: name of the script that defines the cards.
        title: of the page.
        details: model and images in one line.
        data: what the cards show, as JSON.
    """
    page, script = ((_FOLDER / name).read_text(encoding="utf-8") for name in ("page.html", cards))
    page = page.replace("{{cards}}", script).replace("{{title}}", html.escape(title))
    page = page.replace("{{details}}", html.escape(details))
    # JSON inside a script element: without "<", no file name can end the element.
    return page.replace("{{data}}", json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")).encode()


def encode_jpeg(pixels: Tensor) -> str:
    """Encode pixels (H, W, 3) uint8 as a JPEG in base64."""
    file = BytesIO()
    Image.fromarray(pixels.numpy()).save(file, format="jpeg", quality=_QUALITY, optimize=True)
    return base64.b64encode(file.getvalue()).decode()
