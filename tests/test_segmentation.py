"""Fine-tuning with mmsegmentation: the configs train, resume and evaluate from a converted encoder."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import resnet18, resnet34

from data import demo
from tests.checkpoint_data import CodeInPickle, add_prefix, random_weights, vit_weights
from tests.helpers import run_expecting_usage_error
from tests.segmentation_data import (
    FCN_CONFIGS,
    FOLDER_CONFIG,
    SEGMENTATION,
    SIZE,
    VIT_CONFIG,
    VIT_FOLDER_CONFIG,
    VOC_CONFIG,
    make_data,
    make_folder,
    save_image,
    small_run,
)

pytest.importorskip("mmseg")

from models.backbones import build_encoder
from transfer import convert
from transfer.encoders import load_encoder
from transfer.segmentation import folder_files, mm_config, test, train
from utils.checkpoint import Weights
from utils.errors import UsageError
from utils.vit_names import mmseg_vit_name

CAPSYS = pytest.CaptureFixture[str]


VIT_TINY = ["model.backbone.embed_dims=192", "model.backbone.num_heads=3", "model.neck.0.embed_dim=192"]
VIT_TINY += ["model.neck.1.in_channels=[192,192,192,192]", "model.neck.1.out_channels=16"]
VIT_TINY += ["model.decode_head.in_channels=[16,16,16,16]", "model.decode_head.channels=16"]
"""Overrides of a config with a ViT-S."""


def command(config: Path, weights: Path, folder: Path, *flags: str, iterations: int = 2) -> list[str]:
    """Return the arguments of a run that trains in a second.

    It has a ResNet-18 in place of the config's ResNet-50, or a ViT-Ti in place of its ViT-S.
    """
    overrides = ["model.backbone.depth=18", "model.decode_head.in_channels=512", "model.decode_head.channels=16"]
    if config == VIT_CONFIG:
        overrides = VIT_TINY
    elif "d8" in config.name:
        overrides += ["model.auxiliary_head.in_channels=256", "model.auxiliary_head.channels=16"]
    return [str(config), str(weights), "--work-dir", str(folder), *flags, *small_run(config, iterations), *overrides]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("segmentation"))


@pytest.fixture(autouse=True)
def linked_data(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGMENTATION_DATA", str(data))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted ResNet-18 with random weights and batch-norm statistics."""
    folder = tmp_path_factory.mktemp("pretrained")
    network = resnet18()
    for name, value in network.state_dict().items():
        if "running_mean" in name or name.endswith("bias"):
            value.normal_(0, 0.1)
    torch.save(network.state_dict(), folder / "torchvision.pth")
    convert.main([str(folder / "torchvision.pth"), str(folder / "mmseg.pth")], "mmseg")
    return folder / "mmseg.pth"


@pytest.fixture(scope="module")
def timm_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A timm checkpoint of a ViT-Ti with random weights."""
    path = tmp_path_factory.mktemp("timm_vit") / "timm.pth"
    torch.save(vit_weights(0), path)
    return path


@pytest.fixture(scope="module")
def pretrained_vit(timm_vit: Path) -> Path:
    """The same ViT-Ti, converted."""
    convert.main([str(timm_vit), str(timm_vit.with_name("mmseg.pth"))], "mmseg")
    return timm_vit.with_name("mmseg.pth")


@pytest.fixture(scope="module")
def fine_tuned(pretrained: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of two iterations."""
    folder = tmp_path_factory.mktemp("fine_tuned") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEGMENTATION_DATA", str(data))
        train.main(command(VOC_CONFIG, pretrained, folder))
    return folder


def read_losses(folder: Path) -> dict[int, float]:
    """Return the logged loss by iteration."""
    files = sorted(folder.glob("*/vis_data/scalars.json"))
    entries = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return {entry["iter"]: entry["loss"] for entry in entries if "loss" in entry}


@pytest.mark.parametrize(
    "config",
    [path for path in FCN_CONFIGS if path != VOC_CONFIG and "norm" not in path.name],
    ids=lambda path: path.stem,
)
def test_config_trains_and_evaluates(config: Path, pretrained: Path, tmp_path: Path) -> None:
    train.main(command(config, pretrained, tmp_path / "run", iterations=1))
    assert list(read_losses(tmp_path / "run")) == [1]
    assert 0 <= json.loads((tmp_path / "run/results.json").read_text())["metrics"]["mIoU"] <= 100


def test_run_starts_from_all_pretrained_tensors(fine_tuned: Path) -> None:
    log = "".join(path.read_text() for path in fine_tuned.glob("*/*.log"))
    assert "120 of 120 backbone tensors are equal to PRETRAINED's" in log
    results = json.loads((fine_tuned / "results.json").read_text())
    assert results["step"] == 2
    assert results["pretrained"]["arch"] == "resnet18"


def test_shell_command_reproduces_metrics_of_training(fine_tuned: Path, tmp_path: Path) -> None:
    argv = command(VOC_CONFIG, fine_tuned / "iter_2.pth", tmp_path / "run")
    script = ["bash", str(SEGMENTATION / "mim_dist_test.sh"), *argv[:2], "0", *argv[2:]]
    # One thread, as in the tests' own process, so that both add in the same order.
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    evaluated, trained = tmp_path / "run/test.json", fine_tuned / "results.json"
    assert json.loads(evaluated.read_text())["metrics"] == json.loads(trained.read_text())["metrics"]


def test_resumed_run_continues_at_the_next_iteration(fine_tuned: Path, pretrained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fine_tuned, tmp_path / "run"))
    train.main(command(VOC_CONFIG, pretrained, folder, "--resume", iterations=3))
    assert list(read_losses(folder)) == [1, 2, 3]
    assert json.loads((folder / "results.json").read_text())["step"] == 3


NORM = {"type": "SyncBN", "requires_grad": True}
MOCO_NETWORK = {
    "backbone": {"strides": (1, 2, 2, 1), "dilations": (1, 1, 1, 2)},
    "decode_head": {"channels": 256, "dilation": 6, "concat_input": False, "dropout_ratio": 0, "align_corners": True},
    "auxiliary_head": None,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}
