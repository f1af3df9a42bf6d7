"""Fine-tuning with detectron2: recipe, weights and checks without detectron2; training where it is installed."""

import ast
import functools
import gc
import importlib
import json
import logging
import math
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor
from torchvision import models as torchvision_models

from models.vit import ViTEncoder, build_vit
from tests.checkpoint_data import CodeInPickle
from tests.detection_data import HEIGHT, WIDTH, make_cityscapes, make_coco, make_custom_data
from tests.helpers import run_expecting_usage_error
from tests.reference.framework_names import resnet_rows
from transfer.convert import main as convert_main
from transfer.detection import d2_config, d2_registration, d2_weights, train_net
from transfer.detection.coco_json import CocoData
from transfer.detection.d2_custom_dataset import read_custom_dataset
from transfer.detection.d2_solver import SolverSettings, default_solver_settings
from transfer.detection.d2_weights import RESNET_PREFIX, WeightsFile
from transfer.frameworks import data_root
from transfer.results import write_json
from utils.errors import UsageError
from utils.integrity import CHECKSUM
from utils.vit_names import DETECTRON2_PREFIX as VIT_PREFIX

TRAIN_NET = Path(train_net.__file__)
CONFIGS = TRAIN_NET.parent / "configs"
SLOTCON = str(CONFIGS / "COCO_R_50_FPN_1x_SlotCon.yaml")
GTSA = str(CONFIGS / "COCO_ViT_S_FPN_1x_GTSA.yaml")
CUSTOM = str(CONFIGS / "Custom_R_50_FPN.yaml")
CUSTOM_VIT = str(CONFIGS / "Custom_ViT_S_FPN.yaml")
SMALL_RUN = {
    "SEED": "1",
    "INPUT.MIN_SIZE_TRAIN": "(96,)",
    "INPUT.MIN_SIZE_TEST": "96",
    "SOLVER.IMS_PER_BATCH": "2",
    "SOLVER.BASE_LR": "0.001",
    "SOLVER.MAX_ITER": "2",
    "TEST.PRECISE_BN.NUM_ITER": "2",
    "DATALOADER.NUM_WORKERS": "0",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": "50",
    "MODEL.RPN.POST_NMS_TOPK_TEST": "20",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": "16",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "0.0",
}
CAPSYS = pytest.CaptureFixture[str]


# Recipes


def merge_config(path: Path) -> dict[str, Any]:
    """Return a config file merged over its base, without detectron2."""
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load(path.read_text())
    base = config.pop("_BASE_", None)

    def override(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
        return (
            low
            | high
            | {key: override(low[key], high[key]) for key in high if isinstance(high[key], dict) and key in low}
        )

    return override(merge_config(path.parent / base), config) if base else config


COCO_1X = {"IMS_PER_BATCH": 16, "BASE_LR": 0.02, "STEPS": (60000, 80000), "MAX_ITER": 90000}
COCO_2X = COCO_1X | {"STEPS": (120000, 160000), "MAX_ITER": 180000}
CITYSCAPES = {"IMS_PER_BATCH": 8, "BASE_LR": 0.01, "STEPS": (18000,), "MAX_ITER": 24000}
SCHEDULES = {
    "COCO_R_50_FPN_1x": COCO_1X,
    "COCO_R_50_FPN_1x_SlotCon": COCO_1X,
    "COCO_R_50_FPN_1x_SlotFA": COCO_1X,
    "COCO_R_50_FPN_2x_SlotCon": COCO_2X,
    "COCO_R_50_FPN_2x_SlotFA": COCO_2X,
    "Cityscapes_R_50_FPN_SlotCon": CITYSCAPES,
    "Cityscapes_R_50_FPN_SlotFA": CITYSCAPES,
    "COCO_ViT_S_FPN_1x_GTSA": COCO_1X | {"BASE_LR": 0.0001},
}
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
RECIPE: dict[str, Any] = {
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.WEIGHTS": "",
    "MODEL.MASK_ON": True,
    "MODEL.PIXEL_MEAN": MEAN,
    "MODEL.PIXEL_STD": STD,
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.NORM": "SyncBN",
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.FPN.NORM": "SyncBN",
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NORM": "SyncBN",
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 4,
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
    "MODEL.ROI_MASK_HEAD.NORM": "SyncBN",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 4,
    "INPUT.FORMAT": "RGB",
    "INPUT.MIN_SIZE_TRAIN": (640, 672, 704, 736, 768, 800),
    "INPUT.MIN_SIZE_TEST": 800,
    "DATASETS.TRAIN": ("coco_2017_train",),
    "DATASETS.TEST": ("coco_2017_val",),
    "TEST.PRECISE_BN.ENABLED": True,
}
"""Mask R-CNN as in the experiments of SlotCon, by the keys of detectron2; a list stays a list in its configs."""
DEFAULTS: dict[str, Any] = {
    "INPUT.MAX_SIZE_TRAIN": 1333,
    "INPUT.MAX_SIZE_TEST": 1333,
    "MODEL.ROI_HEADS.NUM_CLASSES": 80,
    "SOLVER.GAMMA": 0.1,
    "SOLVER.MOMENTUM": 0.9,
    "SOLVER.WEIGHT_DECAY": 0.0001,
    "SOLVER.WARMUP_ITERS": 1000,
    "SOLVER.AMP.ENABLED": False,
    "TEST.PRECISE_BN.NUM_ITER": 200,
}
"""What the recipe takes from detectron2's defaults, unless a config sets it."""
SUPERVISED = {
    "MODEL.WEIGHTS": "detectron2://ImageNetPretrained/MSRA/R-50.pkl",
    "MODEL.PIXEL_MEAN": MEAN[::-1],
    "MODEL.PIXEL_STD": [1, 1, 1],
    "MODEL.RESNETS.STRIDE_IN_1X1": True,
    "INPUT.FORMAT": "BGR",
}
ON_CITYSCAPES = {
    "MODEL.ROI_HEADS.NUM_CLASSES": 8,
    "INPUT.MIN_SIZE_TRAIN": (800, 832, 864, 896, 928, 960, 992, 1024),
    "INPUT.MIN_SIZE_TEST": 1024,
    "INPUT.MAX_SIZE_TRAIN": 2048,
    "INPUT.MAX_SIZE_TEST": 2048,
    "DATASETS.TRAIN": ("cityscapes_fine_instance_seg_train",),
    "DATASETS.TEST": ("cityscapes_fine_instance_seg_val",),
}
WITH_VIT = {
    "MODEL.BACKBONE.NAME": "build_vit_fpn_backbone",
    "MODEL.VIT.EMBED_DIM": 384,
    "MODEL.VIT.DEPTH": 12,
    "MODEL.VIT.PATCH_SIZE": 16,
    "MODEL.VIT.DROP_PATH_RATE": 0.1,
    "MODEL.VIT.OUT_BLOCKS": (4, 6, 8, 12),
    "SOLVER.OPTIMIZER": "ADAMW",
    "SOLVER.LAYER_DECAY": 0.75,
    "SOLVER.WEIGHT_DECAY": 0.05,
    "SOLVER.WEIGHT_DECAY_NORM": 0,
    "SOLVER.WEIGHT_DECAY_BIAS": 0,
}


def recipe_of(name: str) -> dict[str, Any]:
    """Return the value of each field that a config sets, by its dotted key."""
    changes = {"COCO_R_50_FPN_1x": SUPERVISED, "COCO_ViT_S_FPN_1x_GTSA": WITH_VIT}.get(name, {})
    if name.startswith("Cityscapes"):
        changes = ON_CITYSCAPES
    return RECIPE | {f"SOLVER.{key}": value for key, value in SCHEDULES[name].items()} | changes


@pytest.mark.parametrize("name", SCHEDULES)
def test_config_has_its_recipe(name: str) -> None:
    config = merge_config(CONFIGS / f"{name}.yaml")
    for key, expected in recipe_of(name).items():
        value = functools.reduce(lambda node, part: node[part], key.split("."), config)
        # YAML has no tuples; detectron2 evaluates them.
        assert (ast.literal_eval(value) if isinstance(expected, tuple) else value) == expected, key


def test_each_config_has_its_own_output_folder() -> None:
    files = [path for path in CONFIGS.glob("*.yaml") if not path.name.startswith("Base")]
    assert {path.stem for path in files} == {*SCHEDULES, "Custom_R_50_FPN", "Custom_ViT_S_FPN"}
    assert len({merge_config(path)["OUTPUT_DIR"] for path in files}) == len(files)


# Checks without detectron2


def test_missing_detectron2_is_reported(tmp_path: Path) -> None:
    (tmp_path / "detectron2.py").write_text("raise ImportError(\"No module named 'detectron2'\")\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    argv = [sys.executable, str(TRAIN_NET), "--config-file", SLOTCON, "--num-gpus", "0", "OUTPUT_DIR", "run"]
    result = subprocess.run(argv, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("train_net.py: detectron2 cannot be imported (No module named 'detectron2')")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["SOLVER.BASE_LR"], "SOLVER.BASE_LR: a key without a value"),
        (["SOLVER.BASE_LR", "1", "--resume"], "--resume: flags come before"),
    ],
)
def test_unpaired_overrides_are_refused(options: list[str], message: str) -> None:
    args = train_net.parse_args(["--config-file", SLOTCON, *options])
    with pytest.raises(UsageError, match=message):
        d2_config.check_options(args)


