"""detectron2, mmsegmentation and timm: whether they are installed, and where their datasets are linked."""

import os
from importlib.util import find_spec
from pathlib import Path

TRANSFER = Path(__file__).resolve().parent
PACKAGES = {"detection": "detectron2", "segmentation": "mmseg", "classification": "timm"}
"""Task, which is also a folder here -> the package that trains it."""

_DATA_ROOTS = {
    "detection": ("DETECTRON2_DATASETS", "datasets"),
    "segmentation": ("SEGMENTATION_DATA", "data"),
    "classification": ("CLASSIFICATION_DATA", "data"),
}
"""Task -> the environment variable that names the folder of its datasets, and the default in the task's folder."""

CONFIG_GPUS = 8
"""The number of GPUs that the detection configs are for, from which --auto-scale scales them."""


def is_installed(task: str) -> bool:
    """Return whether the package that trains a task is installed."""
    return find_spec(PACKAGES[task]) is not None


def data_root(task: str) -> Path:
    """Return the folder that holds the datasets of a task."""
    variable, folder = _DATA_ROOTS[task]
    return Path(os.environ.get(variable, TRANSFER / task / folder)).expanduser()
