"""Write files atomically, and check before any work that an output can be written."""

import errno
import glob
import os
import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from utils.errors import UsageError


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write` on a temporary file next to `path` and rename it to `path`, which is therefore never incomplete.

    Several processes may write the same `path` at once; it is then the whole file of the last one.

    Raises:
        OSError: the file cannot be written; the temporary file is removed and an existing `path` is unchanged.
    """
    _remove_leftovers(path)
    temporary = _temporary_path(path)
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, (OSError, RuntimeError)):  # torch reports a full disk as a RuntimeError
            raise
        free = shutil.disk_usage(path.parent).free / 2**20 if path.parent.is_dir() else 0
        raise OSError(errno.EIO, getattr(error, "strerror", None) or f"{free:.0f} MiB are free") from None


def _temporary_path(path: Path) -> Path:
    """Return a new hidden path in the same folder, which no other process uses."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote `path`; none writes for an hour."""
    with suppress(OSError):
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            if leftover.stat().st_mtime < time.time() - 3600:
                leftover.unlink()


def write_output(flag: str, path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write an output of a command with `atomic_write`.

    Args:
        flag: the flag or the positional argument that names the output, which begins the message.

    Raises:
        UsageError: the file cannot be written; an existing `path` is unchanged.
    """
    try:
        atomic_write(path, write)
    except OSError as error:
        raise UsageError(f"{flag} {path}: cannot be written ({error.strerror}); use another path") from None


def atomic_write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file with `atomic_write`.

    Raises:
        OSError: as `atomic_write`.
    """
    atomic_write(path, lambda file: file.write(text.encode()))


def link_or_copy(link: Path, target: Path) -> None:
    """Make `link` a hard link to `target`, or a copy of it on file systems without hard links.

    Raises:
        OSError: the file cannot be written; the temporary file is removed and an existing `link` is unchanged.
    """
    temporary = _temporary_path(link)
    try:
        try:
            os.link(target, temporary)
        except OSError:
            shutil.copyfile(target, temporary)
        temporary.replace(link)
    finally:
        with suppress(OSError):  # renaming a hard link to its own file leaves both names
            temporary.unlink(missing_ok=True)


def check_writable(flag: str, path: Path, overwrite: bool = False, folder: bool = False) -> None:
    """Check that `path`, given by `flag`, can be written, so that a command fails before its work and not after it.

    Args:
        flag: the flag or the positional argument's name, which begins the message.
        overwrite: whether an existing file, or a folder with files in it, is acceptable.
        folder: whether `path` is a folder to write into; missing folders above it count as creatable. The folder of
            a file has to exist.

    Raises:
        UsageError: the folder is missing or not writable, `path` is of the other kind, or it exists without
            `overwrite`.
    """
    try:
        if path.exists() and path.is_dir() != folder:
            raise UsageError(f"{flag} {path}: is a {'file; name a folder' if folder else 'folder; name a file'}")
        exists = any(path.iterdir()) if path.is_dir() else path.exists()
        candidates = (path, *path.absolute().parents) if folder else (path.absolute().parent,)
        parent = next((candidate for candidate in candidates if candidate.exists()), None)
    except OSError as error:
        raise UsageError(f"{flag} {path}: cannot be written ({error.strerror})") from None
    if parent is None:
        raise UsageError(f"{flag} {path}: the folder {path.parent} does not exist; create it or use another")
    if not parent.is_dir():
        raise UsageError(f"{flag} {path}: {parent} is not a folder; use another path")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{flag} {path}: no permission to write to the folder {parent}; use another")
    if exists and not overwrite:
        raise UsageError(f"{flag} {path}: already exists; use another path or --overwrite")
