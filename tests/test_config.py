"""utils/config.py and the contract of a method: recipes become defaults, views and metrics are those of the method."""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import main_pretrain
from models import METHODS, Method
from models.ema import copy_and_freeze, ema_update
from tests.helpers import SmallEncoder, read_metrics
from utils.batch import Batch
from utils.config import at_least, between, make_plan
from utils.errors import UsageError
from utils.view_recipes import ColorRecipe, OverlapCondition, ViewRecipe

SCRIPTS = Path(__file__).parents[1] / "scripts"


class MultiCrop(Method):
    """A method with 2 + 8 rotated views, a recipe of its own, and no slots: the smallest that uses every contract."""

    recipe: ClassVar[Mapping[str, Any]] = {
        "optimizer": "adamw",
        "base_lr": 5e-4,
        "warmup_epoch": 1,
        "warmup_multiplier": math.inf,
        "weight_decay": 0.04,
        "weight_decay_end": 0.4,
        "clip_grad": 3.0,
        "clip_grad_per_parameter": True,
        "epochs": 100,
    }

    @staticmethod
    def add_arguments(group: argparse._ArgumentGroup) -> None:
        group.add_argument("--teacher-momentum", type=float, default=0.996)

    @staticmethod
    def view_recipes(args: argparse.Namespace) -> tuple[ViewRecipe, ...]:
        shared = {"color": ColorRecipe(), "flip_p": 0.0, "rotate": True, "interpolation": "bilinear"}
        large = [
            ViewRecipe(args.image_size, (0.3, 1), overlap=overlap, **shared)
            for overlap in (None, OverlapCondition((0,), 0.02, "image", 100))
        ]
        return (
            *large,
            *[ViewRecipe(32, (0.1, 0.3), overlap=OverlapCondition((0, 1), 0.01, "image", 100), **shared)] * 8,
        )

    def __init__(self, args: argparse.Namespace):
        super().__init__()
        self.encoder_q, self.encoder_k = SmallEncoder(), SmallEncoder()
        copy_and_freeze(self.encoder_q, self.encoder_k)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        assert [view.shape[2] for view in batch.views] == [64, 64, *[32] * 8]
        assert batch.rotations.shape == (len(batch.index), 10)
        with torch.no_grad():
            targets = [self.encoder_k(view).mean(dim=(2, 3)) for view in batch.views[:2]]
        outputs = [self.encoder_q(view).mean(dim=(2, 3)) for view in batch.views]
        loss = torch.stack([(output - target).square().mean() for output in outputs for target in targets]).mean()
        return {"loss": loss, "views/distance": loss.detach()}

    def update_teacher(self, momentum: float) -> None:
        ema_update(self.encoder_q, self.encoder_k, momentum)


@pytest.fixture
def multi_crop(monkeypatch: pytest.MonkeyPatch) -> type[MultiCrop]:
    monkeypatch.setitem(METHODS, "multi-crop", MultiCrop)
    return MultiCrop


def test_a_recipe_sets_the_defaults_of_shared_arguments(
    multi_crop: type[MultiCrop], capsys: pytest.CaptureFixture[str]
) -> None:
    args = vars(main_pretrain.parse_args(["--method", "multi-crop"]))
    assert {name: args[name] for name in MultiCrop.recipe} == MultiCrop.recipe
    assert vars(main_pretrain.parse_args([]))["optimizer"] == "lars"  # the recipe of one method is not another's
    args = vars(main_pretrain.parse_args(["--epochs", "7", "--method", "multi-crop", "--optimizer", "sgd"]))
    assert (args["optimizer"], args["epochs"], args["base_lr"]) == ("sgd", 7, 5e-4)
    with pytest.raises(SystemExit):
        main_pretrain.parse_args(["--method", "multi-crop", "--help"])
    assert "optimizer (default: adamw)" in capsys.readouterr().out


@pytest.mark.parametrize("arch", [["--arch", "vit_small_patch16_224"], ["--arch=vit_base_patch8_224"]], ids=" ".join)
@pytest.mark.parametrize("method", ["slotcon", "slotfa"])
def test_vits_have_a_recipe_of_their_own(method: str, arch: list[str]) -> None:
    args = main_pretrain.parse_args(["--method", method, *arch, "--base-lr", "1e-3"])
    assert (args.optimizer, args.base_lr, args.weight_decay_end, args.drop_path) == ("adamw", 1e-3, 0.4, 0.1)
    resnet = main_pretrain.parse_args(["--method", method, "--arch", "resnet18"])
    assert (resnet.optimizer, resnet.weight_decay_end, resnet.drop_path) == ("lars", None, 0)