@pytest.mark.parametrize(
    ("optimizer", "layer_decay", "backbone", "message"),
    [
        ("ADAM", 1.0, "build_vit_fpn_backbone", "SOLVER.OPTIMIZER ADAM: must be SGD or ADAMW"),
        ("ADAMW", 0.0, "build_vit_fpn_backbone", "SOLVER.LAYER_DECAY 0.0: must be above 0 and at most 1"),
        ("SGD", 0.75, "build_vit_fpn_backbone", "SOLVER.LAYER_DECAY 0.75: is for ADAMW on a ViT; set it to 1.0"),
        ("ADAMW", 0.75, "build_resnet_fpn_backbone", "SOLVER.LAYER_DECAY 0.75: is for ADAMW on a ViT; set it to 1.0"),
    ],
)
def test_unsuitable_optimizers_are_refused(optimizer: str, layer_decay: float, backbone: str, message: str) -> None:
    solver = SimpleNamespace(OPTIMIZER=optimizer, LAYER_DECAY=layer_decay, BIAS_LR_FACTOR=1.0)
    model = SimpleNamespace(BACKBONE=SimpleNamespace(NAME=backbone))
    with pytest.raises(UsageError) as error:
        d2_config.check_optimizer(SimpleNamespace(SOLVER=solver, MODEL=model))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("flags", "amp", "message"),
    [
        (["--num-gpus", "5"], False, "this machine has 4; 0 trains on the CPU"),
        (["--num-machines", "2"], False, "--dist-url"),
        (["--machine-rank", "1"], False, "--machine-rank"),
        (["--num-gpus", "0", "--num-machines", "2", "--dist-url", "tcp://first:1"], False, "SyncBN"),
        (["--num-gpus", "0"], True, "SOLVER.AMP.ENABLED"),
    ],
)
def test_unavailable_devices_are_refused(
    flags: list[str], amp: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    args = train_net.parse_args(["--config-file", SLOTCON, *flags])
    with pytest.raises(UsageError, match=message):
        d2_config.configure_device(device_config(amp), args)


def device_config(amp: bool = False) -> Any:
    return SimpleNamespace(
        MODEL=SimpleNamespace(DEVICE="cuda"), SOLVER=SimpleNamespace(AMP=SimpleNamespace(ENABLED=amp))
    )


def test_number_of_processes_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    cfg, flags = device_config(), ["--config-file", SLOTCON]
    assert d2_config.configure_device(cfg, train_net.parse_args([*flags, "--num-gpus", "4"])) == (4, [])
    machines = ["--num-gpus", "4", "--num-machines", "2", "--dist-url", "tcp://first:1"]
    assert d2_config.configure_device(cfg, train_net.parse_args([*flags, *machines])) == (8, [])
    assert cfg.MODEL.DEVICE == "cuda"
    assert d2_config.configure_device(cfg, train_net.parse_args([*flags, "--num-gpus", "0"]))[0] == 1
    assert cfg.MODEL.DEVICE == "cpu"


def test_missing_data_is_reported_with_the_link_to_create(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    path = tmp_path / "coco/annotations/instances_train2017.json"
    metadata = {"evaluator_type": "coco", "json_file": str(path), "image_root": str(tmp_path)}
    with pytest.raises(UsageError, match=f"{path} does not exist; .*ln -s /path/to/coco {tmp_path}/coco"):
        d2_config.check_dataset("coco_2017_train", metadata, num_machines=1)
    with pytest.raises(UsageError, match="lvis_v1_val is not instance segmentation"):
        d2_config.check_dataset("lvis_v1_val", metadata | {"evaluator_type": "lvis"}, num_machines=1)
    path.parent.mkdir(parents=True)
    path.touch()
    d2_config.check_dataset("coco_2017_train", metadata, num_machines=1)


def test_home_folder_in_the_data_folders_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable, task in (("DETECTRON2_DATASETS", "detection"), ("SEGMENTATION_DATA", "segmentation")):
        monkeypatch.setenv(variable, "~/data")
        assert data_root(task) == tmp_path / "data"


def test_capped_evaluation_is_for_coco_style_data(tmp_path: Path) -> None:
    pytest.importorskip("cityscapesscripts")
    metadata = {"evaluator_type": "cityscapes_instance"}
    with pytest.raises(UsageError, match="--max-val-images: detectron2 evaluates Cityscapes on all images only"):
        d2_config.check_dataset("cityscapes", metadata, num_machines=1, max_val_images=5)


def test_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    cfg = SimpleNamespace(OUTPUT_DIR=str(tmp_path / "run"))
    d2_config.check_output_dir(cfg, resume_or_eval=False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/last_checkpoint").write_text("model_0004999.pth")
    with pytest.raises(UsageError, match="already contains a run; add --resume"):
        d2_config.check_output_dir(cfg, resume_or_eval=False)
    d2_config.check_output_dir(cfg, resume_or_eval=True)
    with pytest.raises(UsageError, match=r"OUTPUT_DIR .* is not a folder"):
        d2_config.check_output_dir(SimpleNamespace(OUTPUT_DIR=str(tmp_path / "run/last_checkpoint/run")), False)


def test_numbers_that_are_not_finite_are_null_in_results(tmp_path: Path) -> None:
    write_json(tmp_path / "results.json", {"segm": {"AP": np.float32(12.3), "APs": math.nan, "APl": math.inf}})
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text) == {"segm": {"AP": 12.3, "APs": None, "APl": None}}


def test_numpy_integers_and_booleans_keep_their_type_in_results(tmp_path: Path) -> None:
    write_json(tmp_path / "results.json", [np.int64(5), np.bool_(True), 5, np.float64(5)])
    assert "".join((tmp_path / "results.json").read_text().split()) == "[5,true,5,5.0]"


# Custom datasets without detectron2


def test_solver_settings_follow_from_the_number_of_images() -> None:
    coco = default_solver_settings(117_266)
    assert {"IMS_PER_BATCH": coco.ims_per_batch, "BASE_LR": coco.base_lr} | {
        "STEPS": coco.steps,
        "MAX_ITER": coco.max_iter,
    } == COCO_1X
    assert (coco.warmup_iters, coco.eval_period, coco.precise_bn_iters) == (1000, 18000, 200)
    assert default_solver_settings(2975) == SolverSettings(
        16, 0.02, 14336, (9557, 12743), warmup_iters=1000, eval_period=2868, precise_bn_iters=186
    )
    assert default_solver_settings(5) == SolverSettings(
        5, 0.00625, 1881, (1254, 1672), warmup_iters=188, eval_period=377, precise_bn_iters=1
    )


def test_solver_settings_follow_from_batch_size_length_and_processes() -> None:
    default, small = default_solver_settings(100), default_solver_settings(100, ims_per_batch=4)
    assert small.base_lr == default.base_lr / 4
    assert small.max_iter * small.ims_per_batch == pytest.approx(default.max_iter * default.ims_per_batch, abs=16)
    assert default_solver_settings(100, max_iter=90) == SolverSettings(
        16, 0.02, 90, (60, 80), warmup_iters=9, eval_period=18, precise_bn_iters=7
    )
    assert default_solver_settings(100, max_iter=1).steps == ()
    assert default_solver_settings(100, processes=3).ims_per_batch == 15
    assert default_solver_settings(100, ims_per_batch=8, optimizer="ADAMW").base_lr == 0.00005
    many = default_solver_settings(100, processes=32)
    assert (many.ims_per_batch, many.base_lr, many.max_iter) == (32, 0.04, math.ceil(default.max_iter / 2))


CUSTOM_DATASET = ["--train-json", "a.json", "--train-images", "a", "--val-json", "b.json", "--val-images", "b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (CUSTOM_DATASET[:-2], "--val-images is missing; --train-json, --train-images, --val-json and --val-images go"),
        (CUSTOM_DATASET[2:], "--train-json is missing"),
        ([*CUSTOM_DATASET[:2], *CUSTOM_DATASET[4:]], "--train-images is missing"),
        (["--eval-only", *CUSTOM_DATASET[4:]], "--train-json is missing; --train-json, --val-json and --val-images go"),
        ([*CUSTOM_DATASET, "--auto-scale"], "--auto-scale: custom datasets have a schedule of their own"),
        ([*CUSTOM_DATASET, "DATASETS.TEST", "('coco_2017_val',)"], "DATASETS.TEST: follows from --train-json"),
        ([*CUSTOM_DATASET, "MODEL.ROI_HEADS.NUM_CLASSES", "3"], "MODEL.ROI_HEADS.NUM_CLASSES: follows from --train-"),
        (CUSTOM_DATASET, "--train-json a.json: no such file"),
    ],
)
def test_unsuitable_flags_of_custom_datasets_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        read_custom_dataset(train_net.parse_args(["--config-file", CUSTOM, *arguments]))
    assert str(error.value).startswith(message)


def test_evaluation_reads_no_training_images(tmp_path: Path) -> None:
    make_custom_data(tmp_path)
    shutil.rmtree(tmp_path / "train")
    flags = [f"--train-json={tmp_path}/train.json", f"--val-json={tmp_path}/val.json", f"--val-images={tmp_path}/val"]
    dataset = read_custom_dataset(train_net.parse_args(["--config-file", CUSTOM, "--eval-only", *flags]))
    assert dataset is not None
    assert {split: coco.classes for split, coco in dataset.items()} == {"val": ["first", "second"]}


# Weights without detectron2: a ResNet-18 under detectron2's names in place of the configs' ResNet-50


def convert(network: torchvision_models.ResNet, arch: str = "resnet50") -> dict[str, Any]:
    """Return what convert_pretrain_to_d2.py writes for `network`, by the tests' own table of names."""
    weights = network.state_dict()
    arrays = {row.detectron2: weights[row.torchvision].numpy() for row in resnet_rows(int(arch.removeprefix("resnet")))}
    provenance = {"arch": arch, "format": "detectron2", "source": "in.pth", "source_sha256": "0", "encoder": "only"}
    return {"model": arrays, "__author__": "tests", "matching_heuristics": True, "provenance": provenance}


def model_of(state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the state of a detector whose backbone has the converted tensors."""
    backbone = {RESNET_PREFIX + name: torch.from_numpy(value.copy()) for name, value in state["model"].items()}
    return backbone | {"backbone.fpn_output2.weight": torch.zeros(4), "roi_heads.box_head.fc1.weight": torch.zeros(2)}


@pytest.fixture(scope="module")
def resnet18() -> torchvision_models.ResNet:
    return torchvision_models.resnet18()


def test_all_backbone_tensors_come_from_the_file(resnet18: torchvision_models.ResNet, tmp_path: Path) -> None:
    path, state = tmp_path / "encoder.pkl", convert(resnet18, "resnet18")
    path.write_bytes(pickle.dumps(state))
    file, model = WeightsFile("MODEL.WEIGHTS", path, full_model=False), model_of(state)
    expected = d2_weights.check_weights(file, model)
    assert set(expected) == {name for name in model if name.startswith(RESNET_PREFIX)}
    assert d2_weights.check_loaded(file, model) == f"120 of 120 backbone tensors from {path}"
    for name in ("stem.conv1.norm.running_var", "res5.1.conv2.norm.num_batches_tracked"):
        changed = model | {RESNET_PREFIX + name: model[RESNET_PREFIX + name] + 1}
        with pytest.raises(UsageError, match=f"detectron2 did not load {RESNET_PREFIX}{name}"):
            d2_weights.check_loaded(file, changed)
    with pytest.raises(UsageError, match=r"backbone.fpn_output2.weight is missing; give a detector of this config"):
        d2_weights.check_weights(WeightsFile("MODEL.WEIGHTS", path, full_model=True), model_of(state))


def replace(state: dict[str, Any], name: str, array: np.ndarray | None) -> dict[str, Any]:
    """Return the converted file with another tensor, or without it, and without checksum."""
    state = {key: value for key, value in state.items() if key != CHECKSUM}
    arrays = {key: value for key, value in state["model"].items() if key != name}
    return state | {"model": arrays if array is None else arrays | {name: array}}


UNSUITABLE: dict[str, tuple[Callable[[torchvision_models.ResNet, Path], Any], str]] = {
    "missing": (
        lambda network, _: replace(convert(network, "resnet18"), "res3.1.conv2.norm.running_mean", None),
        "res3.1.conv2.norm.running_mean is missing; the file is incomplete; make it again with python transfer/",
    ),
    "nan": (
        lambda network, _: replace(
            convert(network, "resnet18"), "res2.0.conv2.weight", np.full((64, 64, 3, 3), np.nan, np.float32)
        ),
        "res2.0.conv2.weight is not finite",
    ),
    "shape": (
        lambda network, _: replace(
            convert(network, "resnet18"), "res5.0.conv2.weight", np.zeros((512, 512, 1, 1), np.float32)
        ),
        "res5.0.conv2.weight has shape (512, 512, 1, 1) and the config's model (512, 512, 3, 3); the file holds",
    ),
    "other_architecture": (
        lambda *_: convert(torchvision_models.resnet34(), "resnet34"),
        "holds a ResNet-34, and the config is for a ResNet-18; use weights and config of one network",
    ),
    "other_tensor": (
        lambda network, _: replace(convert(network, "resnet18"), "res2.0.gate.weight", np.zeros(1, np.float32)),
        "res2.0.gate.weight does not exist in the config's model; the file holds another network",
    ),
    "code": (lambda network, path: convert(network, "resnet18") | {"note": CodeInPickle(path / "executed")}, "refused"),
    "no_weights": (lambda *_: {"model": 3}, "no weights"),
    "other_content": (
        lambda *_: {"model": {"number": 2.0}},
        "no ResNet or ViT in it; make a file with python transfer/",
    ),
}


@pytest.mark.parametrize("name", UNSUITABLE)
def test_unsuitable_weights_are_refused(name: str, resnet18: torchvision_models.ResNet, tmp_path: Path) -> None:
    make, message = UNSUITABLE[name]
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps(make(resnet18, tmp_path)))
    with pytest.raises(UsageError) as error:
        d2_weights.check_weights(WeightsFile("MODEL.WEIGHTS", path, False), model_of(convert(resnet18, "resnet18")))
    assert str(error.value).startswith(f"MODEL.WEIGHTS {path}: ")
    assert message in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_unconverted_weights_are_refused_with_the_command_that_converts_them(
    resnet18: torchvision_models.ResNet, tmp_path: Path
) -> None:
    state = resnet18.state_dict()
    model = model_of(convert(resnet18, "resnet18"))
    pretraining = {f"{name}.{key}": value for name in ("encoder_q", "encoder_k") for key, value in state.items()}
    torch.save({"model": pretraining, "args": Namespace(arch="resnet18"), "epoch": 3}, tmp_path / "current.pth")
    torch.save({"state_dict": state}, tmp_path / "timm.pth")
    torch.save({"state_dict": {f"backbone.{key}": value for key, value in state.items()}}, tmp_path / "mmseg.pth")
    safetensors.torch.save_file(state, tmp_path / "encoder.safetensors")
    for path in tmp_path.iterdir():
        advice = (
            f"not converted; python .*convert_pretrain_to_d2.py {path} {path.stem}.pkl, then MODEL.WEIGHTS {path.stem}"
        )
        with pytest.raises(UsageError, match=advice):
            d2_weights.check_weights(WeightsFile("MODEL.WEIGHTS", path, full_model=False), model)
        with pytest.raises(UsageError, match="is missing; give a detector of this config"):
            d2_weights.check_weights(WeightsFile("MODEL.WEIGHTS", path, full_model=True), model)


def test_incomplete_weights_are_not_advised_to_be_converted(
    resnet18: torchvision_models.ResNet, tmp_path: Path
) -> None:
    path = tmp_path / "encoder.pth"
    torch.save({name: value for name, value in resnet18.state_dict().items() if name != "layer2.0.bn1.bias"}, path)
    with pytest.raises(UsageError, match=r"MODEL.WEIGHTS.* not a complete resnet18.*layer2.0.bn1.bias is missing"):
        d2_weights.check_weights(
            WeightsFile("MODEL.WEIGHTS", path, full_model=False), model_of(convert(resnet18, "resnet18"))
        )


def test_weights_of_another_network_are_refused_also_before_their_conversion(
    resnet18: torchvision_models.ResNet, tmp_path: Path
) -> None:
    model, path = model_of(convert(resnet18, "resnet18")), tmp_path / "encoder.pth"
    patches = torch.zeros(8, 3, 16, 16)
    vits = (
        {"patch_embed.proj.weight": patches, "blocks.0.norm1.bias": patches[0], "blocks.1.norm1.bias": patches[0]},
        {"backbone.patch_embed.projection.weight": patches}
        | {f"backbone.layers.{i}.ln1.bias": patches for i in (0, 1)},
    )
    networks = [(torchvision_models.resnet50().state_dict(), "ResNet-50")]
    networks += [(vit, r"ViT \(2 blocks, 8 channels, patch size 16\)") for vit in vits]
    for state, network in networks:
        torch.save(state, path)
        with pytest.raises(UsageError, match=f"holds a {network}, and the config is for a ResNet-18"):
            d2_weights.check_weights(WeightsFile("MODEL.WEIGHTS", path, full_model=False), model)


# Weights of ViTs without detectron2: a ViT-Ti in place of the config's ViT-S


def convert_vit(encoder: ViTEncoder) -> dict[str, Any]:
    """Return what convert_pretrain_to_d2.py writes for a ViT."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "encoder.pth", Path(folder) / "encoder.pkl"
        torch.save(encoder.state_dict(), source)
        convert_main([str(source), str(output)], "detectron2")
        return pickle.loads(output.read_bytes())


@pytest.fixture(scope="module")
def vit() -> ViTEncoder:
    """A random ViT-Ti, whose norms and biases are not the initial ones, and whose tokens are small.

    The epsilon of the first norm then counts, in which PyTorch's default differs from a ViT's.
    """
    torch.manual_seed(0)
    encoder = build_vit("vit_tiny_patch16_224").eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for embedding in (encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias, encoder.pos_embed):
            embedding.mul_(0.02)
    return encoder


@pytest.fixture(scope="module")
def vit_file(vit: ViTEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vit") / "vit.pkl"
    path.write_bytes(pickle.dumps(convert_vit(vit)))
    return path


def vit_detector(vit: ViTEncoder) -> dict[str, Tensor]:
    """Return the state of a detector whose backbone has the converted tensors."""
    backbone = {name: torch.from_numpy(value.copy()) for name, value in convert_vit(vit)["model"].items()}
    return backbone | {"backbone.fpn.fpn_output2.weight": torch.zeros(4), "proposal_generator.bias": torch.zeros(2)}


def test_all_tensors_of_a_vit_come_from_the_file(vit: ViTEncoder, vit_file: Path) -> None:
    file, model = WeightsFile("MODEL.WEIGHTS", vit_file, full_model=False), vit_detector(vit)
    assert set(d2_weights.check_weights(file, model)) == {name for name in model if name.startswith(VIT_PREFIX)}
    assert d2_weights.check_loaded(file, model) == f"147 of 147 backbone tensors from {vit_file}"
    for name in ("pos_embed", "blocks.11.mlp.fc2.bias"):
        with pytest.raises(UsageError, match=f"detectron2 did not load {VIT_PREFIX}{name}"):
            d2_weights.check_loaded(file, model | {VIT_PREFIX + name: model[VIT_PREFIX + name] + 1})


TINY = "a ViT (12 blocks, 192 channels, patch size 16)"
UNSUITABLE_VITS: dict[str, tuple[Callable[[ViTEncoder], Any], str]] = {
    "missing": (
        lambda vit: replace(convert_vit(vit), VIT_PREFIX + "blocks.3.attn.qkv.bias", None),
        "backbone.net.blocks.3.attn.qkv.bias is missing; the file is incomplete; make it again with python transfer/",
    ),
    "nan": (
        lambda vit: replace(convert_vit(vit), VIT_PREFIX + "blocks.0.norm1.bias", np.full(192, np.nan, np.float32)),
        "backbone.net.blocks.0.norm1.bias is not finite",
    ),
    "other_image_size": (
        lambda vit: replace(convert_vit(vit), VIT_PREFIX + "pos_embed", np.zeros((1, 577, 192), np.float32)),
        "backbone.net.pos_embed is for another image size; use an encoder for 224 px",
    ),
    "class_token": (
        lambda vit: replace(convert_vit(vit), VIT_PREFIX + "cls_token", np.zeros((1, 1, 192), np.float32)),
        "backbone.net.cls_token does not exist in the config's model",
    ),
    "other_width": (
        lambda _: convert_vit(build_vit("vit_small_patch16_224")),
        f"holds a ViT (12 blocks, 384 channels, patch size 16), and the config is for {TINY}; use weights and config",
    ),
    "other_patch_size": (
        lambda _: convert_vit(build_vit("vit_tiny_patch32_224")),
        f"holds a ViT (12 blocks, 192 channels, patch size 32), and the config is for {TINY}; use weights and config",
    ),
    "resnet": (
        lambda _: convert(torchvision_models.resnet18(), "resnet18"),
        f"holds a ResNet-18, and the config is for {TINY}",
    ),
    "scalar": (
        lambda vit: replace(convert_vit(vit), VIT_PREFIX + "patch_embed.proj.weight", np.zeros((), np.float32)),
        "no ResNet or ViT in it",
    ),
}


@pytest.mark.parametrize("name", UNSUITABLE_VITS)
def test_unsuitable_weights_of_a_vit_are_refused(name: str, vit: ViTEncoder, tmp_path: Path) -> None:
    make, message = UNSUITABLE_VITS[name]
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps(make(vit)))
    with pytest.raises(UsageError) as error:
        d2_weights.check_weights(WeightsFile("MODEL.WEIGHTS", path, full_model=False), vit_detector(vit))
    assert str(error.value).startswith(f"MODEL.WEIGHTS {path}: ")
    assert message in str(error.value)


def test_vit_file_is_refused_for_a_resnet(vit_file: Path, resnet18: torchvision_models.ResNet, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"holds a ViT \(12 blocks, .*, and the config is for a ResNet-18; use weights"
    ):
        d2_weights.check_weights(
            WeightsFile("MODEL.WEIGHTS", vit_file, full_model=False), model_of(convert(resnet18, "resnet18"))
        )


def test_unconverted_vits_are_refused_with_the_command_that_converts_them(vit: ViTEncoder, tmp_path: Path) -> None:
    state = vit.state_dict()
    pretraining = {f"{name}.{key}": value for name in ("encoder_q", "encoder_k") for key, value in state.items()}
    torch.save({"model": pretraining, "epoch": 3}, tmp_path / "current.pth")
    safetensors.torch.save_file(state, tmp_path / "encoder.safetensors")
    for path in tmp_path.iterdir():
        advice = f"not converted; python .*convert_pretrain_to_d2.py {path} {path.stem}.pkl, then MODEL.WEIGHTS"
        with pytest.raises(UsageError, match=advice):
            d2_weights.check_weights(WeightsFile("MODEL.WEIGHTS", path, full_model=False), vit_detector(vit))


def test_training_may_start_from_the_backbone_of_a_detector(
    resnet18: torchvision_models.ResNet, tmp_path: Path
) -> None:
    model, path = model_of(convert(resnet18, "resnet18")), tmp_path / "model_final.pth"
    other_classes = {"roi_heads.box_predictor.cls_score.weight": torch.zeros(3, 4)}
    torch.save({"model": model | other_classes}, path)
    expected = d2_weights.check_weights(WeightsFile("MODEL.WEIGHTS", path, full_model=False), model)
    assert set(expected) == {name for name in model if name.startswith(RESNET_PREFIX)}


def test_resumed_run_loads_the_last_checkpoint(tmp_path: Path) -> None:
    cfg = SimpleNamespace(OUTPUT_DIR=str(tmp_path), MODEL=SimpleNamespace(WEIGHTS=""))
    for eval_only, message in ((False, "convert_pretrain_to_d2.py"), (True, "model_final.pth")):
        with pytest.raises(UsageError, match=f"MODEL.WEIGHTS is empty; .*{message}"):
            d2_weights.find_weights(cfg, resume=True, eval_only=eval_only)
    (tmp_path / "last_checkpoint").write_text("model_0004999.pth")
    file = d2_weights.find_weights(cfg, resume=True, eval_only=False)
    assert file == WeightsFile("--resume", tmp_path / "model_0004999.pth", full_model=True)
    with pytest.raises(UsageError, match=r"--resume .*model_0004999.pth: no such file"):
        d2_weights.read_weights(file)


# With detectron2


def command(*flags: str, config: str = SLOTCON, **overrides: Any) -> list[str]:
    """Return the arguments of a small run; `SOLVER__MAX_ITER=4` overrides SOLVER.MAX_ITER."""
    pairs = SMALL_RUN | {key.replace("__", "."): str(value) for key, value in overrides.items()}
    return ["--config-file", config, "--num-gpus", "0", *flags, *(word for pair in pairs.items() for word in pair)]


@pytest.fixture(scope="module")
def resnet50() -> torchvision_models.ResNet:
    """A random ResNet-50 whose batch-norm statistics are not the initial ones."""
    torch.manual_seed(0)
    network = torchvision_models.resnet50().eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(7)
    return network


@pytest.fixture(scope="module")
def encoder(resnet50: torchvision_models.ResNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "encoder.pkl"
    path.write_bytes(pickle.dumps(convert(resnet50)))
    return path


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("detectron2")
    root = tmp_path_factory.mktemp("datasets")
    os.environ["DETECTRON2_DATASETS"] = str(root)  # not undone: detectron2 reads it once, on import
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import builtin
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    DatasetCatalog.clear()  # another test module may have imported it before
    MetadataCatalog.clear()
    importlib.reload(builtin)
    make_coco(root / "coco", COCO_CATEGORIES)
    make_cityscapes(root / "cityscapes")
    return root


@pytest.fixture(scope="module")
def imported_trainer(datasets: Path) -> ModuleType:
    return train_net.import_trainer()


@pytest.fixture
def trainer(imported_trainer: ModuleType) -> Iterator[ModuleType]:
    """The module; detectron2's log handlers, which keep the streams of the first test, are removed afterwards."""
    yield imported_trainer
    remove_log_handlers(imported_trainer)


def remove_log_handlers(trainer: ModuleType) -> None:
    for name in ("detectron2", "fvcore", "transfer"):
        logging.getLogger(name).handlers.clear()
    trainer.setup_logger.cache_clear()


@pytest.fixture(scope="module")
def trained(datasets: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two iterations, started as a command in another folder."""
    folder = tmp_path_factory.mktemp("trained")
    argv = [sys.executable, str(TRAIN_NET), *command(MODEL__WEIGHTS=encoder, OUTPUT_DIR="run")]
    # One thread, as in the tests' own process, so that both add in the same order.
    environment = os.environ | {"DETECTRON2_DATASETS": str(datasets), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder / "run"


def load_config(*flags: str) -> tuple[Any, list[str]]:
    return d2_config.load_config(train_net.parse_args(["--config-file", SLOTCON, *flags]))


@pytest.mark.parametrize("name", SCHEDULES)
def test_detectron2_builds_the_recipe(name: str, trainer: ModuleType) -> None:
    cfg, _ = load_config("--num-gpus", "0", "--config-file", str(CONFIGS / f"{name}.yaml"))
    for key, expected in (DEFAULTS | recipe_of(name)).items():
        assert functools.reduce(getattr, key.split("."), cfg) == expected, key
    tensors = {
        prefix: sum(key.startswith(prefix) for key in d2_config.model_state(cfg))
        for prefix in (RESNET_PREFIX, VIT_PREFIX)
    }
    assert tensors == ({RESNET_PREFIX: 0, VIT_PREFIX: 147} if "ViT" in name else {RESNET_PREFIX: 318, VIT_PREFIX: 0})


def test_training_ends_with_results(trained: Path) -> None:
    log = (trained / "log.txt").read_text()
    assert "318 of 318 backbone tensors from" in log
    assert "no GPU in use" in log
    assert math.isfinite(json.loads((trained / "metrics.json").read_text().splitlines()[0])["total_loss"])
    results = json.loads((trained / "results.json").read_text())
    assert set(results) == {"bbox", "segm"}
    assert all(math.isfinite(results[task]["AP"]) for task in results)
    assert results["bbox"]["AP-toaster"] is None  # no toaster in these images


def test_resumed_run_continues_at_the_next_iteration(trained: Path, trainer: ModuleType, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    train_net.main(command("--resume", OUTPUT_DIR=folder, SOLVER__MAX_ITER=4))
    log = (folder / "log.txt").read_text()
    assert "430 of 430 tensors from" in log
    assert "Starting training from iteration 2" in log
    name = "backbone.bottom_up.stem.conv1.weight"
    before, after = (torch.load(path / "model_final.pth", weights_only=True) for path in (trained, folder))
    assert (before["iteration"], after["iteration"]) == (1, 3)
    assert not torch.equal(after["model"][name], before["model"][name])


def test_evaluation_reproduces_results_of_training(trained: Path, trainer: ModuleType, tmp_path: Path) -> None:
    weights = trained / "model_final.pth"
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    files = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    train_net.main(command("--eval-only", MODEL__WEIGHTS=weights, OUTPUT_DIR=folder))
    assert json.loads((folder / "eval/results.json").read_text()) == json.loads((trained / "results.json").read_text())
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == files


def test_last_checkpoint_of_a_run_is_evaluated(trained: Path, trainer: ModuleType, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    train_net.main(command("--eval-only", "--resume", OUTPUT_DIR=folder))
    assert json.loads((folder / "eval/results.json").read_text()) == json.loads((trained / "results.json").read_text())


def test_detector_that_finds_nothing_has_an_ap_of_zero(trained: Path, trainer: ModuleType, tmp_path: Path) -> None:
    options = {"MODEL__WEIGHTS": trained / "model_final.pth", "MODEL__ROI_HEADS__SCORE_THRESH_TEST": 1.0}
    train_net.main(command("--eval-only", OUTPUT_DIR=tmp_path / "run", **options))
    results = json.loads((tmp_path / "run/eval/results.json").read_text())
    assert {task: metrics["AP"] for task, metrics in results.items()} == {"bbox": 0.0, "segm": 0.0}


def test_cityscapes_trains_and_evaluates(
    trainer: ModuleType, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cityscapesscripts")
    monkeypatch.chdir(tmp_path)
    config = str(CONFIGS / "Cityscapes_R_50_FPN_SlotCon.yaml")
    train_net.main(command(config=config, MODEL__WEIGHTS=encoder, OUTPUT_DIR=tmp_path / "run"))
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert set(results) == {"segm"}
    assert all(map(math.isfinite, results["segm"].values()))
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def build_and_load(weights: Path, config: str = SLOTCON, *options: str) -> tuple[WeightsFile, torch.nn.Module]:
    """Return the weights file and the model into which detectron2 has loaded it."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model

    cfg, _ = load_config("--num-gpus", "0", "--config-file", config, "MODEL.WEIGHTS", str(weights), *options)
    model = build_model(cfg)
    DetectionCheckpointer(model).load(str(weights))
    return d2_weights.find_weights(cfg, resume=False, eval_only=False), model.eval()


def test_detectron2_computes_the_features_of_torchvision(
    trainer: ModuleType, encoder: Path, resnet50: torchvision_models.ResNet
) -> None:
    file, model = build_and_load(encoder)
    image = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        features = model.backbone.bottom_up(image)
        expected = resnet50.maxpool(resnet50.relu(resnet50.bn1(resnet50.conv1(image))))
        for number in range(1, 5):
            expected = getattr(resnet50, f"layer{number}")(expected)
            # The same float32 operations in the same order, but for fused kernels: 53 layers of a few roundings each.
            assert (features[f"res{number + 1}"] - expected).norm() < 1e-5 * expected.norm()
    assert d2_weights.check_loaded(file, model.state_dict()) == f"318 of 318 backbone tensors from {encoder}"


def test_caffe2_weights_need_no_batch_statistics(
    trainer: ModuleType, resnet50: torchvision_models.ResNet, tmp_path: Path
) -> None:
    arrays = {"fc1000_w": np.zeros((1000, 2048), np.float32), "fc1000_b": np.zeros(1000, np.float32)}
    for name, value in convert(resnet50)["model"].items():
        short = name.replace("stem.conv1.norm", "res_conv1_bn").replace("stem.", "").replace("shortcut", "branch1")
        for number, letter in enumerate("abc", 1):
            short = short.replace(f".conv{number}", f".branch2{letter}") if name.startswith("res") else short
        short = short.replace(".norm", "_bn").replace(".weight", ".s" if "_bn" in short or "norm" in name else ".w")
        short = short.replace(".bias", ".b")
        if not short.endswith(("running_mean", "running_var", "num_batches_tracked")):
            arrays[short.replace(".", "_")] = value
    arrays["conv1_w_momentum"] = arrays["conv1_w"]
    assert "res2_0_branch2a_w" in arrays
    assert "res_conv1_bn_s" in arrays
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps(arrays, protocol=2))
    file, model = build_and_load(path, str(CONFIGS / "COCO_R_50_FPN_1x.yaml"))
    assert d2_weights.check_loaded(file, model.state_dict()) == f"159 of 318 backbone tensors from {path}"

    del arrays["res4_5_branch2b_bn_b"]
    path.write_bytes(pickle.dumps(arrays, protocol=2))
    with pytest.raises(UsageError, match=r"res4.5.conv2.norm.bias is missing"):
        d2_weights.check_weights(file, model.state_dict())


def test_auto_scale_keeps_the_batch_per_gpu(trainer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    flags = ["--num-gpus", "4", "--auto-scale", "--dist-url", "tcp://first:1"]
    cfg, notes = load_config(*flags)
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (8, 0.01, 180000)
    assert (cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS) == ((120000, 160000), 2000)
    assert "batch 8, lr 0.01, 180000 iterations" in notes[0]
    two_machines, _ = load_config(*flags, "--num-machines", "2")
    assert two_machines.SOLVER.IMS_PER_BATCH == 16
    assert pickle.loads(pickle.dumps(two_machines)) == two_machines  # detectron2 sends it to its processes
    with pytest.raises(UsageError, match="not a multiple of 3 GPUs"):
        load_config("--num-gpus", "3")


PYTHON_FILE = __file__
"""A file that exists and holds neither a config nor weights."""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config-file", PYTHON_FILE], "--config-file"),
        (["SOLVER.LR", "1"], "SOLVER.LR"),
        (["SOLVER.BASE_LR", "fast"], "SOLVER.BASE_LR"),
        (["--auto-scale", "SOLVER.IMS_PER_BATCH", "2"], "--auto-scale"),
        (["MODEL.RESNETS.DEPTH", "18", "MODEL.WEIGHTS", PYTHON_FILE], "RES2_OUT_CHANNELS"),
        (["DATASETS.TEST", "('coco_2018_val',)"], "coco_2018_val"),
        (["DATASETS.TEST", "('coco_2014_minival',)"], "instances_minival2014.json does not exist"),
        (["MODEL.WEIGHTS", "missing.pkl"], "missing.pkl: no such file"),
        (["--config-file", GTSA, "MODEL.VIT.PATCH_SIZE", "4"], "MODEL.VIT.PATCH_SIZE 4: must be 8, 16 or 32"),
        (["--config-file", GTSA, "MODEL.VIT.EMBED_DIM", "100"], "MODEL.VIT.EMBED_DIM 100: must be a multiple of 64"),
        (["--config-file", GTSA, "MODEL.VIT.DROP_PATH_RATE", "1.0"], "MODEL.VIT.DROP_PATH_RATE 1.0: must be at least"),
        (["--config-file", GTSA, "MODEL.VIT.DEPTH", "10"], "MODEL.VIT.OUT_BLOCKS (4, 6, 8, 12): must be four growing"),
        (["--config-file", GTSA, "MODEL.VIT.DEPTH", "13"], "numbers from 1 on, the last of them MODEL.VIT.DEPTH 13"),
        (["--config-file", GTSA, "SOLVER.BIAS_LR_FACTOR", "2.0"], "SOLVER.BIAS_LR_FACTOR 2.0: is for SGD; set it to"),
        (["--config-file", GTSA, "SOLVER.OPTIMIZER", "SGD"], "SOLVER.LAYER_DECAY 0.75: is for ADAMW on a ViT"),
        (["--config-file", CUSTOM], "custom_train needs --train-json, --train-images, --val-json, --val-images"),
    ],
)
def test_usage_error_is_one_line_and_writes_nothing(
    options: list[str],
    message: str,
    trainer: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: CAPSYS,
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["--config-file", SLOTCON, "--num-gpus", "0", *options]
    assert message in run_expecting_usage_error(train_net.main, argv, capsys)
    assert not (tmp_path / "output").exists()


# With detectron2, ViTs

TINY_VIT = ("MODEL.VIT.EMBED_DIM", "192")


def block_outputs(encoder: ViTEncoder, images: Tensor) -> list[Tensor]:
    """Return the outputs of all blocks as maps, computed without the class token."""
    patches = encoder.patch_embed(images)
    tokens = encoder._pos_embed(patches)[:, 1:]
    outputs = []
    for block in encoder.blocks:
        tokens = block(tokens)
        outputs.append(tokens.transpose(1, 2).unflatten(2, patches.shape[1:3]))
    return outputs


@pytest.mark.parametrize("size", [(224, 224), (96, 160)])
def test_detectron2_computes_the_features_of_a_vit_without_its_class_token(
    size: tuple[int, int], trainer: ModuleType, vit: ViTEncoder, vit_file: Path
) -> None:
    file, model = build_and_load(vit_file, GTSA, *TINY_VIT)
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, expected = model.backbone.net(image), block_outputs(vit, image)
    assert list(features) == ["block4", "block6", "block8", "block12"]
    for name, feature in features.items():
        reference = expected[int(name.removeprefix("block")) - 1]
        assert (feature - reference).abs().max() < 1e-5 * reference.abs().max()
    assert d2_weights.check_loaded(file, model.state_dict()) == f"147 of 147 backbone tensors from {vit_file}"


@pytest.mark.parametrize("patch_size", [8, 16, 32])
def test_pyramid_of_a_vit_has_the_strides_of_a_resnet(patch_size: int, trainer: ModuleType) -> None:
    from detectron2.modeling import build_backbone

    options = {"EMBED_DIM": 64, "DEPTH": 5, "OUT_BLOCKS": (1, 2, 4, 5), "PATCH_SIZE": patch_size}
    words = [word for key, value in options.items() for word in (f"MODEL.VIT.{key}", str(value))]
    cfg, _ = load_config("--num-gpus", "0", "--config-file", GTSA, *words)
    backbone = build_backbone(cfg)
    assert backbone.size_divisibility == 32
    assert {name: shape.stride for name, shape in backbone.output_shape().items()} == STRIDES
    levels = backbone(torch.randn(2, 3, 64, 96))
    assert {name: tuple(level.shape) for name, level in levels.items()} == {
        name: (2, 256, 64 // stride, math.ceil(96 / stride)) for name, stride in STRIDES.items()
    }


STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}


@pytest.mark.parametrize("patch_size", [8, 16, 32])
def test_earlier_blocks_of_a_vit_have_smaller_strides(patch_size: int, trainer: ModuleType) -> None:
    """The blocks have constant outputs, which layers with identity matrices do not change."""
    from detectron2.layers import ShapeSpec

    shape = ShapeSpec(channels=2, stride=patch_size)
    pyramid = trainer.d2_vit.RescaledBlocks({f"block{number}": shape for number in (4, 6, 8, 12)}, norm="")
    for layer in pyramid.modules():
        if isinstance(layer, torch.nn.ConvTranspose2d):
            torch.nn.init.zeros_(layer.bias)
            layer.weight.data[:] = torch.eye(2)[:, :, None, None]
    blocks = {name: torch.full((1, 2, 64 // patch_size, 96 // patch_size), value) for name, value in BLOCKS.items()}
    for (name, level), value in zip(pyramid(blocks).items(), BLOCKS.values(), strict=True):
        stride = int(name.removeprefix("stride"))
        torch.testing.assert_close(level, torch.full((1, 2, 64 // stride, 96 // stride), value))
    assert list(pyramid(blocks)) == ["stride4", "stride8", "stride16", "stride32"]


BLOCKS = {"block4": 10.0, "block6": 20.0, "block8": 30.0, "block12": 40.0}
"""The output of each block; GELU does not change such large values."""


def test_adamw_decays_learning_rates_by_layer_and_no_norms_or_biases(trainer: ModuleType) -> None:
    from detectron2.modeling import build_model

    cfg, _ = load_config("--num-gpus", "0", "--config-file", GTSA, *TINY_VIT)
    model = build_model(cfg)
    optimizer = trainer.Trainer.build_optimizer(cfg, model)
    assert type(optimizer) is torch.optim.AdamW
    settings = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    parameters = dict(model.named_parameters())
    assert settings.keys() == set(parameters.values())
    for name, parameter in parameters.items():
        layer = 13  # everything above the ViT
        if name.startswith(VIT_PREFIX):
            layer = int(name.split(".")[3]) + 1 if ".blocks." in name else 0
        group = settings[parameter]
        assert group["lr"] == pytest.approx(1e-4 * 0.75 ** (13 - layer)), name
        assert group["weight_decay"] == (0 if parameter.ndim == 1 or name.endswith("pos_embed") else 0.05), name
    resnet, _ = load_config("--num-gpus", "0", "MODEL.RESNETS.NORM", "BN")
    assert type(trainer.Trainer.build_optimizer(resnet, torch.nn.Linear(2, 2))) is torch.optim.SGD


def test_trainer_registers_the_vit_in_every_process(trainer: ModuleType) -> None:
    """With several GPUs, the processes import the trainer's module and what it imports, and nothing else."""
    from detectron2.modeling import BACKBONE_REGISTRY

    assert BACKBONE_REGISTRY.get("build_vit_fpn_backbone") is trainer.d2_vit.build_vit_fpn_backbone


# With detectron2, on custom datasets

SMALL_MODEL = {
    "MODEL.RESNETS.DEPTH": "18",
    "MODEL.RESNETS.RES2_OUT_CHANNELS": "64",
    "MODEL.FPN.OUT_CHANNELS": "16",
    "MODEL.ROI_BOX_HEAD.CONV_DIM": "16",
    "MODEL.ROI_BOX_HEAD.FC_DIM": "16",
    "MODEL.ROI_MASK_HEAD.CONV_DIM": "16",
}


@pytest.fixture(scope="module")
def custom_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A custom dataset with polygons, one run-length code, and a box without area."""
    folder = tmp_path_factory.mktemp("custom")
    make_custom_data(folder)
    content = json.loads((folder / "train.json").read_text())
    content["annotations"][0]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": [10, 200, HEIGHT * WIDTH - 210]}
    content["annotations"][1]["bbox"] = [10, 10, 0, 10]
    (folder / "train.json").write_text(json.dumps(content))
    return folder


def custom_command(folder: Path, *flags: str, config: str = CUSTOM, **overrides: Any) -> list[str]:
    """Return the arguments of a small run on the data of `make_custom_data`."""
    paths = [f"--train-json={folder}/train.json", f"--train-images={folder}/train"]
    paths += [f"--val-json={folder}/val.json", f"--val-images={folder}/val"]
    return command(*paths, *flags, config=config, **SMALL_MODEL, **overrides)


def train_on_custom_data(
    trainer: ModuleType, network: torchvision_models.ResNet, data: Path, folder: Path, *flags: str
) -> Path:
    """Run two iterations and the evaluation, and return OUTPUT_DIR."""
    weights = folder / "encoder.pkl"
    weights.write_bytes(pickle.dumps(convert(network, "resnet18")))
    train_net.main(custom_command(data, *flags, MODEL__WEIGHTS=weights, OUTPUT_DIR=folder / "run"))
    return folder / "run"


@pytest.fixture(scope="module")
def trained_on_custom_data(
    imported_trainer: ModuleType,
    resnet18: torchvision_models.ResNet,
    custom_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = train_on_custom_data(imported_trainer, resnet18, custom_data, tmp_path_factory.mktemp("custom_run"))
    remove_log_handlers(imported_trainer)
    return folder


def read_results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_training_on_a_custom_dataset_ends_with_box_and_mask_ap(trained_on_custom_data: Path) -> None:
    results = read_results(trained_on_custom_data)
    assert set(results) == {"bbox", "segm"}
    for metrics in results.values():
        assert all(math.isfinite(metrics[name]) for name in ("AP", "AP-first", "AP-second"))
    log = (trained_on_custom_data / "log.txt").read_text()
    assert "--train-json: 6 images, 21 objects, number of classes 2; annotations ignored because" in log
    assert "their box or mask has no area: 1" in log
    assert (
        "schedule for 6 images with objects: batch 2, number of iterations 2, learning rate 0.001 divided by 10" in log
    )
    assert "120 of 120 backbone tensors" in log
    assert math.isfinite(json.loads((trained_on_custom_data / "metrics.json").read_text().splitlines()[0])["loss_mask"])


def test_vit_trains_on_a_custom_dataset_and_evaluates(
    vit_file: Path, trainer: ModuleType, custom_data: Path, tmp_path: Path
) -> None:
    options = {"MODEL__VIT__EMBED_DIM": 192, "SOLVER__BASE_LR": 0.1, "MODEL__WEIGHTS": vit_file}
    train_net.main(custom_command(custom_data, config=CUSTOM_VIT, OUTPUT_DIR=tmp_path / "run", **options))
    assert set(read_results(tmp_path / "run")) == {"bbox", "segm"}
    assert "147 of 147 backbone tensors from" in (tmp_path / "run/log.txt").read_text()
    metrics = json.loads((tmp_path / "run/metrics.json").read_text().splitlines()[0])
    assert math.isfinite(metrics["total_loss"])
    before = pickle.loads(vit_file.read_bytes())["model"]
    after = torch.load(tmp_path / "run/model_final.pth", weights_only=True)["model"]
    assert all(not torch.equal(after[name], torch.from_numpy(before[name])) for name in before)


def test_first_images_are_evaluated_as_if_they_were_all(
    trained_on_custom_data: Path, trainer: ModuleType, custom_data: Path, tmp_path: Path
) -> None:
    options = {"MODEL__WEIGHTS": trained_on_custom_data / "model_final.pth"}
    capped, data, results = tmp_path / "capped", tmp_path / "data", []
    train_net.main(custom_command(custom_data, "--eval-only", "--max-val-images=2", OUTPUT_DIR=capped, **options))
    shutil.copytree(custom_data, data)
    content = json.loads((data / "val.json").read_text())
    content["images"] = content["images"][:2]
    content["annotations"] = [item for item in content["annotations"] if item["image_id"] < 2]
    (data / "val.json").write_text(json.dumps(content))
    train_net.main(custom_command(data, "--eval-only", OUTPUT_DIR=tmp_path / "two", **options))
    results = [read_results(folder / "eval") for folder in (capped, tmp_path / "two")]
    assert results[0] == results[1]
    assert results[0] != read_results(trained_on_custom_data)


def test_run_on_a_custom_dataset_resumes(
    trained_on_custom_data: Path, trainer: ModuleType, custom_data: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(trained_on_custom_data, tmp_path / "run"))
    train_net.main(custom_command(custom_data, "--resume", OUTPUT_DIR=folder, SOLVER__MAX_ITER=3))
    assert "Starting training from iteration 2" in (folder / "log.txt").read_text()
    assert set(read_results(folder)) == {"bbox", "segm"}


def test_annotations_without_masks_train_boxes_only(
    trainer: ModuleType, resnet18: torchvision_models.ResNet, custom_data: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(custom_data, tmp_path / "data"))
    content = json.loads((data / "train.json").read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    (data / "train.json").write_text(json.dumps(content))
    folder = train_on_custom_data(trainer, resnet18, data, tmp_path)
    assert set(read_results(folder)) == {"bbox"}
    log = (folder / "log.txt").read_text()
    assert "boxes only: the model has no mask head, because --train-json has no masks" in log
    options = {"MODEL__WEIGHTS": folder / "model_final.pth", "OUTPUT_DIR": tmp_path / "evaluation"}
    train_net.main(custom_command(data, "--eval-only", **options))
    assert read_results(tmp_path / "evaluation/eval") == read_results(folder)


def test_settings_follow_from_a_custom_dataset_unless_overridden(trainer: ModuleType, custom_data: Path) -> None:
    paths = custom_command(custom_data)[:8]
    args = train_net.parse_args([*paths, "SOLVER.MAX_ITER", "90", "SOLVER.WARMUP_ITERS", "5"])
    cfg, notes = d2_config.load_config(args, read_custom_dataset(args))
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("custom_train",), ("custom_val",))
    assert (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.MASK_ON, cfg.INPUT.MASK_FORMAT) == (2, True, "bitmask")
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER) == (6, 0.0075, 90)
    assert (solver.STEPS, solver.WARMUP_ITERS, solver.CHECKPOINT_PERIOD) == ((60, 80), 5, 18)
    assert (cfg.TEST.EVAL_PERIOD, cfg.TEST.PRECISE_BN.NUM_ITER) == (18, 1)
    assert "iterations 90, learning rate 0.0075 divided by 10 after 60 and 80, warm-up 5; evaluation" in notes[-1]
    vit_args = train_net.parse_args([*custom_command(custom_data, config=CUSTOM_VIT)[:8]])
    assert d2_config.load_config(vit_args, read_custom_dataset(vit_args))[0].SOLVER.BASE_LR == 0.0001 * 6 / 16
    args.opts = ["SOLVER.MAX_ITER", "1"]
    _, notes = d2_config.load_config(args, read_custom_dataset(args))
    assert "iterations 1, learning rate 0.0075, warm-up 0; evaluation every 1" in notes[-1]
    args.opts = ["SOLVER.IMS_PER_BATCH", "0"]
    with pytest.raises(UsageError, match=r"SOLVER.IMS_PER_BATCH 0: must be at least 1"):
        d2_config.load_config(args, read_custom_dataset(args))


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("iscrowd", [0, 1])
def test_missing_masks_are_refused_and_nothing_is_written(
    split: str, iscrowd: int, trainer: ModuleType, custom_data: Path, tmp_path: Path, capsys: CAPSYS
) -> None:
    data = Path(shutil.copytree(custom_data, tmp_path / "data"))
    content = json.loads((data / f"{split}.json").read_text())
    del content["annotations"][2]["segmentation"]
    content["annotations"][2]["iscrowd"] = iscrowd
    (data / f"{split}.json").write_text(json.dumps(content))
    message = run_expecting_usage_error(train_net.main, custom_command(data, OUTPUT_DIR=tmp_path / "run"), capsys)
    total = {"train": 21, "val": 10}[split]
    assert f"--{split}-json: 1 of {total} annotations (crowds included) have no mask, the first is" in message
    assert "annotations[2]; add the masks, or" in message
    assert not (tmp_path / "run").exists()


def test_evaluation_reads_and_writes_validation_data_only(
    trained_on_custom_data: Path, trainer: ModuleType, custom_data: Path, tmp_path: Path
) -> None:
    weights, data = trained_on_custom_data / "model_final.pth", tmp_path / "data"
    shutil.copytree(custom_data, data, ignore=shutil.ignore_patterns("train"))
    categories = json.loads((data / "train.json").read_text())["categories"]
    (data / "train.json").write_text(json.dumps({"categories": categories}))
    arguments = custom_command(data, "--eval-only", MODEL__WEIGHTS=weights, OUTPUT_DIR=tmp_path / "run")
    train_net.main([word for word in arguments if not word.startswith("--train-images")])
    assert read_results(tmp_path / "run/eval") == read_results(trained_on_custom_data)
    assert [path.name for path in (tmp_path / "run/eval/annotations").iterdir()] == ["val.json"]


def test_each_machine_writes_and_reads_its_own_annotations(
    trainer: ModuleType, custom_data: Path, tmp_path: Path
) -> None:
    for rank in (0, 1):
        args = train_net.parse_args([*custom_command(custom_data)[:8], "--machine-rank", str(rank)])
        dataset = read_custom_dataset(args)
        assert dataset is not None
        d2_registration.write_annotations(dataset, tmp_path, rank)
        d2_registration.register(args, tmp_path)
        names = [Path(trainer.MetadataCatalog.get(name).json_file).name for name in ("custom_train", "custom_val")]
        assert names == [["train.json", "val.json"], ["train_machine1.json", "val_machine1.json"]][rank]
    assert len(list((tmp_path / "annotations").iterdir())) == 4


def test_annotations_are_released_before_training(
    trainer: ModuleType,
    resnet18: torchvision_models.ResNet,
    custom_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights, referenced = tmp_path / "encoder.pkl", []

    def find_annotations(*_: Any) -> None:
        gc.collect()
        referenced.append(any(type(thing) is CocoData for thing in gc.get_objects()))

    monkeypatch.setattr(trainer, "launch", find_annotations)
    weights.write_bytes(pickle.dumps(convert(resnet18, "resnet18")))
    train_net.main(custom_command(custom_data, MODEL__WEIGHTS=weights, OUTPUT_DIR=tmp_path / "run"))
    assert referenced == [False]


@pytest.mark.parametrize(("max_val_images", "count"), [(None, 3), (2, 2)])
def test_validation_data_is_loaded_once(
    max_val_images: int | None,
    count: int,
    trainer: ModuleType,
    custom_data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from detectron2.data import DatasetCatalog

    loads = []

    def load() -> list[dict[str, Any]]:
        loads.append(1)
        return [
            {"file_name": str(path), "image_id": number, "height": HEIGHT, "width": WIDTH}
            for number, path in enumerate(sorted((custom_data / "val").iterdir()))
        ]

    monkeypatch.setitem(DatasetCatalog.data, "counted", load)
    monkeypatch.setattr(trainer.Trainer, "max_val_images", max_val_images)
    cfg, _ = load_config("--num-gpus", "0", "DATALOADER.NUM_WORKERS", "0", "INPUT.MIN_SIZE_TEST", "48")
    batches = list(trainer.Trainer.build_test_loader(cfg, "counted"))
    assert [(len(batch), min(batch[0]["image"].shape[1:])) for batch in batches] == [(1, 48)] * count
    assert loads == [1]
