"""What several tests start from."""

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import main_pretrain
from data.demo import render_scene

PHOTOGRAPHS = Path(__file__).parents[2] / "shared" / "data" / "coco_mini"

TINY = ["--arch", "resnet18", "--image-size", "64", "--dim-hidden", "32", "--dim-out", "16", "--num-prototypes", "8"]
TINY += ["--device", "cpu", "--num-workers", "0", "--batch-size", "8", "--epochs", "2", "--warmup-epoch", "1"]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """The networks of the tests are so small that threads would only wait for one another."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def photographs() -> Path:
    """Real photographs in COCO's layout."""
    if not PHOTOGRAPHS.is_dir():
        pytest.skip("no photographs beside the project")
    return PHOTOGRAPHS


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 16 small images."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(16):
        pixels, _ = render_scene(0, "train", number, 96, 72)
        Image.fromarray(pixels).save(folder / f"{number:02}.jpg")
    return folder


@pytest.fixture
def tiny(images: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a run of four steps that takes a second; more flags as arguments."""

    def command(*more: str) -> list[str]:
        where = ["--dataset", "folder", "--data-dir", str(images), "--output-dir", str(tmp_path / "run")]
        return [*where, *TINY, *more]

    return command


@pytest.fixture
def tiny_args(tiny: Callable[..., list[str]]) -> argparse.Namespace:
    return main_pretrain.parse_args(tiny())


def run_expecting_usage_error(main: Callable[[list[str]], None], argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command, expect exit status 2 and one line on stderr alone; return it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err
