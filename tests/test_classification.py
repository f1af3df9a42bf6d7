"""transfer/classification: fine-tuning of an encoder on labeled images."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from tests.checkpoint_data import resnet18_weights, vit_weights, without_classifier
from tests.helpers import make_image, read_metrics, run_expecting_usage_error, run_on_two_ranks
from tests.probe_data import make_inat19
from transfer.classification import classifier_training, finetune
from transfer.classification.accuracy import count_correct, evaluate
from transfer.classification.augmentation import build_mix, build_train_transform, build_val_transform
from transfer.classification.fine_tuning_run import make_fine_tuning_plan
from transfer.classification.image_classifier import (
    build_classifier,
    build_fine_tuning_optimizer,
    load_encoder_weights,
)
from transfer.classification.labeled_files import list_labeled_files
from transfer.classification.labeled_images import NO_LABEL, TrainingImages, ValidationImages, seed_generators
from transfer.encoders import load_encoder, read_encoder
from utils.errors import UsageError

Command = Callable[..., list[str]]


@pytest.fixture(scope="module")
def vit_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vit") / "vit.pth"
    torch.save(vit_weights(0), path)
    return path


@pytest.fixture(scope="module")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two classes, with eight training and seven validation images, which tests only read."""
    root = tmp_path_factory.mktemp("labeled")
    for split, counts in (("train", (4, 4)), ("val", (4, 3))):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for number in range(counts[label]):
                make_image(60, 48, seed=10 * label + number).save(root / split / name / f"{number}.jpg")
    return root


@pytest.fixture(scope="module")
def make_command(vit_checkpoint: Path, labeled: Path) -> Command:
    """The command line of a run of two epochs of two steps each; additional flags as arguments."""

    def command(output: Path, *flags: str) -> list[str]:
        argv = [str(vit_checkpoint), "--data-dir", str(labeled), "--output-dir", str(output), "--device", "cpu"]
        argv += ["--image-size", "32", "--batch-size", "4", "--epochs", "2", "--num-workers", "0", "--base-lr", "0.01"]
        return [*argv, *flags]

    return command


@pytest.fixture(scope="module")
def finished_run(make_command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    finetune.main(make_command(folder))
    return folder


def read_results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


# Model and optimizer


@pytest.mark.parametrize(
    ("arch", "weights", "size", "pool"),
    [
        ("vit_tiny_patch16_224", vit_weights, 64, "avg"),
        ("vit_tiny_patch16_224", vit_weights, 32, "token"),
        ("resnet18", resnet18_weights, 64, "avg"),
    ],
)
def test_all_weights_of_the_encoder_are_loaded_and_its_features_classified(
    arch: str, weights: Callable[[int], dict[str, torch.Tensor]], size: int, pool: str, tmp_path: Path
) -> None:
    expected = without_classifier(weights(0))
    path = tmp_path / "encoder.pth"
    torch.save(weights(0), path)
    model: Any = build_classifier(arch, 5, size, pool).eval()
    load_encoder_weights(model, read_encoder(path).weights)
    state = model.state_dict()
    assert len(state) == len(expected) + 2  # weight and bias of the classifier
    assert all(torch.equal(state[name], value) for name, value in expected.items())

    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    encoder: Any = load_encoder(path)
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)
        logits = model(images)
        reference = encoder.forward_features(images)[:, 0] if pool == "token" else encoder(images).mean(dim=(2, 3))
    torch.testing.assert_close(pooled, reference, rtol=0, atol=1e-5 * reference.abs().max().item())
    assert logits.shape == (2, 5)


def test_an_encoder_of_other_shapes_is_not_loaded() -> None:
    model = build_classifier("resnet18", 5, 64)
    weights = without_classifier(resnet18_weights(0))
    for changed in ({**weights, "layer5.weight": torch.ones(1)}, dict(list(weights.items())[1:])):
        with pytest.raises(RuntimeError, match=r"layer5\.weight|conv1\.weight"):
            load_encoder_weights(model, changed)


def test_learning_rates_decay_by_layer_and_vectors_have_no_weight_decay() -> None:
    model = build_classifier("vit_tiny_patch16_224", 5, 32)
    optimizer = build_fine_tuning_optimizer(model, 0.05, 0.65)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert groups.keys() == set(names.values())
    scales = {
        "head.weight": 1.0,
        "head.bias": 1.0,
        "norm.weight": 0.65,
        "blocks.11.attn.qkv.weight": 0.65,
        "blocks.10.mlp.fc1.bias": 0.4225,
        "blocks.0.norm1.weight": 0.0056880,
        "patch_embed.proj.weight": 0.0036972,
        "pos_embed": 0.0036972,
        "cls_token": 0.0036972,
    }
    for name, scale in scales.items():
        assert groups[name]["lr_scale"] == pytest.approx(scale, rel=1e-4), name
    for name, parameter in model.named_parameters():
        without = parameter.ndim == 1 or name in ("pos_embed", "cls_token")
        assert groups[name]["weight_decay"] == (0 if without else 0.05), name


