"""data/datasets.py and utils/device.py: which files a dataset has, and what a run takes of the machine."""

import argparse
import os
from pathlib import Path

import pytest
import torch

import main_pretrain
from data.datasets import FOLDERS, build_dataset
from tests.helpers import make_image
from utils.device import amp_dtype, choose_device, loader_workers
from utils.errors import UsageError


def parse(dataset: str, folder: Path) -> argparse.Namespace:
    return main_pretrain.parse_args(["--dataset", dataset, "--data-dir", str(folder), "--image-size", "32"])


@pytest.mark.parametrize("dataset", sorted(FOLDERS.keys() - {"demo"}))
def test_a_dataset_has_the_images_of_its_folders(dataset: str, tmp_path: Path) -> None:
    expected = []
    for folder in FOLDERS[dataset]:
        for name in ("b.jpg", "a.PNG", "deeper/c.jpeg"):
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            make_image(40, 30).save(path)
            expected.append(path.relative_to(tmp_path).as_posix())
        for name in (".hidden.jpg", "notes.txt"):
            (tmp_path / folder / name).touch()
    if dataset != "folder":
        (tmp_path / "elsewhere").mkdir()
        make_image(40, 30).save(tmp_path / "elsewhere" / "d.jpg")
    loaded = build_dataset(parse(dataset, tmp_path))
    assert [os.fsdecode(file) for file in loaded.files] == sorted(expected)
    assert loaded.center_crops(2, 16).shape == (2, 3, 16, 16)


def test_indices_continue_over_epochs(images: Path) -> None:
    dataset = build_dataset(parse("folder", images))
    first, second = dataset[3], dataset[3 + len(dataset)]
    assert first.index == second.index == 3
    assert not torch.equal(first.crops, second.crops)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--dataset COCOplus needs the folder train2017/"):
        build_dataset(parse("COCOplus", tmp_path))


def test_a_run_on_the_cpu_is_float32_with_a_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    args = main_pretrain.parse_args(["--device", "cpu"])
    assert choose_device(args) == torch.device("cpu")
    assert (args.amp, amp_dtype(args)) == ("off", None)
    args = main_pretrain.parse_args(["--device", "cpu", "--amp", "bf16"])
    choose_device(args)
    assert amp_dtype(args) == torch.bfloat16
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert [loader_workers(requested) for requested in (0, 2, 8)] == [0, 2, 3]
