"""Pickles of arrays, as detectron2 keeps weights, read without running what else a pickle can hold."""

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from utils.errors import UsageError


class _HoldsCodeError(pickle.UnpicklingError):
    """A pickle names something that would run."""


class _ArraysOnly(pickle.Unpickler):
    """Reads dicts, strings, numbers and NumPy arrays, written by any NumPy."""

    KNOWN: ClassVar[dict[str, Any]] = {
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
            return self.KNOWN[f"{module}.{name}".replace("numpy._core.", "numpy.core.")]
        except KeyError:
            raise _HoldsCodeError(f"{module}.{name}") from None


def read_pickle(path: Path, flag: str) -> dict[str, Any]:
    """A pickled dict of arrays, strings and numbers; nothing in it runs.

    Raises:
        UsageError: naming `flag`, if the file is missing, truncated, or holds anything else.
    """
    if not path.is_file():
        raise UsageError(f"{flag} {path}: no such file")
    try:
        with path.open("rb") as file:
            state = _ArraysOnly(file, encoding="latin1").load()
    except _HoldsCodeError as error:
        raise UsageError(f"{flag} {path}: refused, it holds more than arrays and numbers ({error})") from None
    except Exception:  # a damaged pickle raises whatever its reader stumbles over
        raise UsageError(f"{flag} {path}: truncated or no pickle; convert the checkpoint again") from None
    if not isinstance(state, dict):
        raise UsageError(f"{flag} {path}: holds a {type(state).__name__}, not weights")
    return state
