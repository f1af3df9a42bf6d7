"""Invalid flags end the pre-training command with one line, exit status 2, and nothing written."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import main_pretrain
from tests.helpers import run_expecting_usage_error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arch", "resnet51"], "--arch"),
        (["--method", "moco"], "--method"),
        (["--method"], "--method"),
        (["--dataset", "VOC"], "--dataset"),
        (["--dataset", "COCO"], "train2017"),
        (["--data-dir", "nowhere"], "--data-dir nowhere"),
        (["--batch-size", "17"], "--batch-size 17: more than the 16 images"),
        (["--batch-size", "1", "--image-size", "32"], "--batch-size 1 with --image-size 32"),
        (["--base-lr", "fast"], "--base-lr"),
        (["--teacher-momentum", "1.5"], "--teacher-momentum"),
        (["--epoch", "3"], "--epoch"),
        (["--resume", "nowhere.pth"], "--resume nowhere.pth"),
        (["--resume", "nowhere.pth", "--auto-resume"], "--resume nowhere.pth"),
        (["--init", "nowhere.pth"], "--init nowhere.pth"),
        (["--resume", __file__, "--init", __file__], "use only one of them"),
        (["--output-dir", __file__], "--output-dir"),
        (["--cuda-graphs"], "--cuda-graphs: only on one GPU"),
        (["--activation-budget", "0.5"], "--activation-budget: only with compilation; add --compile"),
        pytest.param(
            ["--device", "cuda"], "--device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
        ),
    ],
)
@pytest.mark.usefixtures("small_encoder")
def test_an_invalid_flag_is_named_and_nothing_is_written(
    flags: list[str], message: str, tiny: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in run_expecting_usage_error(main_pretrain.main, tiny(*flags), capsys)
    assert not (tmp_path / "run").exists()


def test_a_folder_without_images_is_refused(
    tmp_path: Path, tiny: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").touch()
    argv = tiny("--data-dir", str(tmp_path))
    assert "no images" in run_expecting_usage_error(main_pretrain.main, argv, capsys)
