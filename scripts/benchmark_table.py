"""Tables of measurements: plain for the terminal, Markdown and JSON for files."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from utils import distributed
from utils.files import atomic_write_text
from utils.resume import git_revision, versions

Row = dict[str, Any]  # column heading -> text, number, or `quartiles` of repeated measurements


def quartiles(values: np.ndarray) -> dict[str, float]:
    """Return the median and the quartiles of `values`."""
    return dict(zip(("p25", "median", "p75"), np.percentile(values, [25, 50, 75]).tolist()))


def format_cell(cell: Any) -> str:
    """Return the text of a cell: `median (p25-p75)` for quartiles, and at most two decimals."""
    if isinstance(cell, dict):
        return "{} ({}-{})".format(*(format_cell(cell[key]) for key in ("median", "p25", "p75")))
    return f"{cell:.{2 if cell < 10 else 1 if cell < 100 else 0}f}" if isinstance(cell, float) else str(cell)


def render(rows: Sequence[Row], tablefmt: str) -> str:
    """Return the table in a format of `tabulate`, without the columns that are empty in all rows."""
    texts = [{heading: format_cell(cell) for heading, cell in row.items() if cell != ""} for row in rows]
    columns = dict.fromkeys(heading for row in texts for heading in row)
    alignment = ["left" if all(isinstance(row.get(name, ""), str) for row in rows) else "right" for name in columns]
    return tabulate(texts, "keys", tablefmt=tablefmt, disable_numparse=True, colalign=alignment)


def report(rows: Sequence[Row], device: torch.device, command: str, paths: Sequence[Path]) -> None:
    """Print the table, and write it to `paths` (.md or .json) with device, versions, git revision and command."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    metadata = {
        "device": f"{distributed.world_size()} x {name}, {os.cpu_count()} cores",
        "versions": ", ".join(f"{package} {version}" for package, version in versions().items()),
        "git revision": git_revision() or "unknown",
        "command": command,
    }
    print(f"{metadata['device']}, {metadata['versions']}\n\n{render(rows, 'simple')}", flush=True)
    markdown = "\n".join([*(f"- {key}: {value}" for key, value in metadata.items()), "", render(rows, "github")])
    for path in paths:
        text = json.dumps({"metadata": metadata, "rows": rows}, indent=1) if path.suffix == ".json" else markdown
        atomic_write_text(path, text + "\n")
