"""Read `.pth` files and pickles without running code; the only module that decides what they may rebuild.

A pickle names the functions and classes that it calls. Here a name is looked up in a table of exact names and never
resolved by import or `getattr`, since a dotted name such as `_rebuild_tensor.__globals__` leads to any builtin. What a
table holds is safe to call with any arguments and to give any state: NumPy's own `dtype` and `ndarray` are not (a
prepared dtype makes NumPy follow addresses that the file contains), so stand-ins check what arrays are made of.
"""

import pickle
import pickletools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from utils.errors import UsageError
from utils.integrity import ADVICE, DamagedFileError, check_archive, check_checksum, is_archive


def load_torch(path: Path | str) -> Any:
    """Return what `torch.save` wrote, on the CPU: tensors, numbers and strings in dicts, lists and tuples.

    An `argparse.Namespace`, as in the files that the authors of SlotCon released, becomes a dict. Histories of losses,
    which mmengine pickles into its checkpoints, are left out. The checksums of the file are checked, if it has any:
    files of PyTorch before 1.6 have none.

    Raises:
        DamagedFileError: a checksum is wrong, or the file is truncated.
        pickle.UnpicklingError: the file holds anything else, or was not written by `torch.save`.
        Exception: of many types, if the file is damaged.
    """
    if is_archive(path):
        check_archive(path)
    with _allow_only(_TORCH_GLOBALS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about old pickle protocols
        return _to_plain(torch.load(path, map_location="cpu", weights_only=True), {})


def load_arrays(path: Path, flag: str) -> dict[str, Any]:
    """Return a pickled dict of NumPy arrays, numbers and strings, as detectron2 keeps weights in a `.pkl`.

    Raises:
        UsageError: naming `flag`, if the file is missing or holds anything else.
        DamagedFileError: naming `flag`, if it is truncated or does not match its own checksum.
    """
    if not path.is_file():
        raise UsageError(f"{flag} {path}: no such file")
    try:
        with path.open("rb") as file:
            _check_sizes(file)
            state = _to_plain(_ArrayUnpickler(file, encoding="latin1").load(), {})
    except _RefusedError as error:
        raise UsageError(f"{flag} {path}: refused, it holds more than arrays and numbers ({error})") from None
    except Exception:  # a damaged file raises errors of many types
        raise DamagedFileError(f"{flag} {path}: truncated or no checkpoint; {ADVICE}") from None
    if not isinstance(state, dict):
        raise UsageError(f"{flag} {path}: holds a {type(state).__name__}, not weights")
    if not state:
        raise UsageError(f"{flag} {path}: no weights in it")
    try:
        check_checksum(state)
    except DamagedFileError as error:
        raise DamagedFileError(f"{flag} {path}: damaged: {error}; {ADVICE}") from None
    return state


def is_torch_file(path: Path) -> bool:
    """Return whether a file begins as one of `torch.save`, of any version, and not as a pickle of arrays."""
    with path.open("rb") as file:
        return file.read(len(_LEGACY_START)) == _LEGACY_START or is_archive(path)


_LEGACY_START = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)


def _check_sizes(file: BinaryIO) -> None:
    """Check that no opcode announces more data or entries than the file has, for which memory would be reserved."""
    for opcode, argument, position in pickletools.genops(file):
        if opcode.name in ("PUT", "LONG_BINPUT") and (argument or 0) > (position or 0):
            raise _RefusedError(f"entry {argument} at byte {position}")
    file.seek(0)


class _RefusedError(pickle.UnpicklingError):
    """A pickle holds something that is not allowed."""


def _to_plain(value: Any, converted: dict[int, Any]) -> Any:
    """Replace containers and tensors by plain ones: a pickle can give an OrderedDict or a Parameter any attributes.

    Args:
        converted: the results so far by `id`, so that a container that is referred to often is converted once.
    """
    if id(value) in converted:
        return converted[id(value)]
    if isinstance(value, dict):
        plain: Any = {key: _to_plain(item, converted) for key, item in dict.items(value)}
    elif type(value) in (list, tuple):
        plain = type(value)(_to_plain(item, converted) for item in value)
    elif isinstance(value, _Namespace):
        plain = _to_plain(vars(value), converted)
    elif isinstance(value, _Array):
        plain = value.array
    elif isinstance(value, Tensor):
        ordinary = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
        if not ordinary or value.is_meta or value.is_quantized:
            raise _RefusedError("a tensor that is not an array of numbers")
        plain = torch.Tensor.detach(value)
    else:
        plain = value
    converted[id(value)] = plain
    return plain


