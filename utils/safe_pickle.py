"""Read `.pth` files and pickles without running code; the only module that decides what they may rebuild.

A pickle names the objects that it calls. Here each name is looked up in a table of exact names and never resolved by
import or `getattr`: a dotted name such as `_rebuild_tensor.__globals__` would otherwise lead to any builtin. An
unlisted name is refused.
"""

import argparse
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.errors import UsageError


class Discarded:
    """Stand-in for an object of a checkpoint that nobody reads: it takes any arguments and state and keeps none."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass


_NUMPY = ("numpy.ndarray", "numpy.dtype") + tuple(
    f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")
)
_TORCH_GLOBALS: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace,  # the arguments in the files that the authors released
    # mmengine keeps its history of losses in a checkpoint.
    **dict.fromkeys(("mmengine.logging.history_buffer.HistoryBuffer", *_NUMPY), Discarded),
}
"""What `load_torch` rebuilds besides PyTorch's own tensors, containers and numbers."""


def load_torch(path: Path | str) -> Any:
    """Return what `torch.save` wrote, on the CPU: tensors, numbers, strings and containers.

    Raises:
        pickle.UnpicklingError: the file names anything else, or is no file of `torch.save`.
        Exception: of any kind, if the file is damaged.
    """
    with _torch_globals(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about old pickle protocols
        return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def _torch_globals() -> Iterator[None]:
    """Allow exactly `_TORCH_GLOBALS`, whatever other libraries have added to PyTorch's list."""
    added_by_others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([(value, name) for name, value in _TORCH_GLOBALS.items()])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(added_by_others)


class _ForbiddenGlobalError(pickle.UnpicklingError):
    """A pickle names an object that is not allowed."""


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds dicts, strings, numbers and NumPy arrays, written by any version of NumPy."""

    _GLOBALS = {
        "collections.OrderedDict": OrderedDict,
        "_codecs.encode": lambda text, _: text.encode("latin1"),
        "numpy.ndarray": np.ndarray,
        "numpy.dtype": np.dtype,
        # NumPy keeps these three where they are not to be imported from.
        "numpy.core.multiarray._reconstruct": np.zeros(1).__reduce__()[0],
        "numpy.core.multiarray.scalar": np.float64(1).__reduce__()[0],
        "numpy.core.numeric._frombuffer": np.zeros(1).__reduce_ex__(5)[0],
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._GLOBALS[f"{module}.{name}".replace("numpy._core.", "numpy.core.")]
        except KeyError:
            raise _ForbiddenGlobalError(f"{module}.{name}") from None


def load_arrays(path: Path, flag: str) -> dict[str, Any]:
    """Return a pickled dict of arrays, strings and numbers, such as detectron2's weights in a `.pkl`.

    Raises:
        UsageError: naming `flag`, if the file is missing, truncated, or holds anything else.
    """
    if not path.is_file():
        raise UsageError(f"{flag} {path}: no such file")
    try:
        with path.open("rb") as file:
            state = _ArrayUnpickler(file, encoding="latin1").load()
    except _ForbiddenGlobalError as error:
        raise UsageError(f"{flag} {path}: refused, it holds more than arrays and numbers ({error})") from None
    except Exception:  # a damaged pickle raises whatever its reader stumbles over
        raise UsageError(f"{flag} {path}: truncated or no pickle; convert the checkpoint again") from None
    if not isinstance(state, dict):
        raise UsageError(f"{flag} {path}: holds a {type(state).__name__}, not weights")
    return state
