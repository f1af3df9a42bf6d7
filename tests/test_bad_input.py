"""Invalid flags end the pre-training command with one line, exit status 2, and nothing written."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import main_pretrain
from data.loader import build_dataset, collate
from models import METHODS
from models.alignment import pairwise_overlap_boxes
from tests.helpers import make_image, read_metrics, run_expecting_usage_error

VIT = ["--arch", "vit_tiny_patch16_224"]
GTSA = ["--method", "gtsa"]


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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*VIT, "--output-stride", "16"], "--output-stride 16: the stride of a vit_tiny_patch16_224 is its patch size"),
        ([*VIT, "--patch-size", "24"], "--image-size 64: not a multiple of the patch size 24; use 48 or 72"),
        ([*GTSA, *VIT, "--local-size", "40"], "--local-size 40: not a multiple of the patch size 16; use 32 or 48"),
        ([*GTSA, *VIT, "--patch-size", "0"], "--patch-size"),
        (["--patch-size", "8"], "--patch-size 8: a resnet18 has no patches"),
        (["--drop-path", "0.1"], "--drop-path 0.1: only ViTs have it"),
        ([*GTSA, "--drop-path", "0.1"], "--drop-path 0.1: only ViTs have it"),
        ([*GTSA, "--num-prototypes", "8"], "--num-prototypes"),
        (["--local-views", "2"], "--local-views"),
    ],
)
def test_flags_that_do_not_fit_the_encoder_or_the_method_are_named(
    flags: list[str], message: str, tiny: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in run_expecting_usage_error(main_pretrain.main, tiny(*flags), capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("small_encoder")
def test_views_that_cannot_meet_and_narrow_images_train(
    tiny: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without tries, crops need not intersect; no crop of the published shapes fits into an image of 1 x 1000 px."""
    monkeypatch.setattr("models.gtsa._MAX_TRIES", 0)
    (tmp_path / "images").mkdir()
    for number, size in enumerate([(1, 1000), (1000, 1), (1, 1), (400, 300)] * 4):
        image = Image.new("RGB", size, "red") if 1 in size else make_image(*size, seed=number)
        image.save(tmp_path / f"images/{number}.png")
    argv = tiny(*GTSA, "--data-dir", str(tmp_path / "images"), "--local-views", "6")
    args = main_pretrain.parse_args(argv)
    dataset = build_dataset(args, METHODS["gtsa"].view_recipes(args))
    _boxes, intersects = pairwise_overlap_boxes(collate([dataset[number] for number in range(16)]))
    assert not intersects[:, :, :2].all()
    main_pretrain.main(argv)
    (metrics,) = read_metrics(tmp_path / "run")
    assert metrics["optim/skipped_steps"] == metrics["data/unreadable_images"] == 0
    assert -1 <= metrics["loss/crop"] <= 1