def test_learning_rate_grows_with_the_batch_warms_up_and_decays_to_almost_zero(make_command: Command) -> None:
    args = finetune.parse_args(make_command(Path("run"), "--base-lr", "5e-4", "--batch-size", "512", "--epochs", "20"))
    plan = make_fine_tuning_plan(args, 5 * 512 + 3)
    assert (plan.peak_lr, plan.steps_per_epoch, plan.total_steps, plan.warmup_steps) == (1e-3, 5, 100, 10)
    assert [plan.lr_at(step) for step in (0, 5, 10)] == pytest.approx([0, 5e-4, 1e-3])
    assert plan.lr_at(100) == pytest.approx(1e-6)
    args.epochs = 100
    assert make_fine_tuning_plan(args, 512).warmup_steps == 5
    args.warmup_epoch = 0
    assert make_fine_tuning_plan(args, 512).lr_at(0) == pytest.approx(1e-3)


# Data


def test_files_of_a_folder_are_listed_by_class(labeled: Path) -> None:
    files = list_labeled_files("folder", labeled, "val")
    assert files.classes == ["cat", "dog"]
    assert list(files.labels) == [0, 0, 0, 0, 1, 1, 1]
    assert files.files[4] == os.path.join("val", "dog", "0.jpg")
    limited = files.limit(3)
    assert (limited.files[2], list(limited.labels)) == (os.path.join("val", "dog", "0.jpg"), [0, 0, 1])
    assert len(files.limit(None).files) == 7


def test_files_of_inaturalist_are_listed_by_its_json_files(tmp_path: Path) -> None:
    make_inat19(tmp_path)
    files = list_labeled_files("inat19", tmp_path, "train")
    assert files.classes == ["7", "30"]
    assert [name[-5:] for name in files.files] == ["b.jpg", "c.jpg", "a.jpg"]
    assert list(files.labels) == [0, 0, 1]
    sample = ValidationImages(files, build_val_transform(32))[2]
    assert (sample.image.shape, sample.label) == ((3, 32, 32), 1)


def test_augmentation_depends_on_seed_epoch_and_image_only(labeled: Path, make_command: Command) -> None:
    files = list_labeled_files("folder", labeled, "train")
    transform = build_train_transform(finetune.parse_args(make_command(Path("run"))))
    images = TrainingImages(files, transform, seed=0)
    first = images[3].image
    torch.manual_seed(1)
    assert torch.equal(images[3].image, first)
    assert not torch.equal(images[8 + 3].image, first)
    assert not torch.equal(TrainingImages(files, transform, seed=1)[3].image, first)
    assert (images[8 + 5].index, images[8 + 5].label) == (5, 1)


def test_operations_of_randaugment_work_at_their_largest_magnitude(make_command: Command) -> None:
    args = finetune.parse_args(make_command(Path("run"), "--auto-augment", "rand-m10-n20-p1.0-inc1"))
    transform, image = build_train_transform(args), make_image(40, 30)
    for number in range(5):
        seed_generators(number)
        assert transform(image).isfinite().all()


def test_damaged_images_are_replaced_in_training_and_wrong_in_validation(labeled: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(labeled, tmp_path / "damaged"))
    damaged = [root / split / "cat" / "3.jpg" for split in ("train", "val")]
    for path in damaged:
        path.write_bytes(b"no image")
    transform = build_val_transform(32)
    sample = TrainingImages(list_labeled_files("folder", root, "train"), transform, seed=0)[3]
    assert (sample.label, sample.unreadable) == (1, (str(damaged[0]),))  # the next image is a dog
    sample = ValidationImages(list_labeled_files("folder", root, "val"), transform)[3]
    assert (sample.label, sample.unreadable) == (NO_LABEL, (str(damaged[1]),))
    assert count_correct(torch.eye(2), torch.tensor([0, NO_LABEL])).tolist() == [1, 1]


