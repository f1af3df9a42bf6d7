"""Fine-tuning with mmsegmentation: every published config trains, evaluates and resumes from a converted encoder."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision import models as torchvision_models

from tests.segmentation_data import CONFIGS, FOLDER, make_data, small

pytest.importorskip("mmseg")

from transfer import convert
from transfer.encoders import read_encoder
from transfer.segmentation import runs, test, train
from utils.checkpoint import Weights


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("segmentation"))


@pytest.fixture(autouse=True)
def linked(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "DATA", data)


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights]:
    """A converted ResNet-50 of random weights and statistics, and those weights."""
    folder = tmp_path_factory.mktemp("pretrained")
    network = torchvision_models.resnet50()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias, std=0.1)
            torch.nn.init.normal_(module.running_mean, std=0.1)
    torch.save(network.state_dict(), folder / "torchvision.pth")
    converted = folder / "mmseg.pth"
    convert.main([str(folder / "torchvision.pth"), str(converted)], "mmseg")
    return converted, read_encoder(folder / "torchvision.pth").weights


def scalars(folder: Path) -> list[dict[str, Any]]:
    """What mmengine logged, oldest first."""
    files = sorted(folder.glob("*/vis_data/scalars.json"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_each_config_trains_from_a_converted_encoder_and_resumes(
    config: Path, pretrained: tuple[Path, Weights], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    where = [str(config), str(pretrained[0]), "--work-dir", str(folder)]
    train.main([*where, *small(config, 2)])
    log = "".join(path.read_text() for path in folder.glob("*/*.log"))
    assert "318 of 318 backbone tensors are those of PRETRAINED" in log
    first = json.loads((folder / "results.json").read_text())
    assert first["step"] == 2
    assert 0 <= first["metrics"]["mIoU"] <= 100
    assert first["pretrained"]["arch"] == "resnet50"

    train.main([*where, "--resume", *small(config, 3)])
    assert json.loads((folder / "results.json").read_text())["step"] == 3
    assert [entry["iter"] for entry in scalars(folder) if "loss" in entry] == [1, 2, 3]


@pytest.mark.full
def test_a_hundred_steps_lower_the_loss(pretrained: tuple[Path, Weights], tmp_path: Path) -> None:
    config = FOLDER / "configs/ade20k/fcn_r50-d8_512x512_80k_ade20k.py"
    train.main([str(config), str(pretrained[0]), "--work-dir", str(tmp_path), *small(config, 100)])
    losses = [entry["loss"] for entry in scalars(tmp_path) if "loss" in entry]
    assert len(losses) == 100
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_the_published_commands_train_and_test_on_the_cpu_from_any_folder(
    pretrained: tuple[Path, Weights], data: Path, tmp_path: Path
) -> None:
    config = FOLDER / "configs/voc12aug/fcn_d6_r50-d16_513x513_30k_voc12aug_moco.py"
    environment = os.environ | {"SEGMENTATION_DATA": str(data), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}

    def command(*words: object) -> str:
        words = ("bash", *words, "--work-dir", "run", *small(config, 2))
        done = subprocess.run(list(map(str, words)), cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return (tmp_path / "run/results.json").read_text()

    trained = command(FOLDER / "mim_dist_train.sh", config, pretrained[0], 0)
    assert command(FOLDER / "mim_dist_test.sh", config, tmp_path / "run/iter_2.pth", 0) == trained
    tested = (tmp_path / "run/test.json").read_text()
    assert json.loads(tested)["metrics"] == json.loads(trained)["metrics"]
    assert json.loads(tested)["step"] == 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fcn_d6_r50-d16_513x513_30k_voc12aug_moco", (30000, 0.003, 1e-4, [21000, 27000], 21, 513, "whole")),
        ("fcn_d6_r50-d16_769x769_90k_cityscapes_moco", (90000, 0.01, 1e-4, [63000, 81000], 19, 769, "slide")),
        ("fcn_r50-d8_512x512_20k_voc12aug", (20000, 0.01, 5e-4, 0.9, 21, 512, "whole")),
        ("fcn_r50-d8_769x769_40k_cityscapes", (40000, 0.01, 5e-4, 0.9, 19, 769, "slide")),
        ("fcn_r50-d8_512x512_80k_ade20k", (80000, 0.01, 5e-4, 0.9, 150, 512, "whole")),
    ],
)
def test_the_configs_hold_the_published_recipes(name: str, expected: tuple[Any, ...]) -> None:
    config = config_of(next(path for path in CONFIGS if path.stem == name))
    optimizer, (schedule,), model = config.optim_wrapper.optimizer, config.param_scheduler, config.model
    assert (optimizer.type, optimizer.momentum, config.auto_scale_lr.base_batch_size) == ("SGD", 0.9, 16)
    steps = schedule.milestones if schedule.type == "MultiStepLR" else schedule.power
    assert schedule.get("end", config.train_cfg.max_iters) == config.train_cfg.max_iters
    head, crop = model.decode_head, model.data_preprocessor.size[0]
    found = (config.train_cfg.max_iters, optimizer.lr, optimizer.weight_decay, steps, head.num_classes, crop)
    assert (*found, model.test_cfg.mode) == expected
    if "d6" in name:
        assert (head.dilation, head.channels, head.num_convs, model.auxiliary_head) == (6, 256, 2, None)
        assert (model.backbone.dilations, model.backbone.strides) == ((1, 1, 1, 2), (1, 2, 2, 1))
    else:
        assert model.auxiliary_head.num_classes == head.num_classes
        assert (model.backbone.dilations, model.backbone.strides) == ((1, 1, 2, 4), (1, 2, 1, 1))
    if model.test_cfg.mode == "slide":
        assert (model.test_cfg.crop_size, model.test_cfg.stride) == ((769, 769), (513, 513))


def config_of(path: Path, *flags: str) -> Any:
    parser = runs.make_parser("", "PRETRAINED", "")
    return runs.load_config(parser.parse_args([str(path), "none", *flags]))


@pytest.mark.parametrize(("gpus", "share"), [(1, 16), (2, 8), (4, 4), (8, 2), (16, 1)])
def test_the_total_batch_is_16_on_any_number_of_gpus(gpus: int, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 16)
    assert config_of(CONFIGS[0], "--gpus", str(gpus)).train_dataloader.batch_size == share
    for name, value in {"RANK": 1, "WORLD_SIZE": gpus}.items():
        monkeypatch.setenv(name, str(value))
    assert config_of(CONFIGS[0]).train_dataloader.batch_size == share


def test_several_gpus_become_torchrun_after_the_checks(
    pretrained: tuple[Path, Weights], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(sys, "argv", ["train.py", "A", "B", "--gpus", "4"])
    started: list[list[str]] = []

    def become(_: str, command: list[str]) -> None:
        started.append(command)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", become)
    with pytest.raises(SystemExit):
        train.main([str(CONFIGS[0]), str(pretrained[0]), "--work-dir", str(tmp_path / "run"), "--gpus", "4"])
    assert " ".join(started[0]).endswith("--nproc_per_node 4 --master_port 29501 train.py A B --gpus 4")
    assert not (tmp_path / "run").exists()


def mistake(argv: list[str], capsys: pytest.CaptureFixture[str], command: Callable[[list[str]], None]) -> str:
    """Run, expect exit status 2 and one line on stderr; return it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command(argv)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


