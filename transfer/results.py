"""Write metrics as JSON."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from utils.files import atomic_write_text


def write_json(path: Path, content: Any) -> None:
    """Write nested dicts and lists to a JSON file atomically; NaN and infinity, which JSON does not have, become null.

    Raises:
        OSError: the file cannot be written.
    """
    atomic_write_text(path, json.dumps(_to_json(content), indent=2, allow_nan=False) + "\n")


def _to_json(value: Any) -> Any:
    """Convert NumPy's scalars to Python's, floats by their decimal digits, and floats that are not finite to None."""
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    if isinstance(value, np.floating):
        value = float(str(value))
    elif isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