def test_many_unreadable_training_images_in_a_row_stop_the_run(
    labeled: Path, make_command: Command, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(labeled, tmp_path / "damaged"))
    for path in (root / "train").glob("*/*.jpg"):
        path.write_bytes(b"no image")
    args = finetune.parse_args(make_command(tmp_path / "run", "--data-dir", str(root)))
    with pytest.raises(UsageError, match=r"^--data-dir: 20 images in a row cannot be read, as .*\.jpg; repair them$"):
        finetune.fine_tune(args)


# Targets and accuracy


@pytest.mark.parametrize("flags", [("--cutmix", "0"), ("--mixup", "0"), ()], ids=["mixup", "cutmix", "both"])
def test_targets_are_mixed_as_the_images_are(flags: tuple[str, ...], make_command: Command) -> None:
    """With images filled with their label, the mean of a mixed image is the weight of class 1 in its target."""
    mix = build_mix(finetune.parse_args(make_command(Path("run"), "--label-smoothing", "0", *flags)), 3)
    labels = torch.tensor([0, 1, 1, 1])
    np.random.seed(0)
    for _ in range(10):
        images, targets = mix(labels.float().view(4, 1, 1, 1).repeat(1, 3, 16, 16), labels)
        torch.testing.assert_close(images.mean(dim=(1, 2, 3)), targets[:, 1], rtol=0, atol=1e-5)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(4))
        assert (targets[:, 2] == 0).all()


def test_targets_without_mixing_are_smoothed(make_command: Command) -> None:
    flags = ("--mixup", "0", "--cutmix", "0", "--label-smoothing", "0.2")
    mix = build_mix(finetune.parse_args(make_command(Path("run"), *flags)), 4)
    images, targets = mix(torch.ones(1, 3, 2, 2), torch.tensor([1]))
    assert torch.equal(images, torch.ones(1, 3, 2, 2))
    assert targets.tolist() == [pytest.approx([0.05, 0.85, 0.05, 0.05])]


@pytest.mark.parametrize("num_classes", [2, 5, 12])
def test_correct_predictions_are_counted_as_by_a_loop(num_classes: int) -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(40, num_classes)), rng.integers(num_classes, size=40)
    top1 = top5 = 0
    for row, label in zip(logits, labels):
        position = sum(value > row[label] for value in row)
        top1 += position < 1
        top5 += position < 5
    counts = count_correct(torch.from_numpy(logits), torch.from_numpy(labels))
    assert counts.tolist() == [top1, top5]


def test_logits_that_are_not_numbers_are_no_prediction() -> None:
    logits = torch.tensor([[torch.nan, 0.0, 1.0], [0.0, torch.nan, 1.0], [0.0, 2.0, 1.0]])
    assert count_correct(logits, torch.tensor([0, 2, 1])).tolist() == [1, 1]


# Runs


def test_a_run_finishes_and_writes_its_results(finished_run: Path) -> None:
    results = read_results(finished_run)
    assert (results["epoch"], results["epochs"], results["images"]) == (2, 2, {"train": 8, "val": 7})
    assert results["top1"] in [pytest.approx(100 * count / 7) for count in range(8)]
    assert results["top5"] == 100
    assert results["recipe"]["layer_decay"] == 0.65
    assert results["pretrained"]["source"] == "vit.pth"
    metrics = read_metrics(finished_run)[-1]
    assert (metrics["step"], metrics["val/top1"]) == (4, results["top1"])
    assert np.isfinite(metrics["loss"])
    groups = torch.load(finished_run / "current.pth", weights_only=True)["optimizer"]["param_groups"]
    assert len({group["lr_scale"] for group in groups}) == 14
    assert all(group["lr"] == metrics["optim/lr"] * group["lr_scale"] for group in groups)
    text = (finished_run / "log.txt").read_text()
    assert "all 150 tensors loaded" in text
    assert f"epoch 2: top-1 {results['top1']:.2f} %" in text


def evaluation_command(checkpoint: Path, data: Path, output: Path, *flags: str) -> list[str]:
    """Return the arguments of an evaluation of a checkpoint that a fine-tuning saved."""
    argv = [str(checkpoint), "--eval-only", "--data-dir", str(data), "--output-dir", str(output)]
    return [*argv, "--device", "cpu", "--num-workers", "0", *flags]