Spoil = Callable[[Path, Weights], None]

UNFIT: list[tuple[str, Spoil, str]] = [
    ("another architecture", lambda path, _: torch.save(resnet18(), path), "layer1.0.bn3.bias is missing"),
    (
        "not converted",
        lambda path, weights: torch.save({"model": prefixed(weights)}, path),
        "convert_pretrain_to_mm.py",
    ),
    ("incomplete", lambda path, weights: torch.save(without(weights, "layer4.2.bn3.bias"), path), "layer4.2.bn3.bias"),
    ("truncated", lambda path, weights: truncated(path, weights), "truncated"),
    ("code", lambda path, _: torch.save({"state_dict": print}, path), "refused"),
    ("missing", lambda path, _: None, "no such file"),
]


def resnet18() -> Weights:
    return without(without(torchvision_models.resnet18().state_dict(), "fc.weight"), "fc.bias")


def prefixed(weights: Weights) -> Weights:
    return {f"module.encoder_k.{name}": value for name, value in weights.items()}


def without(weights: Weights, name: str) -> Weights:
    return {other: value for other, value in weights.items() if other != name}


def truncated(path: Path, weights: Weights) -> None:
    torch.save(weights, path)
    path.write_bytes(path.read_bytes()[:100_000])


@pytest.mark.parametrize(("spoil", "named"), [case[1:] for case in UNFIT], ids=[case[0] for case in UNFIT])
def test_weights_that_are_not_the_backbones_stop_the_run_before_it_starts(
    spoil: Spoil,
    named: str,
    pretrained: tuple[Path, Weights],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(tmp_path / "unfit.pth", pretrained[1])
    argv = [str(CONFIGS[0]), str(tmp_path / "unfit.pth"), "--work-dir", str(tmp_path / "run"), *small(CONFIGS[0])]
    assert named in mistake(argv, capsys, train.main)
    assert not (tmp_path / "run").exists()


def test_a_backbone_that_the_framework_did_not_load_stops_the_run_before_its_first_step(
    pretrained: tuple[Path, Weights],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mmengine.model.weight_init.PretrainedInit.__call__", lambda *_: None)
    config = FOLDER / "configs/cityscapes/fcn_d6_r50-d16_769x769_90k_cityscapes_moco.py"
    argv = [str(config), str(pretrained[0]), "--work-dir", str(tmp_path / "run"), *small(config)]
    assert "backbone tensors are not PRETRAINED's" in mistake(argv, capsys, train.main)
    assert not list((tmp_path / "run").glob("*.pth"))


def test_mistakes_are_one_line_and_write_nothing(
    pretrained: tuple[Path, Weights],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, folder = CONFIGS[0], tmp_path / "run"
    argv = [str(config), str(pretrained[0]), "--work-dir", str(folder), *small(config)]
    assert "no such config" in mistake(["nowhere.py", *argv[1:]], capsys, train.main)
    (tmp_path / "broken.py").write_text("_base_ = ['nowhere.py']")
    assert "cannot be read" in mistake([str(tmp_path / "broken.py"), *argv[1:]], capsys, train.main)
    assert "KEY=VALUE" in mistake([*argv[:4], "--cfg-options", "no_value"], capsys, train.main)
    assert "no such file" in mistake([argv[0], "nowhere.pth", *argv[2:4]], capsys, test.main)
    assert "not a checkpoint of a fine-tuning" in mistake(argv[:4], capsys, test.main)
    batch = "train_dataloader.batch_size=2"
    assert "auto_scale_lr.base_batch_size" in mistake([*argv[:4], "--cfg-options", batch], capsys, train.main)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "0 trains on the CPU" in mistake([*argv[:4], "--gpus", "1"], capsys, train.main)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert "cannot be shared by 3 GPUs" in mistake([*argv[:4], "--gpus", "3"], capsys, train.main)
    monkeypatch.undo()
    monkeypatch.setattr(runs, "DATA", tmp_path / "nothing")
    assert "link the data" in mistake(argv, capsys, train.main)
    assert not folder.exists()


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_testing_runs_no_code_of_a_checkpoint_and_names_what_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run = tmp_path / "iter_2.pth", tmp_path / "run"
    state = {"state_dict": resnet18(), "meta": {"iter": 2}, "message_hub": Payload(tmp_path / "ran")}
    torch.save(state, path)
    line = mistake([str(CONFIGS[0]), str(path), "--work-dir", str(run)], capsys, test.main)
    assert "not a model of" in line
    path.write_bytes(path.read_bytes()[:100_000])
    assert "truncated" in mistake([str(CONFIGS[0]), str(path), "--work-dir", str(run)], capsys, test.main)
    assert not (tmp_path / "ran").exists()
    assert not run.exists()


def test_a_folder_that_holds_a_run_is_left_alone(
    pretrained: tuple[Path, Weights], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "last_checkpoint").write_text("iter_2.pth")
    argv = [str(CONFIGS[0]), str(pretrained[0]), "--work-dir", str(tmp_path), *small(CONFIGS[0])]
    assert "--resume" in mistake(argv, capsys, train.main)
    assert [path.name for path in tmp_path.iterdir()] == ["last_checkpoint"]


def test_without_mmsegmentation_one_line_says_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mmseg.utils", None)
    assert "pip install -r transfer/requirements-segmentation.txt" in mistake(["a", "b"], capsys, train.main)


def test_a_number_of_gpus_is_a_number(tmp_path: Path) -> None:
    for words in (["config", "weights"], ["config", "weights", "all"]):
        done = subprocess.run(["bash", str(FOLDER / "mim_dist_train.sh"), *words], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
