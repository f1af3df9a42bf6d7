"""Damaged checkpoints: every reader refuses them, or reads exactly what was written."""

import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import main_pretrain
import viz_slots
from tests.checkpoint_data import damaged_copies, is_equal, released_checkpoint, resnet18_weights, to_half
from tests.helpers import run_expecting_usage_error
from tests.probe_data import make_folder, make_method
from transfer import convert
from transfer.detection.d2_weights import WeightsFile, read_weights
from transfer.encoders import EncoderWeights
from transfer.formats import write_converted
from transfer.probe import linear_segmentation
from transfer.segmentation.mm_weights import read_fine_tuned
from utils import checkpoint
from utils.errors import UsageError
from utils.integrity import CHECKSUM, DamagedFileError, check_archive

WEIGHTS = {
    "conv1.weight": torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)),
    "bn1.running_mean": torch.arange(4.0),
    "bn1.num_batches_tracked": torch.tensor(7),
    "empty": torch.empty(0, 2),
}
PROVENANCE = {"source": "current.pth", "source_sha256": "0" * 64, "encoder": "teacher", "mean": [0.485, 0.456, 0.406]}


def write_run(path: Path) -> None:
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(5)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    args = {"arch": "resnet18", "epochs": 800}
    torch.save({"args": args, "model": WEIGHTS, "optimizer": optimizer, "epoch": 3, "scaler": {}}, path)


def write_released(path: Path) -> None:
    torch.save(released_checkpoint(WEIGHTS, WEIGHTS), path)


def write_for(target: str) -> Callable[[Path], None]:
    return lambda path: write_converted(path, EncoderWeights(WEIGHTS, "resnet18", PROVENANCE), target)


WRITERS: dict[str, Callable[[Path], None]] = {
    "run.pth": write_run,
    "released.pth": write_released,
    "converted.pth": write_for("timm"),
    "converted.safetensors": write_for("safetensors"),
    "converted.pkl": write_for("detectron2"),
}
"""Writers of small files of every kind with checksums, by file name."""


