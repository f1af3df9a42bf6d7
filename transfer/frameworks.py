"""detectron2 and mmsegmentation: whether they are installed, and where their datasets are linked."""

import os
from importlib.util import find_spec
from pathlib import Path

TRANSFER = Path(__file__).resolve().parent
PACKAGES = {"detection": "detectron2", "segmentation": "mmseg"}
"""Task -> the package that trains it."""

CONFIG_GPUS = 8
"""The number of GPUs that the detection configs are for, from which --auto-scale scales them."""


def is_installed(task: str) -> bool:
    """Return whether the package that trains `detection` or `segmentation` is installed."""
    return find_spec(PACKAGES[task]) is not None


def data_root(task: str) -> Path:
    """Return the folder that holds the datasets of `detection` or `segmentation`."""
    if task == "detection":
        return Path(os.environ.get("DETECTRON2_DATASETS", TRANSFER / "detection" / "datasets")).expanduser()
    return Path(os.environ.get("SEGMENTATION_DATA", TRANSFER / "segmentation" / "data")).expanduser()