def test_gtsa_trains_resnets_without_stochastic_depth() -> None:
    args = main_pretrain.parse_args(["--method", "gtsa", "--arch", "resnet50"])
    assert (args.optimizer, args.drop_path, args.epochs) == ("adamw", 0, 100)
    assert main_pretrain.parse_args(["--method", "gtsa"]).drop_path == 0.1


def test_runs_too_short_for_their_schedule_say_so(
    tiny: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    main_pretrain.main(tiny("--method", "gtsa", "--dry-run", "--warmup-epoch", "2", "--correspondence-epoch", "2"))
    summary = capsys.readouterr().out
    assert "the warm-up of 2 epochs takes the whole run" in summary
    assert "no patch correspondence loss: it starts after 2 epochs" in summary
    main_pretrain.main(tiny("--method", "gtsa", "--dry-run"))
    summary = capsys.readouterr().out
    assert "warm-up of" not in summary
    assert "no patch correspondence" not in summary


def test_patch_size_replaces_that_in_the_name_of_the_architecture() -> None:
    arch = ["--arch", "vit_small_patch16_224"]
    args = main_pretrain.parse_args([*arch, "--patch-size", "8"])
    assert (args.arch, args.patch_size) == ("vit_small_patch8_224", 8)
    assert vars(args) == vars(main_pretrain.parse_args(["--arch", "vit_small_patch8_224"]))
    assert main_pretrain.parse_args([*arch, "--patch-size", "20"]).arch == "vit_small_patch20_224"
    assert main_pretrain.parse_args(["--method", "gtsa", "--patch-size", "8"]).arch == "vit_small_patch8_224"
    assert main_pretrain.parse_args([]).patch_size is None
    with pytest.raises(UsageError, match="--patch-size 8: a resnet50 has no patches"):
        main_pretrain.parse_args(["--patch-size", "8"])
    with pytest.raises(UsageError, match="--patch-size 225: larger than the 224 px"):
        main_pretrain.parse_args([*arch, "--patch-size", "225"])


@pytest.mark.parametrize(("flags", "expected"), [([], True), (["--no-clip-grad-per-parameter"], False)])
def test_gtsa_clips_by_parameter_or_all_together(flags: list[str], expected: bool) -> None:
    assert main_pretrain.parse_args(["--method", "gtsa", *flags]).clip_grad_per_parameter is expected


def test_a_recipe_wins_over_defaults_that_the_method_sets(
    multi_crop: type[MultiCrop], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_arguments = MultiCrop.add_arguments

    def set_defaults(group: argparse._ArgumentGroup) -> None:
        add_arguments(group)
        group.set_defaults(optimizer="sgd")

    monkeypatch.setattr(MultiCrop, "add_arguments", staticmethod(set_defaults))
    assert main_pretrain.parse_args(["--method", "multi-crop"]).optimizer == "adamw"


def test_a_recipe_with_an_unknown_argument_is_an_error(
    multi_crop: type[MultiCrop], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MultiCrop, "recipe", {"learning_rate": 1.0})
    with pytest.raises(KeyError, match="learning_rate"):
        main_pretrain.parse_args(["--method", "multi-crop"])


def test_a_method_trains_with_its_views_recipe_and_metrics(
    multi_crop: type[MultiCrop], tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    main_pretrain.main(tiny("--method", "multi-crop", "--print-freq", "1"))
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["args"]["optimizer"] == "adamw"
    metrics = read_metrics(tmp_path / "run")
    assert [record["optim/lr"] for record in metrics][:2] == pytest.approx([0, 5e-4 * 8 / 256 / 2])
    decay = [0.4 - 0.36 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert [record["optim/weight_decay"] for record in metrics] == pytest.approx(decay)
    assert all(record["views/distance"] == record["loss"] for record in metrics)
    assert re.search(r"loss \d\.\d+ lr", (tmp_path / "run/log.txt").read_text())  # without empty parentheses
    assert not (tmp_path / "run/slots.png").exists()


def test_the_published_recipe_of_slotcon_is_the_default() -> None:
    args = vars(main_pretrain.parse_args([]))
    published = {"dataset": "COCO", "data_dir": "./data", "image_size": 224, "min_scale": 0.08, "arch": "resnet50"}
    published |= {"dim_hidden": 4096, "dim_out": 256, "num_prototypes": 256, "teacher_momentum": 0.99}
    published |= {"teacher_temp": 0.07, "student_temp": 0.1, "center_momentum": 0.9, "group_loss_weight": 0.5}
    published |= {"batch_size": 512, "base_lr": 1.0, "optimizer": "lars", "warmup_epoch": 5, "warmup_multiplier": 100}
    published |= {"weight_decay": 1e-5, "momentum": 0.9, "start_epoch": 1, "epochs": 800, "output_dir": "./output"}
    published |= {"auto_resume": False, "resume": "", "print_freq": 10, "save_freq": 50, "seed": 0, "num_workers": 8}
    published |= {"contrast_temp": 0.2, "output_stride": 32, "weight_decay_end": None, "clip_grad": 0}
    assert {name: args[name] for name in published} == published


SLOTCON = {"method": "slotcon", "dataset": "COCO", "epochs": 800, "num_prototypes": 256}
SLOTFA = SLOTCON | {"method": "slotfa", "group_loss_weight": 1.0, "fa_gradient": True, "fa_train_prototypes": False}
GTSA = {"method": "gtsa", "dataset": "COCO", "epochs": 100}
LAUNCHERS = {
    "slotcon_coco_r50_800ep": SLOTCON,
    "slotcon_cocoplus_r50_800ep": SLOTCON | {"dataset": "COCOplus"},
    "slotcon_imagenet_r50_100ep": SLOTCON | {"dataset": "ImageNet", "epochs": 100, "num_prototypes": 2048},
    "slotcon_imagenet_r50_200ep": SLOTCON | {"dataset": "ImageNet", "epochs": 200, "num_prototypes": 2048},
    "slotfa_coco_r50_800ep": SLOTFA,
    "slotfa_coco_r50_800ep_contrast": SLOTFA | {"group_loss_weight": 0.5, "fa_train_prototypes": True},
    "slotfa_coco_r50_800ep_released": SLOTFA | {"fa_gradient": False},
    "SlotFA": SLOTFA,
    "slotcon_coco_vit_small_800ep": SLOTCON | {"arch": "vit_small_patch16_224"},
    "gtsa_coco_vit_small_100ep": GTSA,
    "gtsa_ade20k_vit_small_100ep": GTSA | {"dataset": "ADE20K"},
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_starts_its_published_recipe(launcher: str, tmp_path: Path) -> None:
    """In a copy of the project whose torchrun prints its arguments."""
    shutil.copytree(SCRIPTS, tmp_path / "scripts")
    torchrun = tmp_path / ".venv/bin/torchrun"
    torchrun.parent.mkdir(parents=True)
    torchrun.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    torchrun.chmod(0o755)
    command = ["bash", str(tmp_path / f"scripts/{launcher}.sh"), "--seed", "7"]
    variables = os.environ | {"DATA": "/images", "OUT": "run", "GPUS": "3"}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=variables).stdout
    words = output.splitlines()
    assert words[words.index("--nproc_per_node") + 1] == "3"
    args = main_pretrain.parse_args(words[words.index(str(tmp_path / "main_pretrain.py")) + 1 :])
    expected = vars(main_pretrain.parse_args(["--method", args.method, "--arch", args.arch])) | LAUNCHERS[launcher]
    expected |= {"data_dir": "/images", "output_dir": "run", "seed": 7, "auto_resume": True, "device": "cuda"}
    expected |= {"amp": "bf16", "save_freq": args.save_freq}
    assert vars(args) == expected


@pytest.mark.parametrize(
    ("kind", "accepted", "refused"),
    [
        (at_least(1), {"1": 1, "20": 20}, ["0", "1.5", "x", "inf"]),
        (at_least(0, float), {"0": 0, "1e-5": 1e-5}, ["-1", "inf", "nan", ""]),
        (between(0, 1), {"0": 0, "1": 1, "0.5": 0.5}, ["-0.1", "1.1", "nan"]),
    ],
)
def test_numbers_outside_of_their_range_are_refused(
    kind: Callable[[str], float], accepted: dict[str, float], refused: list[str]
) -> None:
    assert {text: kind(text) for text in accepted} == accepted
    for text in refused:
        with pytest.raises(argparse.ArgumentTypeError, match=repr(text)):
            kind(text)


@pytest.mark.parametrize(
    ("flags", "images", "message"),
    [
        (["--batch-size", "9"], 16, "--batch-size 9: not divisible by 2 processes"),
        (["--batch-size", "18"], 16, "--batch-size 18: more than the 16 images"),
        (["--accum-steps", "3", "--batch-size", "8"], 16, "--batch-size 8 x --accum-steps 3: more than the 16 images"),
        (["--start-epoch", "4", "--epochs", "3", "--batch-size", "2"], 16, "--start-epoch 4: beyond --epochs 3"),
    ],
)
def test_impossible_plan_is_refused(flags: list[str], images: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_plan(main_pretrain.parse_args(flags), images, world_size=2)
