"""Atomic files, links, and the check that an output can be written."""

import os
import time
from pathlib import Path
from typing import BinaryIO

import pytest

from utils import files
from utils.errors import UsageError


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    files.atomic_write_text(path, "old")

    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        files.atomic_write(path, fail)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    files.atomic_write_text(path, "neu: é")
    assert path.read_bytes() == "neu: é".encode()


@pytest.mark.parametrize("fail", [False, True])
def test_a_write_during_another_of_the_same_path_disturbs_none(fail: bool, tmp_path: Path) -> None:
    path = tmp_path / "results.json"

    def write(file: BinaryIO) -> None:
        files.atomic_write_text(path, "other")
        assert path.read_text() == "other"
        if fail:
            raise KeyboardInterrupt
        file.write(b"last")

    if fail:
        with pytest.raises(KeyboardInterrupt):
            files.atomic_write(path, write)
    else:
        files.atomic_write(path, write)
    assert path.read_text() == ("other" if fail else "last")
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_leftovers_of_killed_processes_are_removed_once_they_are_old(tmp_path: Path) -> None:
    old, new, other = (
        tmp_path / name for name in (".a.pth.01234567.tmp", ".a.pth.89abcdef.tmp", ".b.pth.01234567.tmp")
    )
    for path in (old, new, other):
        path.write_bytes(b"incomplete")
    for path in (old, other):
        os.utime(path, (time.time() - 4000, time.time() - 4000))
    files.atomic_write(tmp_path / "a.pth", lambda file: file.write(b"whole"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([new.name, other.name, "a.pth"])


def test_failed_output_is_named_with_its_flag(tmp_path: Path) -> None:
    files.write_output("--out", tmp_path / "new", lambda file: file.write(b"content"))
    assert (tmp_path / "new").read_bytes() == b"content"
    with pytest.raises(UsageError, match=r"^--out .*none/new: cannot be written \(No such file or directory\); use"):
        files.write_output("--out", tmp_path / "none" / "new", lambda file: file.write(b""))


@pytest.mark.parametrize("hard_links", [True, False])
def test_link_or_copy_replaces_the_link(hard_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no hard links here")

    if not hard_links:
        monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "new").write_text("new")
    (tmp_path / "current").write_text("old")
    files.link_or_copy(tmp_path / "current", tmp_path / "new")
    assert (tmp_path / "current").read_text() == "new"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["current", "new"]


@pytest.mark.parametrize("hard_links", [True, False])
def test_link_during_another_of_the_same_name_disturbs_none(
    hard_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def link_twice(target: Path, path: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        files.link_or_copy(tmp_path / "current", target)
        if not hard_links:
            raise OSError("no hard links here")
        link(target, path)

    monkeypatch.setattr(os, "link", link_twice)
    (tmp_path / "new").write_text("new")
    files.link_or_copy(tmp_path / "current", tmp_path / "new")
    assert (tmp_path / "current").read_text() == "new"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["current", "new"]


def test_failed_link_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "current").write_text("old")
    with pytest.raises(OSError, match="No such file"):
        files.link_or_copy(tmp_path / "current", tmp_path / "missing")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("current", "old")]


def test_writable_outputs_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / "empty").mkdir()
    files.check_writable("--out", tmp_path / "new")
    files.check_writable("--out", tmp_path / "old", overwrite=True)
    files.check_writable("--out", tmp_path / "empty", folder=True)
    files.check_writable("--out", tmp_path / "a" / "b", folder=True)
    files.check_writable("--out", tmp_path, folder=True, overwrite=True)
    monkeypatch.chdir(tmp_path)
    files.check_writable("--out", Path("new"))
    files.check_writable("--out", Path("a/b"), folder=True)


@pytest.mark.parametrize(
    ("path", "folder", "overwrite", "reason"),
    [
        ("a/new", False, False, "the folder .*a does not exist"),
        ("folder", False, True, "is a folder; name a file"),
        ("old", True, True, "is a file; name a folder"),
        ("old", False, False, "already exists; use another path or --overwrite"),
        ("folder", True, False, "already exists"),
        ("old/new", False, False, ".*old is not a folder"),
        ("old/new/a", True, False, ".*old is not a folder"),
        ("n" * 300, False, False, "cannot be written"),
        ("n" * 300, True, False, "cannot be written"),
    ],
)
def test_unwritable_output_is_refused(path: str, folder: bool, overwrite: bool, reason: str, tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    with pytest.raises(UsageError, match=f"^--out .*: {reason}") as refusal:
        files.check_writable("--out", tmp_path / path, overwrite, folder)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("folder", [False, True])
def test_output_in_a_folder_without_permission_is_refused(
    folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UsageError, match="no permission to write to the folder"):
        files.check_writable("--out", tmp_path / "new", folder=folder)
