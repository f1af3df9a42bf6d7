"""Fine-tuning with detectron2: recipe, weights that all arrive, results, resuming, and mistakes told in one line."""

import ast
import json
import logging
import math
import os
import pickle
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageDraw

from tests.helpers import run_expecting_usage_error
from transfer.detection import train_net
from utils.safe_pickle import load_arrays

TRAIN_NET = Path(train_net.__file__)
CONFIGS = TRAIN_NET.parent / "configs"
SLOTCON = str(CONFIGS / "COCO_R_50_FPN_1x_SlotCon.yaml")
TINY = {
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


def command(*flags: str, config: str = SLOTCON, **changes: Any) -> list[str]:
    """The command line of a tiny run; `SOLVER__MAX_ITER=4` changes SOLVER.MAX_ITER."""
    pairs = TINY | {key.replace("__", "."): str(value) for key, value in changes.items()}
    return ["--config-file", config, "--num-gpus", "0", *flags, *(word for pair in pairs.items() for word in pair)]


def converted(network: torchvision.models.ResNet, arch: str = "resnet50") -> dict[str, Any]:
    """What the converter writes for `network`, by a table of its own."""
    table = {"layer1": "res2", "layer2": "res3", "layer3": "res4", "layer4": "res5", "downsample.0": "shortcut"}
    table |= {"downsample.1": "shortcut.norm", "bn1": "conv1.norm", "bn2": "conv2.norm", "bn3": "conv3.norm"}
    arrays = {}
    for name, value in network.state_dict().items():
        new = name if name.startswith("layer") else f"stem.{name}"
        for theirs, detectron2s in table.items():
            new = new.replace(theirs, detectron2s)
        if not name.startswith("fc."):
            arrays[new] = value.numpy()
    return {"model": arrays, "__author__": "slots", "matching_heuristics": True, "provenance": {"arch": arch}}


@pytest.fixture(scope="session")
def network() -> torchvision.models.ResNet:
    """A random ResNet-50 whose batch norms are not where they started."""
    torch.manual_seed(0)
    network = torchvision.models.resnet50(weights=None).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(7)
    return network


@pytest.fixture(scope="session")
def encoder(network: torchvision.models.ResNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "encoder.pkl"
    path.write_bytes(pickle.dumps(converted(network)))
    return path


@pytest.fixture(scope="session")
def root(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DETECTRON2_DATASETS with a dozen photographs of COCO, and a Cityscapes of three drawn ones."""
    root = tmp_path_factory.mktemp("datasets")
    (root / "coco" / "annotations").mkdir(parents=True)
    for split, count in (("train2017", 8), ("val2017", 4)):
        (root / "coco" / split).symlink_to(photographs / split)
        whole = json.loads((photographs / "annotations" / f"instances_{split}.json").read_text())
        whole["images"] = whole["images"][:count]
        kept = {image["id"] for image in whole["images"]}
        whole["annotations"] = [item for item in whole["annotations"] if item["image_id"] in kept]
        (root / "coco" / "annotations" / f"instances_{split}.json").write_text(json.dumps(whole))
    for split, number in (("train", 0), ("train", 1), ("val", 2)):
        draw_street(root / "cityscapes", split, number)
    return root


def draw_street(folder: Path, split: str, number: int) -> None:
    """An image of 192x96 with two cars and a person, annotated as Cityscapes is."""
    stem = f"town_{number:06}_000019"
    image, labels, instances = (Image.new(mode, (192, 96)) for mode in ("RGB", "L", "I"))
    objects = []
    for index, (label, number_of_label, x) in enumerate((("car", 26, 10), ("car", 26, 80), ("person", 24, 140))):
        box = [x + 5 * number, 20, x + 5 * number + 40, 80]
        ImageDraw.Draw(image).rectangle(box, fill=(200, 60 * index, 90))
        ImageDraw.Draw(labels).rectangle(box, fill=number_of_label)
        ImageDraw.Draw(instances).rectangle(box, fill=number_of_label * 1000 + index)
        corners = [[box[0], box[1]], [box[2], box[1]], [box[2], box[3]], [box[0], box[3]]]
        objects.append({"label": label, "polygon": corners})
    images, truth = folder / "leftImg8bit" / split / "town", folder / "gtFine" / split / "town"
    images.mkdir(parents=True, exist_ok=True)
    truth.mkdir(parents=True, exist_ok=True)
    image.save(images / f"{stem}_leftImg8bit.png")
    labels.save(truth / f"{stem}_gtFine_labelIds.png")
    Image.fromarray(np.asarray(instances).astype(np.uint16)).save(truth / f"{stem}_gtFine_instanceIds.png")
    polygons = {"imgHeight": 96, "imgWidth": 192, "objects": objects}
    (truth / f"{stem}_gtFine_polygons.json").write_text(json.dumps(polygons))


@pytest.fixture(scope="session")
def _finetune(root: Path) -> ModuleType:
    pytest.importorskip("detectron2")
    os.environ["DETECTRON2_DATASETS"] = str(root)  # for the whole session: detectron2 reads it once
    return train_net.load_finetune()


@pytest.fixture
def finetune(_finetune: ModuleType) -> Iterator[ModuleType]:
    """The module, with detectron2's logging taken down afterwards: it goes on to the streams of its first caller."""
    yield _finetune
    for name in ("detectron2", "fvcore", "transfer"):
        logging.getLogger(name).handlers.clear()
    _finetune.setup_logger.cache_clear()


@pytest.fixture(scope="session")
def trained(root: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two iterations, through the shell, from another folder."""
    pytest.importorskip("detectron2")
    folder = tmp_path_factory.mktemp("elsewhere")
    argv = [sys.executable, str(TRAIN_NET), *command(MODEL__WEIGHTS=encoder, OUTPUT_DIR="run")]
    environment = os.environ | {"DETECTRON2_DATASETS": str(root)}
    result = subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder / "run"


def merged(path: Path) -> dict[str, Any]:
    """A config file over its base."""
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load(path.read_text())
    base = config.pop("_BASE_", None)

    def over(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
        both = {key: over(low[key], high[key]) for key in high if isinstance(high[key], dict) and key in low}
        return low | high | both

    return over(merged(path.parent / base), config) if base else config


COCO = {"IMS_PER_BATCH": 16, "BASE_LR": 0.02, "STEPS": (60000, 80000), "MAX_ITER": 90000}
TWICE = COCO | {"STEPS": (120000, 160000), "MAX_ITER": 180000}
STREETS = {"IMS_PER_BATCH": 8, "BASE_LR": 0.01, "STEPS": (18000,), "MAX_ITER": 24000}
SCHEDULES = {
    "COCO_R_50_FPN_1x": COCO,
    "COCO_R_50_FPN_1x_SlotCon": COCO,
    "COCO_R_50_FPN_1x_SlotFA": COCO,
    "COCO_R_50_FPN_2x_SlotCon": TWICE,
    "COCO_R_50_FPN_2x_SlotFA": TWICE,
    "Cityscapes_R_50_FPN_SlotCon": STREETS,
    "Cityscapes_R_50_FPN_SlotFA": STREETS,
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_config_files_hold_the_recipe(name: str) -> None:
    config = merged(CONFIGS / f"{name}.yaml")
    model, supervised = config["MODEL"], name == "COCO_R_50_FPN_1x"
    solver = config["SOLVER"] | {"STEPS": ast.literal_eval(config["SOLVER"]["STEPS"])}
    assert solver == SCHEDULES[name]
    assert all(model[part]["NORM"] == "SyncBN" for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"))
    assert (model["ROI_BOX_HEAD"]["NUM_CONV"], model["ROI_BOX_HEAD"]["NUM_FC"]) == (4, 1)
    assert model["ROI_MASK_HEAD"]["NUM_CONV"] == 4
    assert model["MASK_ON"] is True
    assert model["BACKBONE"]["FREEZE_AT"] == 0
    assert config["TEST"]["PRECISE_BN"]["ENABLED"] is True
    assert model["RESNETS"]["STRIDE_IN_1X1"] is supervised
    assert config["INPUT"]["FORMAT"] == ("BGR" if supervised else "RGB")
    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    assert model["PIXEL_MEAN"] == (mean[::-1] if supervised else mean)
    assert model["PIXEL_STD"] == ([1, 1, 1] if supervised else std)
    assert model["WEIGHTS"] == ("detectron2://ImageNetPretrained/MSRA/R-50.pkl" if supervised else "")
    sizes = ast.literal_eval(config["INPUT"]["MIN_SIZE_TRAIN"])
    streets = name.startswith("Cityscapes")
    assert sizes == tuple(range(800, 1025, 32) if streets else range(640, 801, 32))
    assert config["INPUT"]["MIN_SIZE_TEST"] == sizes[-1]
    assert model.get("ROI_HEADS", {}).get("NUM_CLASSES", 80) == (8 if streets else 80)


def test_every_config_file_has_its_output_folder() -> None:
    files = [path for path in CONFIGS.glob("*.yaml") if not path.name.startswith("Base")]
    assert {path.stem for path in files} == set(SCHEDULES)
    assert len({merged(path)["OUTPUT_DIR"] for path in files}) == len(files)


@pytest.mark.parametrize("name", SCHEDULES)
def test_detectron2_takes_the_config_files(
    name: str, finetune: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cfg, notes = finetune.configure(
        train_net.parse_args(["--config-file", str(CONFIGS / f"{name}.yaml"), "--num-gpus", "0"])
    )
    assert {key: cfg.SOLVER[key] for key in COCO} == SCHEDULES[name]
    assert cfg.is_frozen()
    state = finetune.shapes(cfg)
    assert sum(key.startswith("backbone.bottom_up.") for key in state) == 318
    assert all(value.is_meta for value in state.values())
    assert torch.cuda.is_available() or (cfg.MODEL.DEVICE == "cpu" and "CPU" in notes[0])


def test_without_detectron2_a_line_says_how_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "detectron2.py").write_text("raise ImportError(\"No module named 'detectron2'\")\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    argv = [sys.executable, str(TRAIN_NET), "--config-file", SLOTCON, "--num-gpus", "0", "OUTPUT_DIR", "run"]
    result = subprocess.run(argv, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("train_net.py: detectron2 cannot be imported (No module named 'detectron2')")
    assert "requirements-detection.txt" in result.stderr
    assert not (tmp_path / "run").exists()


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        train_net.main(["--help"])
    assert stopped.value.code == 0
    flags = "--config-file --num-gpus --num-machines --machine-rank --dist-url --resume --eval-only --auto-scale"
    assert set(flags.split()) <= set(capsys.readouterr().out.split())


def test_training_ends_with_numbers(trained: Path, finetune: ModuleType) -> None:
    log = (trained / "log.txt").read_text()
    assert "318 of 318 backbone tensors from" in log
    assert torch.cuda.is_available() or "no GPU in use" in log
    assert math.isfinite(json.loads((trained / "metrics.json").read_text().splitlines()[0])["total_loss"])
    results = json.loads((trained / "results.json").read_text())
    assert set(results) == {"bbox", "segm"}
    assert all(math.isfinite(results[task]["AP"]) for task in results)
    assert results["bbox"]["AP-toaster"] is None  # no toaster in these photographs


def test_a_run_goes_on_where_it_stopped(trained: Path, finetune: ModuleType) -> None:
    weights = torch.load(trained / "model_final.pth", weights_only=True)
    assert weights["iteration"] == 1
    train_net.main(command("--resume", OUTPUT_DIR=trained, SOLVER__MAX_ITER=4))
    log = (trained / "log.txt").read_text()
    assert "430 of 430 tensors from" in log
    assert "Starting training from iteration 2" in log
    again = torch.load(trained / "model_final.pth", weights_only=True)
    assert again["iteration"] == 3
    name = "backbone.bottom_up.stem.conv1.weight"
    assert not torch.equal(again["model"][name], weights["model"][name])


def test_evaluation_alone_finds_the_numbers_of_the_end_of_training(
    trained: Path, finetune: ModuleType, tmp_path: Path
) -> None:
    weights = trained / "model_final.pth"
    train_net.main(command("--eval-only", MODEL__WEIGHTS=weights, OUTPUT_DIR=tmp_path / "evaluation"))
    alone = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert alone == json.loads((trained / "results.json").read_text())
    assert not list((tmp_path / "evaluation").glob("*.pth"))


def test_a_detector_that_finds_nothing_has_every_task(trained: Path, finetune: ModuleType, tmp_path: Path) -> None:
    weights = trained / "model_final.pth"
    nothing = {"MODEL__ROI_HEADS__SCORE_THRESH_TEST": 1.0, "OUTPUT_DIR": tmp_path / "evaluation"}
    train_net.main(command("--eval-only", MODEL__WEIGHTS=weights, **nothing))
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert {task: results[task]["AP"] for task in results} == {"bbox": None, "segm": None}


def test_cityscapes(finetune: ModuleType, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cityscapesscripts")
    monkeypatch.chdir(tmp_path)
    config = str(CONFIGS / "Cityscapes_R_50_FPN_SlotCon.yaml")
    train_net.main(command(config=config, MODEL__WEIGHTS=encoder, OUTPUT_DIR=tmp_path / "run"))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results) == {"segm"}
    assert set(results["segm"]) == {"AP", "AP50"}
    assert all(map(math.isfinite, results["segm"].values()))
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert "318 of 318 backbone tensors" in (tmp_path / "run" / "log.txt").read_text()


def load_model(finetune: ModuleType, weights: Path, config: str = SLOTCON) -> tuple[Any, torch.nn.Module]:
    """The source and the model that detectron2 made of it, on the CPU."""
    argv = ["--config-file", config, "--num-gpus", "0", "MODEL.WEIGHTS", str(weights)]
    cfg, _ = finetune.configure(train_net.parse_args(argv))
    model = finetune.build_model(cfg)
    finetune.DetectionCheckpointer(model).load(str(weights))
    return finetune.weights.find_source(cfg, resume=False, eval_only=False), model.eval()


def test_detectron2s_encoder_is_torchvisions(
    finetune: ModuleType, encoder: Path, network: torchvision.models.ResNet
) -> None:
    source, model = load_model(finetune, encoder)
    image = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        features = model.backbone.bottom_up(image)
        expected = network.maxpool(network.relu(network.bn1(network.conv1(image))))
        for number in range(1, 5):
            expected = getattr(network, f"layer{number}")(expected)
            error = (features[f"res{number + 1}"] - expected).norm() / expected.norm()
            assert error < 1e-5

    state = model.state_dict()
    assert finetune.weights.taken_over(source, state) == f"318 of 318 backbone tensors from {encoder}"
    fresh = state.keys() - finetune.weights.check(source, state).keys()
    assert {name.split(".")[0 if name.startswith(("r", "p")) else 1][:4] for name in fresh} == {"roi_", "prop", "fpn_"}


@pytest.mark.parametrize("name", ["stem.conv1.norm.running_var", "res5.2.conv3.norm.num_batches_tracked"])
def test_a_tensor_that_did_not_arrive_is_noticed(name: str, finetune: ModuleType, encoder: Path) -> None:
    source, model = load_model(finetune, encoder)
    state = model.state_dict()
    state[f"backbone.bottom_up.{name}"].add_(1)
    with pytest.raises(finetune.UsageError, match=name):
        finetune.weights.taken_over(source, state)


def test_caffe2s_weights_need_no_statistics(
    finetune: ModuleType, network: torchvision.models.ResNet, tmp_path: Path
) -> None:
    arrays = {"fc1000_w": np.zeros((1000, 2048), np.float32), "fc1000_b": np.zeros(1000, np.float32)}
    for name, value in converted(network)["model"].items():
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
    source, model = load_model(finetune, path, str(CONFIGS / "COCO_R_50_FPN_1x.yaml"))
    assert finetune.weights.taken_over(source, model.state_dict()) == f"159 of 318 backbone tensors from {path}"

    del arrays["res4_5_branch2b_bn_b"]
    path.write_bytes(pickle.dumps(arrays, protocol=2))
    with pytest.raises(finetune.UsageError, match=r"res4.5.conv2.norm.bias is missing"):
        finetune.weights.check(source, model.state_dict())


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_of_any_protocol_are_read(protocol: int, tmp_path: Path) -> None:
    state = {"array": np.arange(6.0).reshape(2, 3).T, "number": np.float64(2.5), "text": "é", "bytes": b"\xff"}
    path = tmp_path / "arrays.pkl"
    path.write_bytes(pickle.dumps(state, protocol=protocol))
    read = load_arrays(path, "MODEL.WEIGHTS")
    assert np.array_equal(read.pop("array"), state.pop("array"))
    assert read == state


@pytest.mark.parametrize("processes", [1, 3, 4, 16])
def test_scaling_keeps_the_images_of_a_gpu(processes: int, finetune: ModuleType) -> None:
    cfg, _ = finetune.configure(
        train_net.parse_args(["--config-file", SLOTCON, "--num-gpus", "0", "TEST.EVAL_PERIOD", "6000"])
    )
    cfg.defrost()
    cfg, share = finetune.scale(cfg, processes), processes / 8
    expected = {
        "IMS_PER_BATCH": 2 * processes,
        "BASE_LR": pytest.approx(0.02 * share),
        "MAX_ITER": 90000 / share,
        "STEPS": (60000 / share, round(80000 / share)),
        "WARMUP_ITERS": round(1000 / share),
        "CHECKPOINT_PERIOD": round(5000 / share),
    }
    assert {key: cfg.SOLVER[key] for key in expected} == expected
    assert {"EVAL_PERIOD": 6000 / share}.items() <= cfg.TEST.items()


def test_auto_scale_is_for_the_gpus_in_use(finetune: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    flags = ["--config-file", SLOTCON, "--num-gpus", "4", "--auto-scale", "--dist-url", "tcp://first:1"]
    one, notes = finetune.configure(train_net.parse_args(flags))
    assert (one.SOLVER.IMS_PER_BATCH, one.SOLVER.BASE_LR, one.SOLVER.MAX_ITER) == (8, 0.01, 180000)
    assert one.MODEL.DEVICE == "cuda"
    assert "batch 8, lr 0.01, 180000 iterations" in notes[0]
    two, _ = finetune.configure(train_net.parse_args([*flags, "--num-machines", "2"]))
    assert two.SOLVER.IMS_PER_BATCH == 16
    assert pickle.loads(pickle.dumps(two)) == two  # the way to the processes
    with pytest.raises(finetune.UsageError, match="this machine has 4"):
        finetune.configure(train_net.parse_args(["--config-file", SLOTCON, "--num-gpus", "8"]))
    with pytest.raises(finetune.UsageError, match="not a multiple of 3 GPUs"):
        finetune.configure(train_net.parse_args(["--config-file", SLOTCON, "--num-gpus", "3"]))


def test_results_are_json_whatever_they_are(finetune: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    finetune.write_results(path, {"segm": {"AP": np.float32(12.5), "APs": math.nan, "APl": math.inf}})
    assert json.loads(path.read_text()) == {"segm": {"AP": 12.5, "APs": None, "APl": None}}
    assert "NaN" not in path.read_text()


mistake = partial(run_expecting_usage_error, train_net.main)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--num-gpus", "0"], "--config-file"),
        (["--config-file", "nowhere.yaml"], "--config-file nowhere.yaml"),
        (["--config-file", __file__], "--config-file"),
        (["--config-file", SLOTCON, "--num-gpus", "-1"], "--num-gpus"),
        (["--config-file", SLOTCON, "--num-gpus", "99"], "0 trains on the CPU"),
        (["--config-file", SLOTCON, "--num-gpus", "0", "--config", SLOTCON], "--config"),
        (["--config-file", SLOTCON, "--num-gpus", "0", "--num-machines", "2"], "--dist-url"),
        (["--config-file", SLOTCON, "--num-gpus", "0", "--machine-rank", "1"], "--machine-rank"),
        (["--config-file", SLOTCON, "--num-gpus", "0", "SOLVER.LR", "1"], "SOLVER.LR"),
        (["--config-file", SLOTCON, "--num-gpus", "0", "SOLVER.BASE_LR"], "SOLVER.BASE_LR: a key without a value"),
        (["--config-file", SLOTCON, "--num-gpus", "0", "SOLVER.BASE_LR", "fast"], "SOLVER.BASE_LR"),
        (
            ["--config-file", SLOTCON, "--num-gpus", "0", "SOLVER.BASE_LR", "1", "--resume"],
            "--resume: flags come before",
        ),
        (["--config-file", SLOTCON, "--num-gpus", "0", "--auto-scale", "SOLVER.IMS_PER_BATCH", "2"], "--auto-scale"),
        (
            ["--config-file", SLOTCON, "--num-gpus", "0", "MODEL.RESNETS.DEPTH", "18", "MODEL.WEIGHTS", __file__],
            "RES2_OUT_CHANNELS",
        ),
        (["--config-file", SLOTCON, "--num-gpus", "0", "SOLVER.AMP.ENABLED", "True"], "SOLVER.AMP.ENABLED"),
        (["--config-file", SLOTCON, "--num-gpus", "0", "DATASETS.TEST", "('coco_2018_val',)"], "coco_2018_val"),
        (["--config-file", SLOTCON, "--num-gpus", "0", "DATASETS.TEST", "('lvis_v1_val',)"], "lvis_v1_val"),
        (
            ["--config-file", SLOTCON, "--num-gpus", "0", "DATASETS.TEST", "('coco_2014_minival',)"],
            "instances_minival2014.json is missing",
        ),
        (
            ["--config-file", SLOTCON, "--num-gpus", "0"],
            "MODEL.WEIGHTS is empty; python transfer/detection/convert_pretrain_to_d2.py",
        ),
        (["--config-file", SLOTCON, "--num-gpus", "0", "--resume"], "MODEL.WEIGHTS is empty"),
        (["--config-file", SLOTCON, "--num-gpus", "0", "--eval-only"], "model_final.pth"),
        (["--config-file", SLOTCON, "--num-gpus", "0", "MODEL.WEIGHTS", "nowhere.pkl"], "nowhere.pkl: no such file"),
        (["--config-file", SLOTCON, "--num-gpus", "0", "MODEL.WEIGHTS", __file__], "no checkpoint"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_written(
    argv: list[str],
    named: str,
    finetune: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert named in mistake(argv, capsys)
    assert not (tmp_path / "output").exists()


def test_weights_that_cannot_be_fetched(finetune: ModuleType, root: Path, tmp_path: Path) -> None:
    argv = [sys.executable, str(TRAIN_NET), *command(MODEL__WEIGHTS="https://127.0.0.1:1/R-50.pkl", OUTPUT_DIR="run")]
    environment = os.environ | {"DETECTRON2_DATASETS": str(root), "FVCORE_CACHE": str(tmp_path / "cache")}
    result = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith(
        "train_net.py: MODEL.WEIGHTS https://127.0.0.1:1/R-50.pkl: cannot be fetched"
    )
    assert not (tmp_path / "run").exists()


class Touch:
    """A pickle that makes a file as it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def without(state: dict[str, Any], name: str) -> dict[str, Any]:
    return state | {"model": {key: value for key, value in state["model"].items() if key != name}}


def changed(state: dict[str, Any], name: str, value: float) -> dict[str, Any]:
    return state | {"model": state["model"] | {name: np.full_like(state["model"][name], value)}}


def reshaped(state: dict[str, Any], name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    return state | {"model": state["model"] | {name: np.zeros(shape, np.float32)}}


FILES: dict[str, tuple[Callable[[torchvision.models.ResNet, Path], bytes], str]] = {
    "missing": (
        lambda network, _: pickle.dumps(without(converted(network), "res3.1.conv2.norm.running_mean")),
        "res3.1.conv2.norm.running_mean is missing",
    ),
    "nan": (
        lambda network, _: pickle.dumps(changed(converted(network), "res3.1.conv2.weight", math.nan)),
        "res3.1.conv2.weight is not finite",
    ),
    "shape": (
        lambda network, _: pickle.dumps(reshaped(converted(network), "res5.0.conv2.weight", (512, 512, 1, 1))),
        "res5.0.conv2.weight is (512, 512, 1, 1) there and (512, 512, 3, 3) in the config's model",
    ),
    "another_architecture": (
        lambda *_: pickle.dumps(converted(torchvision.models.resnet18(weights=None), "resnet18")),
        "these are of a resnet18",
    ),
    "deeper": (
        lambda *_: pickle.dumps(converted(torchvision.models.resnet101(weights=None), "resnet101")),
        "res4.10.conv1.norm.bias has no place in the config's model",
    ),
    "torchvision_names": (
        lambda network, _: pickle.dumps({name: value.numpy() for name, value in network.state_dict().items()}),
        "not converted; python transfer/detection/convert_pretrain_to_d2.py",
    ),
    "truncated": (lambda network, _: pickle.dumps(converted(network))[:-1000], "truncated"),
    "code": (lambda network, path: pickle.dumps(converted(network) | {"note": Touch(path / "ran")}), "Path.touch"),
    "a_list": (lambda *_: pickle.dumps([1, 2]), "holds a list"),
    "no_weights": (lambda *_: pickle.dumps({"model": 3}), "no weights"),
    "other_things": (
        lambda *_: pickle.dumps({1: np.zeros(3), "words": np.array(["a", None]), "number": 2.0}),
        "stem.conv1.weight is missing",
    ),
    "nothing": (lambda *_: b"", "truncated"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_weights_file_is_refused(
    name: str,
    finetune: ModuleType,
    network: torchvision.models.ResNet,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make, named = FILES[name]
    path = tmp_path / "bad.pkl"
    path.write_bytes(make(network, tmp_path))
    line = mistake(command(MODEL__WEIGHTS=path, OUTPUT_DIR=tmp_path / "run"), capsys)
    assert f": MODEL.WEIGHTS {path}: " in line
    assert named in line
    assert {item.name for item in tmp_path.iterdir()} == {"bad.pkl"}


def test_a_pretraining_checkpoint_is_told_how_to_be_converted(
    finetune: ModuleType, network: torchvision.models.ResNet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "current.pth"
    model = {
        f"{part}.{name}": value for part in ("encoder_q", "encoder_k") for name, value in network.state_dict().items()
    }
    torch.save({"model": model, "args": Namespace(arch="resnet50"), "epoch": 3}, path)
    line = mistake(command(MODEL__WEIGHTS=path, OUTPUT_DIR=tmp_path / "run"), capsys)
    assert (
        f"python transfer/detection/convert_pretrain_to_d2.py {path} current.pkl, then MODEL.WEIGHTS current.pkl"
        in line
    )
    assert not (tmp_path / "run").exists()


def test_an_encoder_is_not_evaluated(
    finetune: ModuleType, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = mistake(command("--eval-only", MODEL__WEIGHTS=encoder, OUTPUT_DIR=tmp_path / "run"), capsys)
    assert "is missing; give a whole detector" in line
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(
    finetune: ModuleType, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "last_checkpoint").write_text("model_0004999.pth")
    assert "--resume" in mistake(command(MODEL__WEIGHTS=encoder, OUTPUT_DIR=tmp_path), capsys)
    assert "model_0004999.pth: no such file" in mistake(command("--resume", OUTPUT_DIR=tmp_path), capsys)
    (tmp_path / "model_0004999.pth").write_bytes(b"PK\x03\x04 half a file")
    assert "--resume" in mistake(command("--resume", OUTPUT_DIR=tmp_path), capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"last_checkpoint", "model_0004999.pth"}


def test_a_folder_that_cannot_be_made(finetune: ModuleType, encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = mistake(command(MODEL__WEIGHTS=encoder, OUTPUT_DIR=encoder / "run"), capsys)
    assert "OUTPUT_DIR" in line
    assert "cannot be made (Not a directory)" in line


def test_data_that_is_not_linked(
    finetune: ModuleType, root: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hidden = root / "hidden"
    (root / "coco").rename(hidden)
    try:
        line = mistake(command(MODEL__WEIGHTS=encoder, OUTPUT_DIR=tmp_path / "run"), capsys)
    finally:
        hidden.rename(root / "coco")
    assert f"{root}/coco/annotations/instances_train2017.json is missing" in line
    assert f"ln -s /path/to/coco {root}/coco" in line
    assert not (tmp_path / "run").exists()
