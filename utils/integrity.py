"""Detect damaged files: the checksums of zip archives, which PyTorch does not check, and one for other formats."""

import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from utils.errors import UsageError

CHECKSUM = "slot_pretraining_sha256"
"""The key of the checksum in a `.safetensors` or `.pkl` file that this project wrote; the value begins with it."""

ADVICE = "download or make it again, or use another checkpoint"
"""What to do about a damaged file; part of messages."""

_END_RECORD_SIZE = 22
"""Bytes of the record that ends a zip archive."""
_FOLDER_ATTRIBUTE = 0x10


class DamagedFileError(UsageError):
    """A file is truncated, or its content differs from what was written."""


def is_archive(path: Path | str) -> bool:
    """Return whether a file is a zip archive, as `torch.save` writes it, also if its first bytes are damaged."""
    with Path(path).open("rb") as file:
        starts_like_one = file.read(4) == b"PK\x03\x04"
        file.seek(max(0, Path(path).stat().st_size - _END_RECORD_SIZE))
        return starts_like_one or file.read(4) == b"PK\x05\x06"


def check_archive(path: Path | str) -> None:
    """Check the structure of a zip archive and the checksum of every entry.

    The file is read once, in pieces. A file that was written after `torch.serialization.set_crc32_options(False)` has 0
    for every checksum; then only the structure is checked.

    Raises:
        DamagedFileError: naming the first damaged entry, without the file's name.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damage = _find_damage(archive)
    except Exception:  # a damaged archive raises errors of many types
        damage = "truncated, or its list of entries is wrong"
    if damage:
        raise DamagedFileError(damage)


def _find_damage(archive: zipfile.ZipFile) -> str:
    """Return what is damaged, or "" if nothing is."""
    entries = archive.infolist()
    if len({entry.filename for entry in entries}) < len(entries):
        return "two entries have the same name"
    for entry in entries:
        if entry.external_attr & _FOLDER_ATTRIBUTE and entry.file_size:
            return f"{entry.filename!r} is marked as a folder"  # PyTorch would leave its memory uninitialized
        archive.open(entry).close()  # raises an error if its header is damaged
    damaged = archive.testzip() if any(entry.CRC for entry in entries) else None
    return f"{damaged!r} has a wrong checksum" if damaged else ""


def add_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a file with its checksum, the SHA-256 of all names, data types, shapes and values.

    Args:
        content: nested dicts of arrays, tensors, and what JSON can represent. Neither the order of their entries nor
            the file format has an effect on the checksum.
    """
    return {**content, CHECKSUM: _compute_checksum(content)}


def check_checksum(content: Mapping[str, Any]) -> None:
    """Check the checksum of a file's content, if it has one of this project.

    Raises:
        DamagedFileError: the content has another checksum; the message does not name the file.
    """
    texts = [text for entry in content.items() for text in entry if isinstance(text, str)]
    if not any(text.startswith(CHECKSUM) for text in texts):  # recognized by its value as well, if its key is damaged
        return
    try:
        matches = str(content.get(CHECKSUM)) == _compute_checksum(content)
    except (TypeError, ValueError, RecursionError):
        matches = False
    if not matches:
        raise DamagedFileError("its content does not match its checksum")


def _compute_checksum(content: Mapping[str, Any]) -> str:
    sha256 = hashlib.sha256()
    for path, value in _leaves(content, ()):
        if isinstance(value, (np.ndarray, Tensor)):
            array = np.ascontiguousarray(value)
            sha256.update(json.dumps([path, array.dtype.name, np.shape(value)]).encode())
            sha256.update(array.reshape(-1).view(np.uint8).data)
        else:
            sha256.update(json.dumps([path, value], sort_keys=True).encode())
    return f"{CHECKSUM}:{sha256.hexdigest()}"


def _leaves(content: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in sorted(content.items()):
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, name))
        elif (*path, name) != (CHECKSUM,):
            yield (*path, name), value