@pytest.mark.parametrize("name", WRITERS)
def test_damaged_file_is_refused_or_read_exactly_as_written(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    content, written = path.read_bytes(), checkpoint.load(path, "IN")
    refused = 0
    for damaged in damaged_copies(content, 100):
        path.write_bytes(damaged)
        loaded, reason = load_or_reason(path)
        if reason:
            assert reason.startswith(f"IN {path}: ")
            assert reason.isprintable()
            refused += 1
        else:
            assert is_equal(loaded, written)
    assert refused > 140  # all truncated ones, and most of the others


def load_or_reason(path: Path) -> tuple[dict[str, Any], str]:
    """Return the content of a checkpoint and "", or {} and why it is refused."""
    try:
        return checkpoint.load(path, "IN"), ""
    except UsageError as error:
        return {}, str(error)


# Zip archives.


def write_archive(path: Path, change: Callable[[zipfile.ZipInfo], object], compression: int = 0) -> None:
    """Write what `torch.save` writes with another program, after a change of the list's entry of the first tensor."""
    write_run(path.with_name("original.pth"))
    with zipfile.ZipFile(path.with_name("original.pth")) as original, zipfile.ZipFile(path, "w", compression) as copy:
        copy.writestr(zipfile.ZipInfo("original/"), "")  # many programs list folders as well
        for name in original.namelist():
            copy.writestr(name, original.read(name))
        change(copy.getinfo("original/data/0"))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_archive_of_another_program_is_read(compression: int, tmp_path: Path) -> None:
    write_archive(tmp_path / "in.pth", lambda entry: None, compression)
    assert is_equal(checkpoint.load_weights(tmp_path / "in.pth"), WEIGHTS)


ENTRY_DAMAGES: dict[str, tuple[Callable[[zipfile.ZipInfo], object], str]] = {
    "checksum": (lambda entry: setattr(entry, "CRC", 1), "'original/data/0' has a wrong checksum"),
    # PyTorch returns a tensor of uninitialized memory.
    "attributes of a folder": (lambda entry: setattr(entry, "external_attr", 0x10), "data/0' is marked as a folder"),
    "name of another": (lambda entry: setattr(entry, "filename", "original/data/1"), "two entries have the same name"),
    "offset": (lambda entry: setattr(entry, "header_offset", 5), "truncated, or its list of entries is wrong"),
    "encryption": (lambda entry: setattr(entry, "flag_bits", 1), "truncated, or its list of entries is wrong"),
    "compression": (lambda entry: setattr(entry, "compress_type", 97), "truncated, or its list of entries is wrong"),
    "size": (lambda entry: setattr(entry, "file_size", 4), "'original/data/0' has a wrong checksum"),
}
"""Changes of an entry in the list at the end of an archive, and the messages."""


@pytest.mark.parametrize("damage", ENTRY_DAMAGES)
def test_damaged_list_of_entries_is_refused(damage: str, tmp_path: Path) -> None:
    change, reason = ENTRY_DAMAGES[damage]
    write_archive(tmp_path / "in.pth", change)
    with pytest.raises(DamagedFileError, match=reason):
        check_archive(tmp_path / "in.pth")
    message = rf"^--resume .*in\.pth: damaged: .*{reason}; download or make it again, or use another checkpoint$"
    with pytest.raises(DamagedFileError, match=message):
        checkpoint.load(tmp_path / "in.pth", "--resume")


# Files without checksums.


def test_file_without_checksums_is_read_and_refused_where_it_is_truncated(tmp_path: Path) -> None:
    path = tmp_path / "in.pth"
    torch.serialization.set_crc32_options(False)
    try:
        write_run(path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert is_equal(checkpoint.load_weights(path), WEIGHTS)
    content = path.read_bytes()
    for length in range(0, len(content), 50):
        path.write_bytes(content[:length])
        with pytest.raises(UsageError):
            checkpoint.load(path, "IN")


def test_exported_files_without_a_checksum_are_read(tmp_path: Path) -> None:
    metadata = {"format": "pt", "content_sha256": "sha256:0", "sha256": "0" * 64}  # of another program
    safetensors.torch.save_file(WEIGHTS, tmp_path / "in.safetensors", metadata)
    assert is_equal(checkpoint.load_weights(tmp_path / "in.safetensors"), WEIGHTS)
    model = {name: value.numpy() for name, value in WEIGHTS.items()}
    (tmp_path / "in.pkl").write_bytes(pickle.dumps({"model": model, "__author__": "they"}))
    assert is_equal(checkpoint.load_weights(tmp_path / "in.pkl"), WEIGHTS)


@pytest.mark.parametrize("checksum", ["", f"{CHECKSUM}:0", 3, np.arange(3), {CHECKSUM: 1}])
def test_wrong_checksum_is_refused(checksum: Any, tmp_path: Path) -> None:
    (tmp_path / "in.pkl").write_bytes(pickle.dumps({"model": {"a": np.arange(3)}, CHECKSUM: checksum}))
    with pytest.raises(DamagedFileError, match="its content does not match its checksum; download or make it again"):
        checkpoint.load(tmp_path / "in.pkl", "IN")


# Every command that reads a checkpoint.


@pytest.fixture(scope="module")
def inverted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with checkpoints of a run, in each of which 2,000 bytes in the middle are inverted."""
    folder = tmp_path_factory.mktemp("inverted")
    method = make_method()
    torch.save({"model": to_half(method.state_dict()), "args": {"method": "slotcon"}, "epoch": 3}, folder / "in.pth")
    encoder = EncoderWeights(to_half(method.encoder_k.state_dict()), "resnet18", PROVENANCE)
    for suffix, target in ((".safetensors", "safetensors"), (".pkl", "detectron2")):
        write_converted(folder / f"in{suffix}", encoder, target)
    for path in folder.iterdir():
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 2)
            inverted = bytes(255 - value for value in file.read(2000))
            file.seek(-2000, 1)
            file.write(inverted)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pkl"])
@pytest.mark.parametrize("command", ["--init", "--resume", "convert", "compare", "viz_slots", "probe"])
def test_commands_refuse_a_damaged_checkpoint_in_one_line(
    command: str,
    suffix: str,
    inverted: Path,
    tiny: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, out = str(inverted / f"in{suffix}"), str(tmp_path / "out")
    source = str(tmp_path / "source.pth")
    if command == "compare":
        torch.save(resnet18_weights(1), source)
    main, argv = {
        "--init": (main_pretrain.main, tiny("--init", path)),
        "--resume": (main_pretrain.main, tiny("--resume", path)),
        "convert": (convert.main, [path, f"{out}.pth", "--verify"]),
        "compare": (convert.main, [source, path, "--verify"]),
        "viz_slots": (viz_slots.main, ["--model-path", path, "--save-path", f"{out}.png"]),
        "probe": (linear_segmentation.main, [path, "--data-dir", str(make_folder(tmp_path)), "--out", out]),
    }[command]
    line = run_expecting_usage_error(main, argv, capsys)
    assert f"{path}: damaged: " in line
    assert "checksum; " in line
    assert not list(tmp_path.glob("out*"))


def test_fine_tuning_refuses_a_damaged_checkpoint(inverted: Path) -> None:
    with pytest.raises(DamagedFileError, match="damaged"):
        read_fine_tuned(inverted / "in.pth", "CHECKPOINT")
    for name in ("in.pth", "in.pkl"):
        with pytest.raises(DamagedFileError, match="damaged"):
            read_weights(WeightsFile("MODEL.WEIGHTS", inverted / name, full_model=False))