# Stand-ins for NumPy.


class _DType:
    """Stand-in for `numpy.dtype`: booleans, integers, floating-point and complex numbers only."""

    def __init__(self, name: str, *_: Any):
        if not isinstance(name, str) or not re.fullmatch(r"b1|[iu][1248]|f[248]|c(8|16)", name):
            raise _RefusedError(f"an array of {name!r}")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])  # the other items are for dtypes with fields


class _Array:
    """Stand-in for `numpy.ndarray`, whose values come with its state."""

    array: np.ndarray

    def __setstate__(self, state: tuple[Any, tuple[int, ...], _DType, bool, bytes | str]) -> None:
        _, shape, dtype, fortran_order, values = state
        self.array = _read_values(values, dtype).reshape(shape, order="F" if fortran_order else "C")


def _read_values(values: bytes | str, dtype: _DType) -> np.ndarray:
    """Return a writable array (N,) in native byte order; Python 2 wrote bytes as a string."""
    data = values.encode("latin1") if isinstance(values, str) else values
    if not isinstance(data, (bytes, bytearray)):
        raise _RefusedError(f"values in a {type(data).__name__}")
    array = np.frombuffer(data, dtype.dtype) if data else np.empty(0, dtype.dtype)
    return array.astype(dtype.dtype.newbyteorder("="))


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _scalar(dtype: _DType, values: bytes | str) -> np.generic:
    return _read_values(values, dtype)[0]


def _array_from_buffer(values: bytes, dtype: _DType, shape: tuple[int, ...], order: str, *axes: Any) -> np.ndarray:
    """Stand-in for `_frombuffer`, which protocol 5 calls."""
    array = _read_values(values, dtype)
    if order == "K":
        (axis_order,) = axes
        return array.reshape(shape).transpose(axis_order)
    return array.reshape(shape, order="F" if order == "F" else "C")


_NUMPY_GLOBALS: dict[str, Callable[..., Any]] = {"numpy.ndarray": _Array, "numpy.dtype": _DType}
for _core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    _NUMPY_GLOBALS |= {
        f"{_core}.multiarray._reconstruct": _reconstruct,
        f"{_core}.multiarray.scalar": _scalar,
        f"{_core}.numeric._frombuffer": _array_from_buffer,
    }


# What `torch.load(weights_only=True)` may rebuild besides PyTorch's own tensors, containers and numbers.


class _Namespace:
    """Stand-in for `argparse.Namespace`."""


class _HistoryBuffer:
    """Stand-in for mmengine's history of a logged value; its content is dropped."""

    def __setstate__(self, _: Any) -> None:
        pass


def _method_of_history(owner: Any, name: Any) -> None:
    """Stand-in for the `getattr` by which a history refers to its own methods."""
    if owner is not _HistoryBuffer or name not in ("min", "max", "mean", "current"):
        raise _RefusedError("builtins.getattr")


_TORCH_GLOBALS = _NUMPY_GLOBALS | {
    "argparse.Namespace": _Namespace,
    "mmengine.logging.history_buffer.HistoryBuffer": _HistoryBuffer,
    "builtins.getattr": _method_of_history,
}


@contextmanager
def _allow_only(allowed: Mapping[str, Any]) -> Iterator[None]:
    """Let `torch.load` resolve exactly these names, whatever other libraries have allowed."""
    allowed_by_others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([(value, name) for name, value in allowed.items()])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed_by_others)


# What a pickle of arrays may rebuild.


class _Dict(dict[Any, Any]):
    """Stand-in for `OrderedDict`, without attributes."""

    def __setstate__(self, _: Any) -> None:
        pass


class _Function:
    """A function that a pickle may call, and to which it cannot assign attributes."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, _: Any) -> None:
        raise _RefusedError("the state of a function")


_ARRAY_GLOBALS: dict[str, Callable[..., Any]] = _NUMPY_GLOBALS | {
    "collections.OrderedDict": _Dict,
    "_codecs.encode": lambda text, _: str.encode(text, "latin1"),
    "__builtin__.bytes": lambda: b"",  # protocol 2 has no empty bytes
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _Function(_ARRAY_GLOBALS[f"{module}.{name}"])
        except KeyError:
            raise _RefusedError(repr(f"{module}.{name}")) from None

    def persistent_load(self, _: Any) -> Any:
        raise _RefusedError("a persistent id")