D8_NETWORK = {
    "backbone": {"strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4)},
    "decode_head": {"channels": 512, "concat_input": True, "dropout_ratio": 0.1, "align_corners": False},
    "auxiliary_head": {"channels": 256, "concat_input": False, "dropout_ratio": 0.1, "align_corners": False},
    "mean": [123.675, 116.28, 103.53],
    "std": [58.395, 57.12, 57.375],
}
SGD = {"type": "SGD", "momentum": 0.9}
MOCO_CROP, D8_CROP = {"type": "RandomCrop"}, {"type": "RandomCrop", "cat_max_ratio": 0.75}
DISTORTION = [{"type": "PhotoMetricDistortion"}]
WHOLE, WINDOWS = {"mode": "whole"}, {"mode": "slide", "crop_size": (769, 769), "stride": (513, 513)}
STEPS = {"type": "MultiStepLR", "gamma": 0.1, "by_epoch": False}
POLY = {"type": "PolyLR", "eta_min": 1e-4, "power": 0.9, "begin": 0, "by_epoch": False}
RECIPES: dict[str, dict[str, Any]] = {
    "fcn_d6_r50-d16_513x513_30k_voc12aug_moco": MOCO_NETWORK
    | {"classes": 21, "resize": (2049, 513), "crop": MOCO_CROP | {"crop_size": (513, 513)}, "distortion": []}
    | {"optimizer": SGD | {"lr": 0.003, "weight_decay": 1e-4}, "schedule": STEPS | {"milestones": [21000, 27000]}}
    | {"iterations": 30000, "test": WHOLE},
    "fcn_d6_r50-d16_769x769_90k_cityscapes_moco": MOCO_NETWORK
    | {"classes": 19, "resize": (2049, 1025), "crop": MOCO_CROP | {"crop_size": (769, 769)}, "distortion": []}
    | {"optimizer": SGD | {"lr": 0.01, "weight_decay": 1e-4}, "schedule": STEPS | {"milestones": [63000, 81000]}}
    | {"iterations": 90000, "test": WINDOWS},
    "fcn_r50-d8_512x512_20k_voc12aug": D8_NETWORK
    | {"classes": 21, "resize": (2048, 512), "crop": D8_CROP | {"crop_size": (512, 512)}, "distortion": DISTORTION}
    | {"optimizer": SGD | {"lr": 0.01, "weight_decay": 5e-4}, "schedule": POLY | {"end": 20000}}
    | {"iterations": 20000, "test": WHOLE},
    "fcn_r50-d8_769x769_40k_cityscapes": D8_NETWORK
    | {name: D8_NETWORK[name] | {"align_corners": True} for name in ("decode_head", "auxiliary_head")}
    | {"classes": 19, "resize": (2049, 1025), "crop": D8_CROP | {"crop_size": (769, 769)}, "distortion": DISTORTION}
    | {"optimizer": SGD | {"lr": 0.01, "weight_decay": 5e-4}, "schedule": POLY | {"end": 40000}}
    | {"iterations": 40000, "test": WINDOWS},
    "fcn_r50-d8_512x512_80k_ade20k": D8_NETWORK
    | {"classes": 150, "resize": (2048, 512), "crop": D8_CROP | {"crop_size": (512, 512)}, "distortion": DISTORTION}
    | {"optimizer": SGD | {"lr": 0.01, "weight_decay": 5e-4}, "schedule": POLY | {"end": 80000}}
    | {"iterations": 80000, "test": WHOLE},
}
"""The released recipes; where the recipes do not differ, the tests spell out the values."""
for _name in ("fcn_d6_r50-d16_513x513_30k_voc12aug_moco", "fcn_d6_r50-d16_769x769_90k_cityscapes_moco"):
    RECIPES[f"{_name}_imagenet_norm"] = RECIPES[_name] | {name: D8_NETWORK[name] for name in ("mean", "std")}


@pytest.fixture(params=FCN_CONFIGS, ids=lambda path: path.stem)
def config_and_recipe(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    return load_config(request.param), RECIPES[request.param.stem]


def test_config_has_the_released_network(config_and_recipe: tuple[Any, dict[str, Any]]) -> None:
    cfg, recipe = config_and_recipe
    backbone = {"type": "ResNet", "depth": 50, "num_stages": 4, "out_indices": (0, 1, 2, 3), "style": "pytorch"}
    backbone |= {"contract_dilation": True, "norm_cfg": NORM, "norm_eval": False}
    assert cfg.model.backbone == backbone | recipe["backbone"]
    loss = {"type": "CrossEntropyLoss", "use_sigmoid": False}
    head = {"type": "FCNHead", "num_classes": recipe["classes"], "norm_cfg": NORM}
    decode_head = {"in_channels": 2048, "in_index": 3, "num_convs": 2, "loss_decode": loss | {"loss_weight": 1.0}}
    assert cfg.model.decode_head == head | decode_head | recipe["decode_head"]
    auxiliary_head = {"in_channels": 1024, "in_index": 2, "num_convs": 1, "loss_decode": loss | {"loss_weight": 0.4}}
    expected = recipe["auxiliary_head"] and head | auxiliary_head | recipe["auxiliary_head"]
    assert cfg.model.auxiliary_head == expected
    assert (cfg.model.type, cfg.model.test_cfg) == ("EncoderDecoder", recipe["test"])


def test_config_has_the_released_transforms(config_and_recipe: tuple[Any, dict[str, Any]]) -> None:
    cfg, recipe = config_and_recipe
    resize = {"type": "RandomResize", "scale": recipe["resize"], "ratio_range": (0.5, 2.0), "keep_ratio": True}
    flip = {"type": "RandomFlip", "prob": 0.5}
    load, masks, pack = {"type": "LoadImageFromFile"}, {"type": "LoadAnnotations"}, {"type": "PackSegInputs"}
    training = cfg.train_dataloader.dataset
    for dataset in training.get("datasets", [training]):
        assert dataset.pipeline == [load, masks, resize, recipe["crop"], flip, *recipe["distortion"], pack]
    resize = {"type": "Resize", "scale": recipe["resize"], "keep_ratio": True}
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.pipeline == [load, resize, masks, pack]
    preprocessor = {"type": "SegDataPreProcessor", "bgr_to_rgb": True, "pad_val": 0, "seg_pad_val": 255}
    preprocessor |= {"mean": recipe["mean"], "std": recipe["std"], "size": recipe["crop"]["crop_size"]}
    assert cfg.model.data_preprocessor == preprocessor


def test_config_has_the_released_schedule(config_and_recipe: tuple[Any, dict[str, Any]]) -> None:
    cfg, recipe = config_and_recipe
    wrapper = {"type": "OptimWrapper", "optimizer": recipe["optimizer"], "clip_grad": None}
    assert cfg.optim_wrapper == wrapper
    assert cfg.param_scheduler == [recipe["schedule"]]
    assert (cfg.train_cfg.type, cfg.train_cfg.max_iters) == ("IterBasedTrainLoop", recipe["iterations"])
    assert recipe["iterations"] % cfg.train_cfg.val_interval == 0
    assert cfg.train_dataloader.batch_size == 16
    assert cfg.train_dataloader.sampler == {"type": "InfiniteSampler", "shuffle": True}


def test_vit_config_has_the_published_settings_and_otherwise_mmsegmentations() -> None:
    """Network, learning rate and length are published; the data is that of the FCN on ADE20K."""
    cfg = load_config(VIT_CONFIG)
    backbone = {"type": "DINOVisionTransformer", "img_size": 224, "patch_size": 16, "embed_dims": 384, "num_heads": 6}
    backbone |= {"num_layers": 12, "out_indices": (2, 5, 8, 11), "drop_path_rate": 0.1, "patch_bias": True}
    assert cfg.model.backbone == backbone | {"final_norm": True, "norm_cfg": {"type": "LN", "eps": 1e-6}}
    pyramid = {"type": "Feature2Pyramid", "embed_dim": 384, "rescales": [4, 2, 1, 0.5], "norm_cfg": NORM}
    fpn = {"type": "FPN", "in_channels": [384] * 4, "out_channels": 256, "num_outs": 4}
    assert cfg.model.neck == [pyramid, fpn]
    head = {"type": "FPNHead", "in_channels": [256] * 4, "in_index": [0, 1, 2, 3], "feature_strides": [4, 8, 16, 32]}
    head |= {"channels": 128, "dropout_ratio": 0.1, "num_classes": 150, "norm_cfg": NORM, "align_corners": False}
    loss = {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0}
    assert cfg.model.decode_head == head | {"loss_decode": loss}
    assert (cfg.model.type, cfg.model.test_cfg) == ("EncoderDecoder", WHOLE)

    adamw = {"type": "AdamW", "lr": 6e-5, "betas": (0.9, 0.999), "weight_decay": 0.01}
    assert (cfg.optim_wrapper.optimizer, cfg.optim_wrapper.clip_grad) == (adamw, None)
    warm_up = {"type": "LinearLR", "start_factor": 1e-6, "begin": 0, "end": 1500, "by_epoch": False}
    decay = {"type": "PolyLR", "eta_min": 0.0, "power": 1.0, "begin": 1500, "end": 40000, "by_epoch": False}
    assert cfg.param_scheduler == [warm_up, decay]
    assert cfg.train_cfg == {"type": "IterBasedTrainLoop", "max_iters": 40000, "val_interval": 4000}

    other = load_config(next(path for path in FCN_CONFIGS if "ade20k" in path.name))
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        assert cfg[name] == other[name]
    padding = {"test_cfg": {"size_divisor": 32}}
    assert cfg.model.data_preprocessor == other.model.data_preprocessor | padding


def test_vit_has_no_weight_decay_on_norms_biases_positions_and_class_token() -> None:
    mm_config.import_and_register_mmseg()
    from mmengine.optim import build_optim_wrapper
    from mmseg.registry import MODELS

    cfg = load_config(
        VIT_CONFIG, "--cfg-options", "model.backbone.num_layers=4", "model.backbone.out_indices=(0,1,2,3)"
    )
    model = MODELS.build(cfg.model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    decays = {names[parameter]: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decays.keys() == set(names.values())
    for parameter, name in names.items():
        without = parameter.ndim == 1 or name in ("backbone.pos_embed", "backbone.cls_token")
        assert decays[name] == (0 if without else 0.01), name
    assert {name for name in decays if ".ln" in name} > {"backbone.ln1.weight", "backbone.layers.0.ln2.weight"}


@pytest.mark.parametrize(("height", "width"), [(224, 224), (96, 128), (112, 448)])
def test_frozen_vit_has_the_features_of_load_encoder(
    height: int, width: int, timm_vit: Path, pretrained_vit: Path
) -> None:
    """The maps of blocks 3, 6 and 9 are compared as they are, and that of the last block after the final norm.

    112 x 448 pixels have as many patches as the 224 x 224 pixels of pre-training.
    """
    mm_config.import_and_register_mmseg()
    from mmseg.registry import MODELS

    cfg = load_config(VIT_CONFIG, "--cfg-options", *VIT_TINY)
    cfg.model.backbone.init_cfg = {"type": "Pretrained", "checkpoint": str(pretrained_vit)}
    backbone, encoder = MODELS.build(cfg.model.backbone), load_encoder(timm_vit)
    backbone.init_weights()
    backbone.eval()
    images = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        maps = backbone(images)
        blocks: Any = encoder.get_intermediate_layers
        expected = [*blocks(images, [2, 5, 8], reshape=True), encoder(images)]
    for actual, target in zip(maps, expected, strict=True):
        assert actual.shape == target.shape == (1, 192, height // 16, width // 16)
        assert (actual - target).abs().max() <= 1e-5 * target.abs().max()


def test_vit_trains_from_all_pretrained_tensors_and_evaluates(pretrained_vit: Path, tmp_path: Path) -> None:
    """The images to evaluate, of 80 x 64 pixels, are padded."""
    run = tmp_path / "run"
    train.main(command(VIT_CONFIG, pretrained_vit, run))
    assert list(read_losses(run)) == [1, 2]
    log = "".join(path.read_text() for path in run.glob("*/*.log"))
    assert "150 of 150 backbone tensors are equal to PRETRAINED's" in log
    results = json.loads((run / "results.json").read_text())
    assert results["pretrained"]["arch"] == "vit_tiny_patch16_224"
    test.main(command(VIT_CONFIG, run / "iter_2.pth", run))
    assert json.loads((run / "test.json").read_text())["metrics"] == results["metrics"]


def test_image_of_any_size_is_padded_for_a_vit() -> None:
    mm_config.import_and_register_mmseg()
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample

    preprocessor = MODELS.build(load_config(VIT_CONFIG).model.data_preprocessor)
    image = torch.full((3, 50, 70), 200, dtype=torch.uint8)
    batch = preprocessor({"inputs": [image], "data_samples": [SegDataSample()]}, training=False)
    assert batch["inputs"].shape == (1, 3, 64, 96)
    assert (batch["inputs"][0, :, :50, :70] > 0).all()
    assert (batch["inputs"][0, :, 50:] == 0).all()
    assert (batch["inputs"][0, :, :, 70:] == 0).all()
    assert batch["data_samples"][0].img_padding_size == (0, 26, 0, 14)  # cut off from the predictions


def test_released_normalization_pads_with_zeros_and_void() -> None:
    """Pixel values in [0, 255] are normalized by the statistics of values in [0, 1], in RGB, and padded afterwards."""
    from mmengine.structures import PixelData
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample

    preprocessor = MODELS.build(load_config(VOC_CONFIG).model.data_preprocessor)
    sample = SegDataSample(gt_sem_seg=PixelData(data=torch.ones(1, 500, 510, dtype=torch.int64)))
    bgr = torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None].expand(3, 500, 510)
    batch = preprocessor({"inputs": [bgr], "data_samples": [sample]}, training=True)
    image, labels = batch["inputs"][0], batch["data_samples"][0].gt_sem_seg.data[0]
    expected = torch.tensor([(30 - 0.485) / 0.229, (20 - 0.456) / 0.224, (10 - 0.406) / 0.225])
    torch.testing.assert_close(image[:, :500, :510], expected[:, None, None].expand(3, 500, 510))
    assert image.shape[1:] == labels.shape == (513, 513)
    image[:, :500, :510] = 0
    labels[:500, :510] += 254
    assert (image == 0).all()
    assert (labels == 255).all()


def test_evaluation_of_the_first_images_only() -> None:
    mm_config.import_and_register_mmseg()
    from mmseg.registry import DATASETS

    cfg = load_config(VOC_CONFIG, "--max-val-images", "1")
    assert [len(DATASETS.build(loader.dataset)) for loader in (cfg.val_dataloader, cfg.test_dataloader)] == [1, 1]
    assert len(DATASETS.build(cfg.train_dataloader.dataset)) == 4


def test_config_of_a_run_on_the_first_images_evaluates_all(tmp_path: Path) -> None:
    mm_config.import_and_register_mmseg()
    from mmseg.registry import DATASETS

    def num_images(*flags: str) -> int:
        return len(DATASETS.build(load_config(tmp_path / "config.py", *flags).val_dataloader.dataset))

    load_config(VOC_CONFIG, "--max-val-images", "1").dump(tmp_path / "config.py")
    assert num_images() == 2
    assert num_images("--max-val-images", "1") == 1
    assert num_images("--cfg-options", "val_dataloader.dataset.indices=1") == 1


def test_evaluation_needs_no_training_images(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGMENTATION_DATA", str(tmp_path))
    shutil.copytree(data / "ade", tmp_path / "ade", ignore=shutil.ignore_patterns("training"))
    config = next(path for path in FCN_CONFIGS if "ade20k" in path.name)
    args = mm_config.make_mmseg_parser("", "CHECKPOINT", "").parse_args([str(config), "none"])
    assert str(tmp_path) in mm_config.load_config(args, ["test_dataloader"]).test_dataloader.dataset.data_root
    with pytest.raises(UsageError, match="images/training does not exist; link the data"):
        load_config(config)


def test_listed_files_that_are_missing_are_named(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGMENTATION_DATA", str(tmp_path))
    voc = Path(shutil.copytree(data / "VOCdevkit", tmp_path / "VOCdevkit")) / "VOC2012"
    (voc / "SegmentationClassAug/image_3.png").unlink()
    error = r"SegmentationClassAug/image_3.png does not exist; 1 files of .*aug.txt are missing"
    with pytest.raises(UsageError, match=error):
        load_config(next(path for path in FCN_CONFIGS if "voc" in path.name))


def test_value_0_of_ade20k_is_void_and_1_is_the_first_class(data: Path) -> None:
    mm_config.import_and_register_mmseg()
    from mmseg.registry import DATASETS

    dataset = DATASETS.build(
        load_config(next(path for path in FCN_CONFIGS if "ade20k" in path.name)).val_dataloader.dataset
    )
    dataset.pipeline.transforms = [*dataset.pipeline.transforms[:1], *dataset.pipeline.transforms[2:]]  # no resizing
    sample = dataset[0]["data_samples"]
    mask = np.array(Image.open(sample.seg_map_path))
    np.testing.assert_array_equal(sample.gt_sem_seg.data[0], np.where(mask == 0, 255, mask - 1))


def load_config(path: Path, *flags: str) -> Any:
    return train.load_training_config(train.parse_args([str(path), "none", *flags]))[0]


@pytest.mark.parametrize(("gpus", "batch_size"), [(1, 16), (4, 4), (16, 1)])
def test_total_batch_is_16_on_any_number_of_gpus(gpus: int, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 16)
    assert load_config(VOC_CONFIG, "--gpus", str(gpus)).train_dataloader.batch_size == batch_size
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(gpus))
    assert load_config(VOC_CONFIG).train_dataloader.batch_size == batch_size


def test_several_gpus_start_torchrun_after_the_checks(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    def execv(_: str, argv: list[str]) -> None:
        started.append(argv)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(sys, "argv", ["train.py", "A", "B", "--gpus", "2"])
    with pytest.raises(SystemExit):
        train.main(command(VOC_CONFIG, pretrained, tmp_path / "run", "--gpus", "2"))
    assert " ".join(started[0]).endswith("--nproc_per_node 2 --master_port 29501 train.py A B --gpus 2")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A custom dataset, and the names of its classes."""
    root = make_folder(tmp_path_factory.mktemp("folder"))
    (root / "classes.txt").write_text("# in the order of the masks\n" + "".join(f"{name}\n" for name in demo.CLASSES))
    return root


def folder_command(folder: Path, weights: Path, run: Path, *overrides: str) -> list[str]:
    """Return the arguments of a run on a custom dataset with a ResNet-18 in place of the config's ResNet-50."""
    argv = [str(FOLDER_CONFIG), str(weights), "--work-dir", str(run), "--data-dir", str(folder)]
    argv += ["--classes", str(folder / "classes.txt"), "--crop-size", "32", "--max-val-images", "2", "--cfg-options"]
    argv += ["model.backbone.depth=18", "model.decode_head.in_channels=512", "model.auxiliary_head.in_channels=256"]
    argv += [f"model.{head}.channels=16" for head in ("decode_head", "auxiliary_head")]
    argv += [f"{split}_dataloader.num_workers=0" for split in ("train", "val", "test")]
    return [*argv, *overrides]


def test_folder_of_images_trains_resumes_and_evaluates(
    folder: Path, pretrained: Path, tmp_path: Path, capsys: CAPSYS
) -> None:
    data, run = Path(shutil.copytree(folder, tmp_path / "data")), tmp_path / "run"
    train.main(folder_command(data, pretrained, run, "train_cfg.max_iters=2"))
    output = capsys.readouterr().out
    assert "5 training and 5 validation images of 12 classes; 1 image without a mask is left out\n" in output
    assert "2 iterations of 5 images, learning rate 0.003125, evaluation every 1 iterations" in output
    assert list(read_losses(run)) == [1, 2]
    (data / "val/images/4.jpg").write_text("damaged")  # not read: the first run checked it, and two are evaluated
    train.main([*folder_command(data, pretrained, run, "train_cfg.max_iters=3"), "--resume"])
    results = json.loads((run / "results.json").read_text())
    assert results["step"] == 3
    assert 0 <= results["metrics"]["mIoU"] <= 100

    shutil.rmtree(data / "train")
    config = run / FOLDER_CONFIG.name  # as the run wrote it, with its data and its classes
    written = config.read_text()
    assert demo.CLASSES[0] in written
    test.main([str(config), str(run / "iter_3.pth"), "--max-val-images", "2"])
    assert json.loads((run / "test.json").read_text())["metrics"] == results["metrics"]
    assert config.read_text() == written
    evaluated = (run / "test" / FOLDER_CONFIG.name).read_text()
    assert "retrained" not in evaluated
    assert "resume = False" in evaluated
    shutil.rmtree(data / "val/masks")
    error = run_expecting_usage_error(test.main, [str(config), str(run / "iter_3.pth")], capsys)
    assert f"{data / 'val/masks'}: no such folder" in error

    argv = [str(FOLDER_CONFIG), str(run / "iter_3.pth"), "--work-dir", str(tmp_path / "other")]
    assert "use the config in the run's --work-dir" in run_expecting_usage_error(test.main, argv, capsys)
    argv = [*folder_command(folder, pretrained, run), "--resume", "--classes", "13"]
    assert "does not fit the config's model" in run_expecting_usage_error(train.main, argv, capsys)


def test_classes_that_no_training_mask_has_are_reported(
    folder: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: CAPSYS
) -> None:
    monkeypatch.setattr(train.mm_config, "launch_distributed", lambda _: sys.exit())
    largest = max(value for path in (folder / "train/masks").iterdir() for value in read_values(path) - {255})
    for classes, reported in ((40, True), (largest + 1, False)):
        argv = [*folder_command(folder, pretrained, tmp_path / "run"), "--classes", str(classes)]
        with pytest.raises(SystemExit):
            train.main(argv)
        line = f"no training mask has a class above {largest}, of the classes 0 to {classes - 1}\n"
        assert (line in capsys.readouterr().out) == reported


def read_values(mask: Path) -> set[int]:
    with Image.open(mask) as image:
        return {value for _, value in image.getcolors()}


def test_schedule_of_a_folder_follows_its_overrides(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*flags: str) -> Any:
        return load_config(FOLDER_CONFIG, "--data-dir", str(folder), "--classes", "12", *flags)

    cfg = load()  # 80,000 x sqrt(5 / 20,210) x 16 / 5 iterations
    assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval, cfg.train_dataloader.batch_size) == (4027, 806, 5)
    assert (cfg.optim_wrapper.optimizer.lr, cfg.param_scheduler[0].end) == (0.003125, 4027)
    assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == 12
    assert cfg.train_dataloader.dataset.pipeline[3].crop_size == (512, 512)
    cfg = load("--cfg-options", "train_cfg.max_iters=100", "auto_scale_lr.base_batch_size=8")
    assert (cfg.train_cfg.val_interval, cfg.train_dataloader.batch_size) == (20, 8)
    assert (cfg.optim_wrapper.optimizer.lr, cfg.param_scheduler[0].end) == (0.005, 100)
    cfg = load("--crop-size", "48", "--cfg-options", "optim_wrapper.optimizer.lr=0", "train_cfg.val_interval=7")
    assert (cfg.optim_wrapper.optimizer.lr, cfg.train_cfg.val_interval) == (0, 7)
    assert cfg.train_dataloader.dataset.pipeline[2].scale == cfg.val_dataloader.dataset.pipeline[1].scale == (192, 48)
    assert cfg.train_dataloader.dataset.pipeline[3].crop_size == cfg.model.data_preprocessor.size == (48, 48)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cfg = load("--gpus", "2")
    assert (cfg.auto_scale_lr.base_batch_size, cfg.train_dataloader.batch_size) == (4, 2)


def test_folder_trains_a_vit(folder: Path, pretrained_vit: Path, tmp_path: Path, capsys: CAPSYS) -> None:
    argv = [str(VIT_FOLDER_CONFIG), str(pretrained_vit), "--data-dir", str(folder), "--classes", "12"]
    argv += ["--work-dir", str(tmp_path / "run"), "--max-val-images", "2"]
    options = ["--cfg-options", *VIT_TINY, "train_cfg.max_iters=1", "train_dataloader.num_workers=0"]
    options += ["val_dataloader.num_workers=0"]
    assert "crop size 40 x 40: not a multiple of the patch size 16" in run_expecting_usage_error(
        train.main, [*argv, "--crop-size", "40", *options], capsys
    )
    train.main([*argv, "--crop-size", "48", *options])
    assert "1 iterations of 5 images, learning rate 1.875e-05" in capsys.readouterr().out
    assert list(read_losses(tmp_path / "run")) == [1]
    assert json.loads((tmp_path / "run/results.json").read_text())["step"] == 1


def test_schedule_of_a_vit_on_a_folder_has_a_warm_up(folder: Path) -> None:
    def load(*options: str) -> Any:
        flags = ["--data-dir", str(folder), "--classes", "12", "--cfg-options", "auto_scale_lr.base_batch_size=4"]
        return load_config(VIT_FOLDER_CONFIG, *flags, *options)

    def intervals(cfg: Any) -> list[tuple[str, int, int]]:
        return [(schedule.type, schedule.begin, schedule.end) for schedule in cfg.param_scheduler]

    cfg = load()  # 40,000 x sqrt(5 / 20,210) x 16 / 4 iterations
    assert (cfg.train_cfg.max_iters, cfg.optim_wrapper.optimizer.lr) == (2517, 1.5e-5)
    assert intervals(cfg) == [("LinearLR", 0, 251), ("PolyLR", 251, 2517)]
    assert intervals(load("train_cfg.max_iters=40000")) == [("LinearLR", 0, 1500), ("PolyLR", 1500, 40000)]
    assert intervals(load("train_cfg.max_iters=19")) == [("PolyLR", 0, 19)]
    assert cfg.optim_wrapper.paramwise_cfg == load_config(VIT_CONFIG).optim_wrapper.paramwise_cfg
    assert cfg.model.backbone == load_config(VIT_CONFIG).model.backbone


def test_image_of_a_folder_is_read_as_it_is_stored(folder: Path, tmp_path: Path) -> None:
    """The mask has the orientation of the stored pixels, not that of the EXIF data."""
    mm_config.import_and_register_mmseg()
    from mmseg.registry import DATASETS

    data = Path(shutil.copytree(folder, tmp_path / "data"))
    exif = Image.Exif()
    exif[274] = 6  # turned by 90 degrees
    Image.open(data / "val/images/0.jpg").save(data / "val/images/0.jpg", exif=exif)
    cfg = load_config(FOLDER_CONFIG, "--data-dir", str(data), "--classes", "12", "--crop-size", "64")
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    item = dataset[0]
    assert item["inputs"].shape == (3, SIZE, SIZE + 16)
    labels = np.array(Image.open(data / "val/masks/0.png"))
    np.testing.assert_array_equal(item["data_samples"].gt_sem_seg.data[0], labels)


def rgb_mask(folder: Path) -> None:
    Image.open(folder / "train/masks/0.png").convert("RGB").save(folder / "train/masks/0.png")


def write_mask(folder: Path, value: int, split: str = "train", name: str = "0", width: int = SIZE + 16) -> None:
    save_image(folder / split / "masks" / f"{name}.png", np.full((SIZE, width), value, dtype=np.uint8))


def fill_masks(folder: Path, value: int, split: str) -> None:
    for mask in (folder / split / "masks").iterdir():
        write_mask(folder, value, split, mask.stem)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


WRONG_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, "data: no such folder"),
    "no_images": (lambda folder: shutil.rmtree(folder / "val/images"), "val/images: no such folder"),
    "no_masks": (lambda folder: shutil.rmtree(folder / "train/masks"), "train/masks: no such folder"),
    "empty_masks": (
        lambda folder: [mask.unlink() for mask in (folder / "train/masks").iterdir()],
        "train/images: no image has a mask of its name",
    ),
    "mask_without_image": (
        lambda folder: (folder / "train/images/1.png").unlink(),
        "masks/1.png: has no image of its name",
    ),
    "rgb_mask": (rgb_mask, "masks/0.png: has 3 channels"),
    "class_too_large": (
        lambda folder: write_mask(folder, 12),
        "masks/0.png: holds the value 12; 12 classes are 0 to 11",
    ),
    "validation_class": (lambda folder: write_mask(folder, 77, "val"), "val/masks/0.png: holds the value 77"),
    "mask_of_other_size": (lambda folder: write_mask(folder, 0, width=9), "a mask needs the size of its image"),
    "damaged_image": (lambda folder: truncate(folder / "train/images/0.jpg"), "images/0.jpg: cannot be read"),
    "damaged_mask": (lambda folder: truncate(folder / "val/masks/2.png"), "cannot be read"),
    "one_class": (lambda folder: fill_masks(folder, 0, "train"), "train/masks: all pixels are 0 or void"),
    "only_void": (lambda folder: fill_masks(folder, 255, "val"), "val/masks: all pixels are void"),
}


@pytest.mark.parametrize("name", WRONG_FOLDERS)
def test_folder_that_cannot_be_trained_on_is_refused(
    name: str, folder: Path, pretrained: Path, tmp_path: Path, capsys: CAPSYS
) -> None:
    change, message = WRONG_FOLDERS[name]
    wrong = Path(shutil.copytree(folder, tmp_path / "data"))
    argv = folder_command(folder, pretrained, tmp_path / "run")
    argv[argv.index("--data-dir") + 1] = str(wrong)
    change(wrong)
    assert message in run_expecting_usage_error(train.main, argv, capsys)
    assert not (tmp_path / "run").exists()


def test_each_file_of_a_folder_is_read_once_with_a_progress_bar(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: CAPSYS
) -> None:
    opened: list[Path] = []

    def record(path: Path) -> Image.Image:
        opened.append(path)
        return read(path)

    read = Image.open
    monkeypatch.setattr(Image, "open", record)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    argv = [str(FOLDER_CONFIG), "none", "--data-dir", str(folder), "--classes", "12"]
    splits = train.load_training_config(train.parse_args(argv))[1]
    assert splits
    folder_files.check_files(*splits, num_classes=12)
    files = [path for path in folder.rglob("*.*") if path.parent.parent.parent == folder]
    assert sorted(opened) == sorted(path for path in files if path.stem != "unlabeled")
    assert "checking files: 100%" in capsys.readouterr().err


def test_image_with_too_many_pixels_is_refused(
    folder: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: CAPSYS
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIZE**2 // 2)
    argv = folder_command(folder, pretrained, tmp_path / "run")
    assert "0.jpg: cannot be read (Image size" in run_expecting_usage_error(train.main, argv, capsys)


def test_file_of_class_names_may_begin_with_a_byte_order_mark(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfcat\r\n\r\n# comment\r\ndog\r\n")
    cfg = load_config(FOLDER_CONFIG, "--data-dir", str(folder), "--classes", str(tmp_path / "classes.txt"))
    assert cfg.val_dataloader.dataset.metainfo.classes == ("cat", "dog")


def test_wrong_flags_of_a_folder_are_one_line(folder: Path, pretrained: Path, tmp_path: Path, capsys: CAPSYS) -> None:
    def error(*flags: str, config: Path = FOLDER_CONFIG) -> str:
        return run_expecting_usage_error(train.main, [str(config), str(pretrained), *flags], capsys)

    data = ("--data-dir", str(folder))
    assert "names no data; to train, add --data-dir and --classes" in error()
    assert "give both or neither" in error(*data)
    assert "is a file; name a folder" in error("--data-dir", str(pretrained), "--classes", "12")
    assert "neither a number nor a file" in error(*data, "--classes", "twelve")
    assert "1 classes; there can be 2 to 255" in error(*data, "--classes", "1")
    (tmp_path / "twice.txt").write_text("cat\ndog\n\ncat\n")
    assert "has 'cat' more than once" in error(*data, "--classes", str(tmp_path / "twice.txt"))
    assert "has its own data" in error(*data, "--classes", "12", config=VOC_CONFIG)
    assert "--crop-size" in error("--crop-size", "64", config=VOC_CONFIG)


def resnet18_weights() -> Weights:
    return {name: value for name, value in resnet18().state_dict().items() if not name.startswith("fc.")}


UNSUITABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "of_resnet34": (
        lambda: resnet34().state_dict(),
        "is a resnet34, and the config's backbone is ResNet18 (layer1.2.bn1.bias has no place in it)",
    ),
    "other_architecture": (
        lambda: resnet18_weights() | {"layer5.weight": torch.zeros(1)},
        "is not a complete ResNet18, the config's backbone (layer5.weight has no place in it)",
    ),
    "not_converted": (
        lambda: {"model": {f"module.encoder_k.{name}": value for name, value in resnet18_weights().items()}},
        "its tensors are not named as mmsegmentation expects; convert it with "
        "transfer/segmentation/convert_pretrain_to_mm.py",
    ),
    "of_torchvision": (lambda: resnet18().state_dict(), "are not named as mmsegmentation expects"),
    "in_an_entry_that_mmengine_does_not_read": (lambda: {"model": resnet18_weights()}, "are not named as"),
    "incomplete": (
        lambda: {name: value for name, value in resnet18_weights().items() if name != "layer4.1.bn2.bias"},
        "layer4.1.bn2.bias is missing",
    ),
    "not_finite": (
        lambda: {"state_dict": resnet18_weights() | {"bn1.bias": torch.full((64,), torch.nan)}},
        "bn1.bias holds values that are not finite",
    ),
}


@pytest.mark.parametrize("name", UNSUITABLE)
def test_weights_other_than_the_backbones_are_refused(name: str, tmp_path: Path, capsys: CAPSYS) -> None:
    make, message = UNSUITABLE[name]
    torch.save(make(), tmp_path / "weights.pth")
    argv = command(VOC_CONFIG, tmp_path / "weights.pth", tmp_path / "run")
    assert message in run_expecting_usage_error(train.main, argv, capsys)
    assert not (tmp_path / "run").exists()


def converted_vit_weights() -> Weights:
    return {mmseg_vit_name(name): value for name, value in vit_weights(0).items() if not name.startswith("head.")}


def patch32_weights() -> Weights:
    with torch.device("meta"):
        network = build_encoder("vit_tiny_patch32_224")
    return random_weights({name: value.shape for name, value in network.state_dict().items()}, 0)


UNSUITABLE_FOR_A_VIT: dict[str, tuple[Callable[[], Any], str]] = {
    "other_patch_size": (
        patch32_weights,
        "is a vit_tiny_patch32_224, and the config's backbone is vit_tiny_patch16_224 (",
    ),
    "of_resnet18": (
        lambda: resnet18().state_dict(),
        "is a resnet18, and the config's backbone is vit_tiny_patch16_224 (",
    ),
    "of_timm": (
        lambda: vit_weights(0),
        "its tensors are not named as mmsegmentation expects; convert it with "
        "transfer/segmentation/convert_pretrain_to_mm.py",
    ),
    "released": (
        lambda: {"state_dict": add_prefix("module.momentum_encoder.", vit_weights(0))},
        "its tensors are not named as mmsegmentation expects; convert it with",
    ),
    "incomplete": (
        lambda: {name: value for name, value in converted_vit_weights().items() if name != "ln1.bias"},
        "is not a complete vit_tiny_patch16_224, the config's backbone (norm.bias is missing)",
    ),
    "not_finite": (
        lambda: {"state_dict": converted_vit_weights() | {"ln1.bias": torch.full((192,), torch.nan)}},
        "ln1.bias holds values that are not finite",
    ),
}


@pytest.mark.parametrize("name", UNSUITABLE_FOR_A_VIT)
def test_weights_other_than_the_vits_are_refused(name: str, tmp_path: Path, capsys: CAPSYS) -> None:
    make, message = UNSUITABLE_FOR_A_VIT[name]
    torch.save(make(), tmp_path / "weights.pth")
    argv = command(VIT_CONFIG, tmp_path / "weights.pth", tmp_path / "run")
    assert message in run_expecting_usage_error(train.main, argv, capsys)
    assert not (tmp_path / "run").exists()


def test_config_and_vit_that_do_not_go_together_are_one_line(
    pretrained_vit: Path, tmp_path: Path, capsys: CAPSYS
) -> None:
    def error(weights: Path, *overrides: str, config: Path = VIT_CONFIG) -> str:
        argv = [*command(config, weights, tmp_path / "run"), *overrides]
        return run_expecting_usage_error(train.main, argv, capsys)

    message = "is a vit_tiny_patch16_224, and the config's backbone is ResNet18 ("
    assert message in error(pretrained_vit, config=VOC_CONFIG)
    message = "model.backbone.num_heads=6: a vit_tiny_patch16_224 has 3; use 3"
    assert message in error(pretrained_vit, "model.backbone.num_heads=6")
    assert "CONFIG: the model cannot be built" in error(pretrained_vit, "model.backbone.num_heads=7")
    message = "crop size 64 x 72: not a multiple of the patch size 16; use one"
    assert message in error(pretrained_vit, "model.data_preprocessor.size=(64,72)")
    message = "crop size 64 x 16: smaller than two patches of 16 pixels; use 32"
    assert message in error(pretrained_vit, "model.data_preprocessor.size=(64,16)")
    message = "model.data_preprocessor.test_cfg.size_divisor=32: not a multiple of two patches of 12 pixels; use 48"
    patches = ["model.backbone.patch_size=12", "model.data_preprocessor.size=(72,72)"]
    assert message in error(pretrained_vit, *patches)
    message = "and the config's backbone is vit_tiny_patch12_224 ("
    assert message in error(pretrained_vit, *patches, "model.data_preprocessor.test_cfg.size_divisor=48")
    convert.main([str(pretrained_vit), str(tmp_path / "d2.pkl")], "detectron2")
    capsys.readouterr()
    assert "a ViT of detectron2, without class token and final norm" in error(tmp_path / "d2.pkl")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("suffix", "target", "message"),
    [(".pkl", "detectron2", "is a detectron2 file"), (".safetensors", "safetensors", "is a safetensors file")],
)
def test_file_for_another_framework_is_refused_with_advice_that_works(
    suffix: str, target: str, message: str, pretrained: Path, tmp_path: Path, capsys: CAPSYS
) -> None:
    path, converted = tmp_path / f"weights{suffix}", tmp_path / "converted.pth"
    convert.main([str(pretrained), str(path)], target)
    capsys.readouterr()
    error = run_expecting_usage_error(train.main, command(VOC_CONFIG, path, tmp_path / "run"), capsys)
    assert f"{message}; convert it with transfer/segmentation/convert_pretrain_to_mm.py {path} OUT.pth" in error
    convert.main([str(path), str(converted)], "mmseg")
    weights = torch.load(converted, weights_only=True)["state_dict"]
    expected = torch.load(pretrained, weights_only=True)["state_dict"]
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


@pytest.mark.parametrize("config", [VOC_CONFIG, VIT_CONFIG], ids=["resnet", "vit"])
def test_backbone_that_mmseg_did_not_load_stops_the_run_before_its_first_iteration(
    config: Path,
    pretrained: Path,
    pretrained_vit: Path,
    tmp_path: Path,
    capsys: CAPSYS,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mmengine.model.weight_init.PretrainedInit.__call__", lambda *_: None)
    monkeypatch.setattr("mmseg.models.backbones.vit.load_state_dict", lambda *_, **__: None)
    with pytest.raises(SystemExit):
        train.main(command(config, pretrained_vit if config == VIT_CONFIG else pretrained, tmp_path / "run"))
    assert "backbone tensors were not loaded from PRETRAINED" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*.pth"))


def test_usage_error_is_one_line_and_writes_nothing(
    pretrained: Path, tmp_path: Path, capsys: CAPSYS, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = command(VOC_CONFIG, pretrained, tmp_path / "run")

    def error(*flags: str, config: Path = VOC_CONFIG) -> str:
        return run_expecting_usage_error(train.main, [str(config), *argv[1:4], *flags], capsys)

    assert "no such config" in error(config=Path("missing.py"))
    (tmp_path / "broken.py").write_text("_base_ = ['missing.py']")
    assert "cannot be read" in error(config=tmp_path / "broken.py")
    assert "KEY=VALUE" in error("--cfg-options", "no_value")
    assert "auto_scale_lr.base_batch_size" in error("--cfg-options", "train_dataloader.batch_size=2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert "0 trains on the CPU" in error("--gpus", "4")
    assert "does not divide over 3 GPUs" in error("--gpus", "3")
    assert "--gpus 0: run mim_dist_train.sh" in error("--gpus", "0")
    monkeypatch.setenv("SEGMENTATION_DATA", str(tmp_path / "missing"))
    assert "link the data" in error()
    assert not (tmp_path / "run").exists()


def test_folder_with_a_run_is_not_overwritten(fine_tuned: Path, pretrained: Path, capsys: CAPSYS) -> None:
    files = sorted(fine_tuned.rglob("*"))
    assert "--resume" in run_expecting_usage_error(train.main, command(VOC_CONFIG, pretrained, fine_tuned), capsys)
    assert sorted(fine_tuned.rglob("*")) == files


def test_checkpoint_with_code_is_refused(pretrained: Path, tmp_path: Path, capsys: CAPSYS) -> None:
    folder, path = tmp_path / "run", tmp_path / "iter_2.pth"
    state = {"state_dict": resnet18_weights(), "meta": {"iter": 2}, "message_hub": CodeInPickle(tmp_path / "executed")}
    torch.save(state, path)
    argv = command(VOC_CONFIG, path, folder)
    for main in (train.main, test.main):
        assert "refused" in run_expecting_usage_error(main, argv, capsys)
    assert not folder.exists()
    folder.mkdir()
    (folder / "last_checkpoint").write_text(str(path))
    argv = command(VOC_CONFIG, pretrained, folder, "--resume")
    assert "--resume" in run_expecting_usage_error(train.main, argv, capsys)
    assert not (tmp_path / "executed").exists()


def test_checkpoint_of_another_model_is_not_evaluated(pretrained: Path, tmp_path: Path, capsys: CAPSYS) -> None:
    path = tmp_path / "iter_2.pth"
    assert "not a checkpoint of a fine-tuning" in run_expecting_usage_error(
        test.main, command(VOC_CONFIG, pretrained, tmp_path / "run"), capsys
    )
    torch.save({"state_dict": resnet18_weights(), "meta": {"iter": 2}}, path)
    argv = command(VOC_CONFIG, path, tmp_path / "run")
    assert "does not fit the config's model" in run_expecting_usage_error(test.main, argv, capsys)
    torch.save({"state_dict": {"weight": torch.tensor(torch.inf)}, "meta": {"iter": 2}}, path)
    assert "weight holds values that are not finite" in run_expecting_usage_error(test.main, argv, capsys)


def test_missing_mmsegmentation_is_reported(capsys: CAPSYS, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mmseg.utils", None)
    error = run_expecting_usage_error(train.main, ["config", "weights"], capsys)
    assert "pip install -r transfer/requirements-segmentation.txt" in error


def test_shell_command_requires_a_number_of_gpus() -> None:
    script = ["bash", str(SEGMENTATION / "mim_dist_train.sh"), "config", "weights", "all"]
    result = subprocess.run(script, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