def test_the_saved_model_is_evaluated_alone(finished_run: Path, labeled: Path, tmp_path: Path) -> None:
    finetune.main(evaluation_command(finished_run / "current.pth", labeled, tmp_path / "evaluation"))
    assert read_results(tmp_path / "evaluation")["top1"] == read_results(finished_run)["top1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "not one that a fine-tuning saved"),
        ({"epoch": None}, "not one that a fine-tuning saved"),
        ({"head.bias": torch.tensor([torch.nan, 0.0])}, "head.bias holds values that are not finite"),
        ({"head.bias": torch.zeros(3)}, r"head.bias is (3,) and should be (2,)"),
    ],
)
def test_a_damaged_fine_tuning_is_not_evaluated(
    change: dict[str, Any],
    message: str,
    finished_run: Path,
    labeled: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = torch.load(finished_run / "current.pth", weights_only=True)
    model = {**state["model"], **{name: value for name, value in change.items() if "." in name}}
    state = {**state, "model": model, **{name: value for name, value in change.items() if "." not in name}}
    torch.save({name: value for name, value in state.items() if value is not None}, tmp_path / "in.pth")
    argv = evaluation_command(tmp_path / "in.pth", labeled, tmp_path / "evaluation")
    assert message in run_expecting_usage_error(finetune.main, argv, capsys)
    assert not (tmp_path / "evaluation").exists()


def test_a_resumed_run_equals_the_uninterrupted_one(finished_run: Path, make_command: Command, tmp_path: Path) -> None:
    """Bit for bit, also if the interrupted run had got further than its last checkpoint, and with other workers."""
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copy(finished_run / "ckpt_epoch_1.pth", resumed / "current.pth")
    shutil.copy(finished_run / "metrics.jsonl", resumed)
    finetune.main(make_command(resumed, "--auto-resume", "--num-workers", "1"))
    states = [torch.load(folder / "current.pth", weights_only=True) for folder in (finished_run, resumed)]
    for part in ("model", "optimizer", "epoch"):
        torch.testing.assert_close(states[1][part], states[0][part], rtol=0, atol=0)
    assert read_results(resumed)["top1"] == read_results(finished_run)["top1"]
    assert "resumed after epoch 1" in (resumed / "log.txt").read_text()


def test_a_finished_run_without_results_is_evaluated_again(
    finished_run: Path, make_command: Command, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(finished_run / "current.pth", tmp_path / "run")
    finetune.main(make_command(tmp_path / "run", "--auto-resume"))
    assert read_results(tmp_path / "run")["top1"] == read_results(finished_run)["top1"]
    assert "nothing left to train" in (tmp_path / "run" / "log.txt").read_text()


def fine_tune_on_rank(argv: list[str]) -> dict[str, Any]:
    """Fine-tune in a process group that exists, and return what this rank evaluated."""
    seen = {}

    def record(model: torch.nn.Module, images: ValidationImages, *args: Any) -> Any:
        read: list[int] = []
        original = ValidationImages.__getitem__
        with patch.object(ValidationImages, "__getitem__", lambda self, i: (read.append(i), original(self, i))[1]):
            accuracy = evaluate(model, images, *args)
        seen.update(images=read, top1=accuracy.top1, mean=model.state_dict()["bn1.running_mean"].clone())
        return accuracy

    with (
        patch.object(classifier_training, "evaluate", record),
        patch("utils.distributed.initialize"),
        patch("utils.distributed.shutdown"),
    ):
        finetune.main(argv)
    return seen


def test_two_processes_evaluate_every_image_once(make_command: Command, labeled: Path, tmp_path: Path) -> None:
    torch.save(resnet18_weights(0), tmp_path / "resnet18.pth")
    argv = [str(tmp_path / "resnet18.pth"), *make_command(tmp_path / "run", "--epochs", "1", "--batch-size", "8")[1:]]
    first, second = run_on_two_ranks(fine_tune_on_rank, argv)
    assert (first["images"], second["images"]) == ([0, 2, 4, 6], [1, 3, 5])
    torch.testing.assert_close(first["mean"], second["mean"], rtol=0, atol=0)
    results = read_results(tmp_path / "run")
    assert (results["images"]["val"], results["top1"]) == (7, first["top1"])
    finetune.main(evaluation_command(tmp_path / "run/current.pth", labeled, tmp_path / "one"))
    assert read_results(tmp_path / "one")["top1"] == first["top1"] == second["top1"]


# Bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image-size", "40"], "--image-size 40: not a multiple of the patch size 16"),
        (["--batch-size", "10"], "--batch-size 10: more than the 8 training images"),
        (["--batch-size", "5"], "need an even number of images"),
        (["--warmup-epoch", "2"], "--warmup-epoch 2: not less than --epochs 2"),
        (["--auto-augment", "tuned"], "--auto-augment tuned: timm has no such policy"),
        (["--encoder", "student"], "no student in it"),
        (["--data-dir", "/nowhere"], "--data-dir /nowhere: no such folder"),
        (["--dataset", "inat19"], "needs the file train2019.json"),
        (["--eval-only"], "--eval-only does not use --image-size, --epochs, --base-lr; omit them"),
        (["--resume", "/nowhere.pth"], "--resume /nowhere.pth: no such file"),
    ],
)
def test_bad_flags_are_one_line(
    flags: list[str], message: str, make_command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in run_expecting_usage_error(finetune.main, make_command(tmp_path / "run", *flags), capsys)
    assert not (tmp_path / "run").exists()


def test_a_run_is_neither_overwritten_nor_changed(
    finished_run: Path, make_command: Command, labeled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run.iterdir()}
    other = Path(shutil.copytree(labeled, tmp_path / "other"))
    for split in ("train", "val"):
        (other / split / "cat").rename(other / split / "bird")
    expected = {
        (): "holds a run",
        ("--auto-resume", "--base-lr", "1"): "--base-lr 0.01 -> 1.0",
        ("--auto-resume", "--data-dir", str(other)): "changes that affect the result",
    }
    for flags, message in expected.items():
        line = run_expecting_usage_error(finetune.main, make_command(finished_run, *flags), capsys)
        assert message in line
    saved = finished_run / "current.pth"
    evaluations = {
        (labeled, finished_run): "already has results",
        (other, tmp_path / "evaluation"): "use the data that it was trained on",
    }
    for (data, output), message in evaluations.items():
        assert message in run_expecting_usage_error(finetune.main, evaluation_command(saved, data, output), capsys)
    assert {path: path.stat().st_mtime_ns for path in finished_run.iterdir()} == before


def _remove_class(root: Path) -> None:
    shutil.rmtree(root / "val" / "dog")


def _empty_class(root: Path) -> None:
    for path in (root / "train" / "dog").iterdir():
        path.unlink()


def _remove_classes(root: Path) -> None:
    shutil.rmtree(root / "train" / "dog")
    shutil.rmtree(root / "train" / "cat")


def _remove_split(root: Path) -> None:
    shutil.rmtree(root / "val")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_remove_class, "only the train split has the class dog"),
        (_empty_class, "dog: no images in it"),
        (_remove_classes, "no class folders in it"),
        (_remove_split, "val: no such folder"),
    ],
)
def test_incomplete_folders_are_one_line(
    change: Callable[[Path], None],
    message: str,
    labeled: Path,
    make_command: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = Path(shutil.copytree(labeled, tmp_path / "incomplete"))
    change(root)
    argv = make_command(tmp_path / "run", "--data-dir", str(root))
    assert message in run_expecting_usage_error(finetune.main, argv, capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ('{"images": [{"id": 1, "file_name": "a"}], "annotations": []}', "is damaged"),
        ('{"images": [], "annotations": []}', "names no images"),
        (
            '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "category_id": 2}]}',
            "names a.jpg, which is missing",
        ),
    ],
)
def test_damaged_json_files_are_one_line(
    content: str, message: str, make_command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train2019.json").write_text(content)
    argv = make_command(tmp_path / "run", "--dataset", "inat19", "--data-dir", str(tmp_path))
    assert message in run_expecting_usage_error(finetune.main, argv, capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--global-pool", "token"], "--global-pool token: a resnet18 has no class token"),
        (
            ["--batch-size", "1", "--mixup", "0", "--cutmix", "0"],
            "--batch-size 1: batch norm needs at least two images",
        ),
    ],
)
def test_a_resnet_has_no_class_token_and_needs_two_images_in_a_batch(
    flags: list[str], message: str, make_command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(resnet18_weights(0), tmp_path / "resnet18.pth")
    argv = [str(tmp_path / "resnet18.pth"), *make_command(tmp_path / "run", *flags)[1:]]
    assert message in run_expecting_usage_error(finetune.main, argv, capsys)


def test_a_vit_needs_no_second_image_in_a_batch(make_command: Command) -> None:
    args = finetune.parse_args(make_command(Path("run"), "--batch-size", "1", "--mixup", "0", "--cutmix", "0"))
    args.arch = "vit_tiny_patch16_224"
    assert make_fine_tuning_plan(args, 8).steps_per_epoch == 8


def test_a_checkpoint_of_pre_training_is_not_evaluated(
    vit_checkpoint: Path, labeled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = evaluation_command(vit_checkpoint, labeled, tmp_path / "evaluation")
    assert "not one that a fine-tuning saved" in run_expecting_usage_error(finetune.main, argv, capsys)
