"""Fixtures of all tests. Tests that need no fixture of pytest share `tests/helpers.py`."""

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path

# The networks of the tests are so small that threads would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# These caches of compiled graphs ignore ATEN_CPU_CAPABILITY: code for other vector widths would compute nonsense.
os.environ |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}

import hypothesis
import pytest
from PIL import Image

import main_pretrain
from data.demo import render_scene
from tests.helpers import tiny_flags, use_small_encoder

PHOTOGRAPHS = Path(__file__).parents[2] / "shared" / "data" / "coco_mini"

# The same examples in every run, and no limit on the time that a slow machine takes for one.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def photographs() -> Path:
    """Real photographs in COCO's layout."""
    if not PHOTOGRAPHS.is_dir():
        pytest.skip("no photographs next to the project")
    return PHOTOGRAPHS


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 16 small images, which tests only read."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(16):
        pixels, _ = render_scene(0, "train", number, 96, 72)
        Image.fromarray(pixels).save(folder / f"{number:02}.jpg")
    return folder


@pytest.fixture
def tiny(images: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a run of four steps into `tmp_path / "run"`; additional flags as arguments."""

    def command(*flags: str) -> list[str]:
        paths = ["--dataset", "folder", "--data-dir", str(images), "--output-dir", str(tmp_path / "run")]
        return [*paths, *tiny_flags(*flags)]

    return command


@pytest.fixture
def tiny_args(tiny: Callable[..., list[str]]) -> argparse.Namespace:
    return main_pretrain.parse_args(tiny())


@pytest.fixture
def small_encoder() -> Iterator[None]:
    """Build methods with `SmallEncoder`, for tests that do not depend on the encoder."""
    with use_small_encoder():
        yield
