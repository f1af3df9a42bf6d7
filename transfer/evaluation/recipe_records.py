"""The recipe of each run of evaluate.py, recorded when the run starts, so that no other recipe continues it."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from transfer.evaluation.fine_tunings import FineTuning
from transfer.evaluation.recipe_options import Options, describe_recipe
from utils.errors import UsageError

_CHECKPOINTS = ("last_checkpoint", "current.pth")
"""Files with the last checkpoint of a run, or with its name; the latter is that of classification."""


def make_record(fine_tuning: FineTuning, options: Options) -> dict[str, Any]:
    """Return what identifies a recipe: the text of the table, the options, and the checksum of the config, if any."""
    has_config = fine_tuning.task != "classification"
    checksum = compute_config_checksum(fine_tuning.config_path()) if has_config else ""
    return {"recipe": describe_recipe(fine_tuning, options), "options": dict(options), "config_sha256": checksum}


def compute_config_checksum(path: Path) -> str:
    """Compute the SHA-256 of a config, of the configs that it names, which are its bases, and of theirs."""
    sha256, paths = hashlib.sha256(), [path.resolve()]
    for config in paths:  # which grows
        text = config.read_text()
        sha256.update(text.encode())
        named = [(config.parent / name).resolve() for name in re.findall(r"[\w./-]+\.(?:py|yaml)\b", text)]
        paths += [base for base in dict.fromkeys(named) if base.is_file() and base not in paths]
    return sha256.hexdigest()


def check_record(folder: Path, record: dict[str, Any]) -> None:
    """Check that the run in a folder, if it has a result or a checkpoint, has the recipe of `record`.

    Raises:
        UsageError: a finished run has other options, or an unfinished one has other options, another config, or no
            record, which versions without records have written.
    """
    if (folder / "done.json").exists():
        previous = json.loads((folder / "done.json").read_text())
        if previous.get("options", record["options"]) != record["options"]:
            raise UsageError(
                f"--out: {folder} has the recipe '{previous['recipe']}'; use another --out for other options"
            )
    elif has_checkpoint(folder):
        previous = read_started(folder)
        if any(previous.get(key) != record[key] for key in ("options", "config_sha256")):
            raise UsageError(
                f"--out: {folder} contains an unfinished run of another recipe; delete that folder or use another --out"
            )


def has_checkpoint(folder: Path) -> bool:
    """Return whether the run in a folder can be resumed."""
    return any((folder / "run" / name).exists() for name in _CHECKPOINTS)


def read_started(folder: Path) -> dict[str, Any]:
    """Return the record of the recipe with which the run in a folder was started last; empty if there is none."""
    path = folder / "started.json"
    return json.loads(path.read_text()) if path.exists() else {}
