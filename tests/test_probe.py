"""Segmentation probes: metrics, classifiers, dataset layouts, the feature cache, the commands and their errors."""

import argparse
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import jaccard_score
from torch import Tensor, nn

import utils.checkpoint
from data import demo
from data.datasets import build_dataset
from data.demo import render_scene
from tests.helpers import run_expecting_usage_error
from tests.probe_data import VOID, make_folder, save_checkpoint, save_vit_checkpoint, write_image
from tests.reference import segmentation_scores as reference
from transfer.encoders import build_frozen_encoder, untrained_encoder
from transfer.probe import (
    cocostuff,
    knn_segmentation,
    labeled_features,
    linear_segmentation,
    segmentation_probe,
    unsupervised_segmentation,
)
from transfer.probe.knn_segmentation import KNNIndex
from transfer.probe.labeled_features import LAYOUTS, LabeledFeatures, SegmentationDataset, extract_features
from transfer.probe.linear_segmentation import fit_linear
from transfer.probe.prediction_figure import draw_predictions
from transfer.probe.segmentation_probe import ProbeRun, compute_scores, confusion_matrix, dataset_confusion
from transfer.probe.unsupervised_segmentation import (
    cosine_similarity,
    fit_kmeans,
    match_majority,
    match_one_to_one,
    merge_clusters,
)
from utils.errors import UsageError

CPU = torch.device("cpu")
PROBES = {"linear": linear_segmentation, "knn": knn_segmentation, "unsupervised": unsupervised_segmentation}
SMALL = ["--size", "64", "--device", "cpu", "--num-workers", "0"]
PROBE_FLAGS = {"linear": ["--steps", "20"], "knn": ["--memory", "50"], "unsupervised": ["--clusters", "3"]}
Array = np.ndarray[Any, np.dtype[Any]]
properties = settings(deadline=None, max_examples=60, derandomize=True)


# Metrics


@st.composite
def label_pairs(draw: st.DrawFn) -> tuple[Array, Array, int, int]:
    """Labels with void, predictions, and the numbers of classes and of outputs; some occur nowhere."""
    classes, outputs = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    labels = st.one_of(st.integers(0, classes - 1), st.just(VOID))
    pairs = draw(st.lists(st.tuples(labels, st.integers(0, outputs - 1)), max_size=40))
    return *np.array(pairs, dtype=np.int64).reshape(-1, 2).T, classes, outputs


@properties
@given(label_pairs())
def test_confusion_matrix_equals_loops(pair: tuple[Array, Array, int, int]) -> None:
    labels, predictions, classes, outputs = pair
    confusion = confusion_matrix(labels.astype(np.uint8), predictions, classes, outputs)
    assert np.array_equal(confusion, reference.confusion(labels, predictions, classes, outputs))


@properties
@given(label_pairs())
def test_iou_and_accuracy_equal_loops_and_scikit_learn(pair: tuple[Array, Array, int, int]) -> None:
    labels, predictions, classes, _ = pair
    predictions %= classes
    scores = compute_scores(confusion_matrix(labels, predictions, classes, classes))
    ious = reference.ious(labels, predictions, classes)
    np.testing.assert_allclose(scores.iou, ious)
    np.testing.assert_allclose(scores.miou, reference.mean(ious))
    np.testing.assert_allclose(scores.accuracy, reference.accuracy(labels, predictions))
    valid = labels != VOID
    assume(valid.any())
    present = sorted({*labels[valid].tolist(), *predictions[valid].tolist()})
    expected = jaccard_score(labels[valid], predictions[valid], labels=present, average="macro", zero_division=0)
    assert scores.miou == pytest.approx(100 * expected)


def test_predicted_but_absent_class_counts_as_zero_iou_and_unused_class_not_at_all() -> None:
    labels, predictions = np.array([0, 0, 1, 1, VOID]), np.array([0, 0, 1, 2, 3])
    scores = compute_scores(confusion_matrix(labels, predictions, 4, 4))
    np.testing.assert_allclose(scores.iou, [100, 50, 0, np.nan])
    assert (scores.miou, scores.accuracy) == (50, 75)


def test_only_void_labels_give_nan_scores() -> None:
    scores = compute_scores(confusion_matrix(np.full(9, VOID), np.zeros(9, dtype=np.int64), 3, 3))
    assert np.isnan([scores.miou, scores.accuracy, *scores.iou]).all()


def test_uint8_labels_do_not_overflow_with_many_clusters() -> None:
    labels, predictions = np.array([26, 26, 3], dtype=np.uint8), np.array([2047, 2047, 1000])
    confusion = confusion_matrix(labels, predictions, 27, 2048)
    assert (confusion[26, 2047], confusion[3, 1000], confusion.sum()) == (2, 1, 3)


@properties
@given(label_pairs())
def test_hungarian_matching_is_one_to_one_and_maximizes_correct_pixels(pair: tuple[Array, Array, int, int]) -> None:
    labels, predictions, classes, clusters = pair
    confusion = confusion_matrix(labels, predictions, classes, clusters)
    matched = match_one_to_one(confusion)
    assigned = matched[matched >= 0].tolist()
    assert len(assigned) == len(set(assigned)) == min(classes, clusters)
    correct = sum(int(confusion[label, cluster]) for cluster, label in enumerate(matched) if label >= 0)
    assert correct == reference.most_correct(confusion)


@properties
@given(label_pairs())
def test_majority_matching_takes_the_most_frequent_class(pair: tuple[Array, Array, int, int]) -> None:
    labels, predictions, classes, clusters = pair
    matched = match_majority(confusion_matrix(labels, predictions, classes, clusters))
    for cluster, label in enumerate(matched):
        members = [int(value) for value in labels[predictions == cluster] if value != VOID]
        expected = max(map(members.count, range(classes)))
        assert members.count(int(label)) == expected if members else label == -1


@properties
@given(label_pairs())
def test_merged_clusters_score_as_relabeled_pixels_do(pair: tuple[Array, Array, int, int]) -> None:
    labels, predictions, classes, clusters = pair
    confusion = confusion_matrix(labels, predictions, classes, clusters)
    matched = match_one_to_one(confusion)
    relabeled = np.where(matched < 0, classes, matched)[predictions]
    scores = compute_scores(merge_clusters(confusion, matched))
    np.testing.assert_allclose(scores.iou, reference.ious(labels, relabeled, classes))
    np.testing.assert_allclose(scores.accuracy, reference.accuracy(labels, relabeled))


# Features and classifiers


def as_features(maps: Array, labels: Array) -> LabeledFeatures:
    return LabeledFeatures(maps.astype(np.float16), labels.astype(np.uint8))


def one_hot(labels: Array, classes: int, side: int = 1) -> LabeledFeatures:
    """Features that equal the one-hot labels (N, h, w) of their positions, each `side` pixels wide; zero for void."""
    return as_features(np.eye(VOID + 1)[labels][..., :classes], labels.repeat(side, axis=1).repeat(side, axis=2))


def blobs(seed: int = 0) -> LabeledFeatures:
    """Three classes 8 standard deviations apart, in channels of very different scales; the last one is constant."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=(5, 20, 20))
    maps = rng.normal(size=(*labels.shape, 4)) + 6 * np.eye(4)[labels]
    maps[..., 3] = 7
    return as_features(maps * [100, 1, 0.01, 1] + [1000, 0, 0, 0], labels)


@properties
@given(st.integers(1, 11), st.data())
def test_soft_labels_equal_loops(size: int, data: st.DataObject) -> None:
    height, width = (data.draw(st.integers(1, size)) for _ in range(2))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    labels = rng.choice([0, 1, 2, VOID], (2, size, size))
    soft_labels = as_features(np.zeros((2, height, width, 1)), labels).soft_labels(4)
    # float32 against float64: one rounding of a share of at most 1
    np.testing.assert_allclose(soft_labels, reference.soft_labels(labels, height, width, 4), atol=1.2e-7)


@pytest.mark.parametrize(
    "features",
    [
        one_hot(np.random.default_rng(0).choice([0, 1, 2, 3, VOID], (6, 12, 12)), 4),
        # Rows of one class: bilinear interpolation moves no border where positions of 4 pixels meet.
        one_hot(np.random.default_rng(1).choice([0, 1, 2, 3], (6, 8, 1)).repeat(8, axis=2), 4, side=4),
    ],
    ids=["one pixel per position", "4 x 4 pixels per position"],
)
def test_perfect_features_score_100_in_every_probe(features: LabeledFeatures) -> None:
    classifier = fit_linear(features, 4, steps=150, lr=0.05, seed=0, device=CPU)
    index = KNNIndex.build(features, 4, 1000, 5, 0.02, 0, CPU)
    for predictor in (classifier, index):
        scores = compute_scores(dataset_confusion(features, predictor, 4))
        assert (scores.miou, scores.accuracy, scores.iou) == (100, 100, (100,) * 4)
    permuted = torch.eye(4)[[2, 0, 3, 1]]
    for centers in (permuted, torch.cat([permuted, -torch.eye(4)])):
        confusion = dataset_confusion(features, partial(cosine_similarity, centers), 4, len(centers))
        assert match_one_to_one(confusion)[:4].tolist() == [2, 0, 3, 1]
        for match in (match_one_to_one, match_majority):
            scores = compute_scores(merge_clusters(confusion, match(confusion)))
            assert (scores.miou, scores.accuracy) == (100, 100)


@pytest.mark.parametrize("void_rows", [0, 5])
def test_linear_probe_standardizes_channels_separates_blobs_and_is_reproducible(void_rows: int) -> None:
    features = blobs()
    features.labels[:, :void_rows] = VOID
    classifier = fit_linear(features, 3, steps=200, lr=0.05, seed=0, device=CPU)
    assert compute_scores(dataset_confusion(blobs(1), classifier, 3)).accuracy > 99
    positions = features.maps.reshape(-1, 4).astype(np.float64)
    np.testing.assert_allclose(classifier.mean, positions.mean(axis=0), rtol=2.4e-7)  # rounded to float32
    # The squares of channel 0, mean 1200 and deviation 300, lose 5 bits of float64.
    np.testing.assert_allclose(classifier.scale[:3], 1 / positions.std(axis=0)[:3], rtol=1e-5)
    assert classifier.scale[3] == 0
    again, other = (fit_linear(features, 3, steps=200, lr=0.05, seed=seed, device=CPU) for seed in (0, 1))
    assert torch.equal(classifier.weight, again.weight)
    assert not torch.equal(classifier.weight, other.weight)


def test_linear_probe_learns_the_soft_labels_of_mixed_positions() -> None:
    """A quarter of the 4 x 4 pixels of one kind of position is of class 0, and three quarters of the other kind."""
    kinds = np.random.default_rng(0).integers(2, size=(4, 6, 6))
    rows = np.arange(24)[:, None] % 4
    labels = np.where(rows < np.where(kinds, 3, 1).repeat(4, axis=1).repeat(4, axis=2), 0, 1)
    classifier = fit_linear(as_features(np.eye(2)[kinds], labels), 2, steps=300, lr=0.05, seed=0, device=CPU)
    soft_labels = classifier(torch.eye(2)[:, :, None]).softmax(dim=0)[0, :, 0]
    torch.testing.assert_close(soft_labels, torch.tensor([0.25, 0.75]), atol=0.01, rtol=0)


@pytest.mark.parametrize("neighbors", [1, 4, 200])
def test_knn_votes_equal_loops(neighbors: int) -> None:
    rng = np.random.default_rng(0)
    train = as_features(rng.normal(size=(3, 4, 4, 5)), rng.choice([0, 1, 2, VOID], (3, 8, 8)))
    soft_labels = reference.soft_labels(train.labels, 4, 4, 3).reshape(-1, 3)
    labeled = soft_labels.sum(axis=1) > 0
    index = KNNIndex.build(train, 3, 1000, neighbors, 0.1, 0, CPU)
    assert len(index.keys) == labeled.sum()
    keys = train.maps.reshape(-1, 5).astype(np.float64)[labeled]
    positions = rng.normal(size=(5, 2, 3))
    votes = index(torch.from_numpy(positions).float())
    for y, x in np.ndindex(2, 3):
        expected = reference.votes(positions[:, y, x], keys, soft_labels[labeled], neighbors, 0.1)
        # float32 cosines are off by about 5 eps, which the temperature multiplies by 10
        np.testing.assert_allclose(votes[:, y, x], expected, atol=2e-5)


def test_knn_index_draws_distinct_labeled_positions_by_its_seed() -> None:
    labels = np.random.default_rng(0).choice([0, 1, 2, VOID], (4, 6, 6))
    numbers = np.stack([np.cos(np.arange(144)), np.sin(np.arange(144))], axis=1).reshape(4, 6, 6, 2)
    first, again, other = (KNNIndex.build(as_features(numbers, labels), 3, 20, 3, 0.1, s, CPU) for s in (0, 0, 1))
    assert len(first.keys.unique(dim=0)) == 20
    assert (first.soft_labels.sum(dim=1) == 1).all()
    assert torch.equal(first.keys, again.keys)
    assert not torch.equal(first.keys, other.keys)


def test_kmeans_finds_blobs_by_direction_and_is_reproducible() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=(5, 8, 8))
    directions = np.linalg.qr(rng.normal(size=(6, 6)))[0][:4]
    # The lengths vary so much that k-means on Euclidean distances would split the first class.
    lengths = np.where(labels == 0, 100, 1)[..., None] * rng.uniform(0.3, 1, size=(*labels.shape, 1))
    features = as_features(lengths * (directions[labels] + 0.05 * rng.normal(size=(*labels.shape, 6))), labels)
    centers = fit_kmeans(features, 4, seed=3)
    cosines = torch.from_numpy(directions).float() @ centers.T
    assert (cosines.amax(dim=1) > 0.98).all()
    assert sorted(cosines.argmax(dim=1).tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(centers, fit_kmeans(features, 4, seed=3))


# Datasets

LAYOUT_FILES = {  # images, masks, splits, values of a mask, its labels, number of classes
    "folder": ("{}/images/{}.png", "{}/masks/{}.png", ("train", "val"), [0, 1, 2, 255], [0, 1, 2, VOID], 3),
    "ade20k": (
        *("images/{}/{}.jpg", "annotations/{}/{}.png", ("training", "validation")),
        *([0, 1, 2, 150], [VOID, 0, 1, 149], 150),
    ),
    "voc": ("JPEGImages/{1}.jpg", "SegmentationClass/{1}.png", ("train", "val"), [0, 1, 20, 255], [0, 1, 20, VOID], 21),
    "cityscapes": (
        *("leftImg8bit/{}/{}_leftImg8bit.png", "gtFine/{}/{}_gtFine_labelTrainIds.png", ("train", "val")),
        *([0, 1, 18, 255], [0, 1, 18, VOID], 19),
    ),
    "coco-stuff-27": (
        *("{}2017/{}.jpg", "semantic27/{}2017/{}.png", ("train", "val")),
        *([0, 1, 26, 255], [0, 1, 26, VOID], 27),
    ),
    "camvid": ("{}/{}.png", "{}annot/{}.png", ("train", "val"), [0, 1, 10, 11], [0, 1, 10, VOID], 11),
}
LAYOUT_NAMES = (("a/x", "b"), ("c",))


def make_layout(root: Path, layout: str) -> None:
    """Write two training images and a validation image of 4 x 4 pixels with their masks, and unpaired files."""
    images, masks, splits, values, _, _ = LAYOUT_FILES[layout]
    for split, names in zip(splits, LAYOUT_NAMES):
        for name in names:
            write_image(root / images.format(split, name), np.zeros((4, 4, 3)))
            mask = write_image(root / masks.format(split, name), np.kron(np.reshape(values, (2, 2)), np.ones((2, 2))))
            if layout == "voc":  # is published with a palette
                with_palette = Image.open(mask)
                with_palette.putpalette([value for value in range(256) for _ in range(3)])
                with_palette.save(mask)
        write_image(root / images.format(split, "without_mask"), np.zeros((4, 4, 3)))
        write_image(root / masks.format(split, "without_image"), [[0]])
        if layout == "voc":
            (root / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
            (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names) + "\n")


@pytest.mark.parametrize("layout", LAYOUT_FILES)
def test_layout_gives_its_pairs_and_labels(layout: str, tmp_path: Path) -> None:
    make_layout(tmp_path, layout)
    images, _, splits, _, labels, num_classes = LAYOUT_FILES[layout]
    for split, split_name, names in zip(("train", "val"), splits, LAYOUT_NAMES):
        dataset = SegmentationDataset(layout, tmp_path, split, size=4)
        assert [image for image, _ in dataset.pairs] == [tmp_path / images.format(split_name, name) for name in names]
        assert len(set(dataset.classes)) == len(dataset.classes) == num_classes
        for number in range(len(dataset)):
            pixels, mask = dataset[number]
            assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 4, 4))
            assert np.array_equal(mask, np.kron(np.reshape(labels, (2, 2)), np.ones((2, 2))))


def test_class_names_are_at_their_published_indices() -> None:
    voc, cityscapes = LAYOUTS["voc"].classes, LAYOUTS["cityscapes"].classes
    assert [voc[n] for n in (0, 1, 7, 12, 15, 20)] == ["background", "aeroplane", "car", "dog", "person", "tvmonitor"]
    assert [cityscapes[n] for n in (0, 2, 10, 13, 18)] == ["road", "building", "sky", "car", "bicycle"]
    assert [LAYOUTS["camvid"].classes[n] for n in (0, 3, 10)] == ["sky", "road", "bicyclist"]


def test_demo_layout_draws_its_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "make_demo", partial(demo.make_demo, train=2, val=2))
    train, val = (SegmentationDataset("demo", tmp_path, split, size=120) for split in ("train", "val"))
    assert (len(train), len(val), train.classes) == (2, 2, demo.CLASSES)
    pixels, mask = render_scene(0, "val", 1)
    image, labels = val[1]
    assert np.array_equal(labels, mask[:, 20:140])
    difference = image.permute(1, 2, 0).numpy().astype(int) - pixels[:, 20:140]
    assert abs(difference).mean() < 6  # JPEG


@pytest.mark.parametrize("size", [72, 64, 50, 31])
def test_center_square_of_image_and_labels_is_resized_alike(size: int, tmp_path: Path) -> None:
    """The image shows the labels as gray levels, so that a shift by one pixel has fewer equal pixels."""
    _, mask = render_scene(0, "train", 0, 96, 72)
    write_image(tmp_path / "val/images/a.png", np.repeat(20 * mask[..., None], 3, axis=2))
    write_image(tmp_path / "val/masks/a.png", mask)
    image, labels = SegmentationDataset("folder", tmp_path, "val", size)[0]
    assert set(labels.unique().tolist()) <= set(mask[:, 12:84].ravel().tolist())
    if size == 72:
        assert np.array_equal(labels, mask[:, 12:84])
    shown = (image[0].float() / 20).round().long()
    equal = (shown == labels).sum()
    assert all((shown.roll(shift, (0, 1)) == labels).sum() < equal for shift in ((0, 1), (1, 0), (0, -1), (-1, 0)))


def test_val_list_restricts_the_split_and_both_splits_give_classes(tmp_path: Path) -> None:
    for split, largest in (("train", 2), ("val", 4)):
        for name in "abc":
            write_image(tmp_path / split / f"images/{name}.png", np.zeros((2, 2, 3)))
            write_image(tmp_path / split / f"masks/{name}.png", [[0, 1], [largest, 255]])
    (tmp_path / "list.txt").write_text("c\na\n")
    train = SegmentationDataset("folder", tmp_path, "train", 2)
    val = SegmentationDataset("folder", tmp_path, "val", 2, name_list=tmp_path / "list.txt")
    assert [image.stem for image, _ in val.pairs] == ["a", "c"]
    assert len(ProbeRun(argparse.Namespace(), train, val, CPU).classes) == 5


# COCO-Stuff

STUFF = """banner textile, blanket textile, branch plant, bridge building, building-other building, bush plant,
cabinet furniture-stuff, cage structural, cardboard raw-material, carpet floor, ceiling-other ceiling,
ceiling-tile ceiling, cloth textile, clothes textile, clouds sky, counter furniture-stuff, cupboard furniture-stuff,
curtain textile, desk-stuff furniture-stuff, dirt ground, door-stuff furniture-stuff, fence structural,
floor-marble floor, floor-other floor, floor-stone floor, floor-tile floor, floor-wood floor, flower plant, fog water,
food-other food-stuff, fruit food-stuff, furniture-other furniture-stuff, grass plant, gravel ground,
ground-other ground, hill solid, house building, leaves plant, light furniture-stuff, mat textile, metal raw-material,
mirror-stuff furniture-stuff, moss plant, mountain solid, mud ground, napkin textile, net structural,
paper raw-material, pavement ground, pillow textile, plant-other plant, plastic raw-material, platform ground,
playingfield ground, railing structural, railroad ground, river water, road ground, rock solid, roof building,
rug textile, salad food-stuff, sand ground, sea water, shelf furniture-stuff, sky-other sky, skyscraper building,
snow ground, solid-other solid, stairs furniture-stuff, stone solid, straw plant, structural-other structural,
table furniture-stuff, tent building, textile-other textile, towel textile, tree plant, vegetable food-stuff,
wall-brick wall, wall-concrete wall, wall-other wall, wall-panel wall, wall-stone wall, wall-tile wall,
wall-wood wall, water-other water, waterdrops water, window-blind window, window-other window, wood solid"""
"""The 91 stuff categories, 92 to 182, and their super-categories in COCO-Stuff's hierarchy."""


def test_each_stuff_category_maps_to_its_coarse_class() -> None:
    table = cocostuff.coarse_class_table()
    expected = [entry.split()[1] for entry in STUFF.replace("\n", " ").split(", ")]
    assert [cocostuff.CLASSES[label] for label in table[91:182]] == expected
    assert (table[:91] < 12).all()
    assert (table[182:] == VOID).all()
    assert set(table.tolist()) == {*range(27), VOID}


def test_each_thing_category_maps_to_its_coarse_class(photographs: Path) -> None:
    categories = json.loads((photographs / "annotations/instances_val2017.json").read_text())["categories"]
    table = cocostuff.coarse_class_table()
    expected = [category["supercategory"] for category in categories]
    assert [cocostuff.CLASSES[table[category["id"] - 1]] for category in categories] == expected


def test_cocostuff_writes_coarse_masks_and_keeps_existing_ones(tmp_path: Path) -> None:
    values = np.arange(256).reshape(16, 16)
    values[values > 181] = 255
    for name in ("train2017/a", "val2017/b"):
        write_image(tmp_path / "maps" / f"{name}.png", values)
    existing = write_image(tmp_path / "out/train2017/a.png", [[5]])
    cocostuff.main([str(tmp_path / "maps"), str(tmp_path / "out")])
    assert np.array(Image.open(existing)).tolist() == [[5]]
    mask = np.array(Image.open(tmp_path / "out/val2017/b.png"))
    assert np.array_equal(mask, cocostuff.coarse_class_table()[values])
    assert mask.ravel()[[0, 8, 91, 156, 255]].tolist() == [0, 1, 12, 25, VOID]
    assert len(list((tmp_path / "out").rglob("*.*"))) == 2


@pytest.mark.parametrize("damage", ["value", "channels", "text", "no files"])
def test_cocostuff_refuses_other_files(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_image(tmp_path / "maps/train2017/a.png", np.zeros((2, 2, 3)) if damage == "channels" else [[0, 182]])
    if damage == "text":
        file.write_text("no image")
    elif damage == "no files":
        file.unlink()
    line = run_expecting_usage_error(cocostuff.main, [str(tmp_path / "maps"), str(tmp_path / "out")], capsys)
    assert (str(tmp_path / "maps") if damage == "no files" else str(file)) in line
    assert not list((tmp_path / "out").rglob("*.*"))


# Extraction and cache


class MeanColor(nn.Module):
    """An encoder of the mean color of 16 x 16 pixels, which counts the images it has encoded."""

    def __init__(self, interrupt_at: int | None = None):
        super().__init__()
        self.images, self.interrupt_at = 0, interrupt_at

    def forward(self, images: Tensor) -> Tensor:
        self.images += len(images) if images.any() else 0  # zeros only measure the size of the map
        if self.interrupt_at is not None and self.images >= self.interrupt_at:
            raise KeyboardInterrupt
        return F.avg_pool2d(images, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("labeled"))


METADATA: dict[str, object] = {"encoder": "teacher", "source_sha256": "abc", "layer": "map", "stride": 32}


def extract(network: Any, root: Path, cache: Path, size: int = 64, count: int = 4, **metadata: object) -> Any:
    dataset = SegmentationDataset("folder", root, "train", size, count)
    return extract_features(network, dataset, cache, METADATA | metadata, CPU, batch_size=3)


def test_features_equal_those_of_each_image_alone(folder: Path, tmp_path: Path) -> None:
    network = build_frozen_encoder(untrained_encoder("resnet18", 0))
    features = extract(network, folder, tmp_path)
    assert (features.maps.shape, features.maps.dtype) == ((4, 2, 2, 512), np.float16)
    assert (features.labels.shape, features.labels.dtype) == ((4, 64, 64), np.uint8)
    dataset = SegmentationDataset("folder", folder, "train", 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for number in range(4):
        image, labels = dataset[number]
        expected = network(((image / 255 - mean[:, None, None]) / std[:, None, None])[None])[0].permute(1, 2, 0)
        # A rounding to float16; float32 sums of 4,608 terms in another order.
        atol = 1e-4 * float(expected.abs().max())
        np.testing.assert_allclose(features.maps[number], expected.numpy(), rtol=2**-10, atol=atol)
        assert np.array_equal(features.labels[number], labels)
    positions = features.positions(np.array([5, 0, 13]))
    assert np.array_equal(positions, features.maps[[1, 0, 3], [0, 0, 0], [1, 0, 1]].astype(np.float32))


def test_cache_is_used_only_for_the_same_network_and_images(tmp_path: Path) -> None:
    root, cache = make_folder(tmp_path / "data"), tmp_path / "cache"

    def images_encoded(**options: Any) -> int:
        network = MeanColor()
        extract(network, root, cache, **options)
        return network.images

    assert (images_encoded(), images_encoded()) == (4, 0)
    assert images_encoded(source_sha256="abd") == 4
    assert images_encoded(encoder="student") == 4
    assert images_encoded(layer="projections") == 4
    assert images_encoded(stride=16) == 4
    assert images_encoded(size=48) == 4
    assert images_encoded(count=3) == 3
    assert images_encoded() == 0
    for changed in ("train/images/1.png", "train/masks/1.png"):
        os.utime(root / changed, (1, 1))
        assert images_encoded() == 4


def test_probe_run_caches_by_checkpoint_and_stride(folder: Path, tmp_path: Path) -> None:
    dataset = SegmentationDataset("folder", folder, "val", 64)

    def images_encoded(sha256: str, stride: int, layer: str = "map") -> int:
        args = argparse.Namespace(cache=tmp_path, batch_size=2, num_workers=0, output_stride=stride)
        provenance = {"encoder": "teacher", "source_sha256": sha256}
        encoder: Any = argparse.Namespace(arch="resnet18", provenance=provenance)
        network = MeanColor()
        ProbeRun(args, dataset, dataset, CPU).extract(dataset, network, encoder, layer)
        return network.images

    assert [images_encoded("a", 32), images_encoded("b", 32), images_encoded("a", 16)] == [3, 3, 3]
    assert [images_encoded("a", 32), images_encoded("a", 32, "projections")] == [0, 3]


def test_interrupted_extraction_is_repeated(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        extract(MeanColor(interrupt_at=3), folder, tmp_path)
    assert list(tmp_path.rglob("maps.npy"))
    network = MeanColor()
    features = extract(network, folder, tmp_path)
    assert network.images == 4
    assert np.array_equal(features.maps, extract(MeanColor(), folder, tmp_path / "other").maps)


def test_features_beyond_float16_are_clamped(folder: Path, tmp_path: Path) -> None:
    features = extract(lambda images: 1e6 * F.avg_pool2d(images, 16), folder, tmp_path)
    assert np.isfinite(features.maps).all()
    assert abs(features.maps).max() == np.finfo(np.float16).max


def test_linear_probe_without_labeled_pixels_is_an_error() -> None:
    features = as_features(np.zeros((2, 2, 2, 3)), np.full((2, 4, 4), VOID))
    with pytest.raises(UsageError, match="no labeled pixels"):
        fit_linear(features, 2, steps=1, lr=0.1, seed=0, device=CPU)


def test_full_disk_is_reported_before_the_encoder_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labeled_features.shutil, "disk_usage", lambda path: argparse.Namespace(free=100))
    network = MeanColor()
    with pytest.raises(UsageError, match="--cache"):
        extract(network, folder, tmp_path)
    assert network.images == 0


# Commands


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("run") / "current.pth")


def read_results(out: Path) -> dict[str, Any]:
    """Read results.json, in which NaN is not valid."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not valid JSON")

    return json.loads((out / "results.json").read_text(), parse_constant=refuse)


def run_probe(name: str, source: object, root: Path, out: Path, *flags: object) -> dict[str, Any]:
    """Run a command in this process on the layout `folder`; return its results."""
    words = [source, "--data-dir", root, "--cache", out / "cache", "--out", out / "results", *SMALL, *flags]
    PROBES[name].main([str(word) for word in words])
    return read_results(out / "results")


@pytest.mark.parametrize(
    ("name", "flags", "protocols"),
    [
        ("linear", ["--steps", "20"], ["linear probe"]),
        ("knn", ["--memory", "50"], ["k-NN"]),
        ("unsupervised", [], ["Hungarian, one to one", "majority, many to one"]),
    ],
)
def test_command_measures_a_checkpoint_and_its_baseline(
    name: str,
    flags: list[str],
    protocols: list[str],
    checkpoint: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    load = Mock(wraps=utils.checkpoint.load)
    monkeypatch.setattr(utils.checkpoint, "load", load)
    content = run_probe(name, checkpoint, folder, tmp_path, "--baseline", "random", *flags)
    assert load.call_count == 1
    out = tmp_path / "results"
    assert sorted(path.name for path in out.iterdir()) == ["predictions.png", "results.json", "results.md"]
    assert content["images"] == {"train": 4, "val": 3}
    assert (content["checkpoint"]["arch"], content["checkpoint"]["encoder"]) == ("resnet18", "teacher")
    assert content["args"]["size"] == 64
    assert (content["image_size"], content["output_stride"]) == (64, 32)
    table = (out / "results.md").read_text()
    output = capsys.readouterr()
    assert table in output.out
    assert output.err == ""  # no progress bar, because it is not a terminal
    assert table.startswith(
        f"- Checkpoint: {checkpoint} (teacher, resnet18, slotcon, epoch 3)\n"
        "- Dataset: folder, 4 training and 3 validation images\n"
        "- Image size: 64 x 64, output stride 32\n\n| encoder"
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert list(content["results"]) == ["checkpoint", "untrained"]
    for encoder, results in content["results"].items():
        assert list(results) == protocols
        for protocol, scores in results.items():
            assert 0 < scores["accuracy"] <= 100
            ious = [value for value in scores["iou"].values() if value is not None]
            assert scores["miou"] == pytest.approx(sum(ious) / len(ious))
            assert [encoder, protocol, f"{scores['miou']:.2f}", f"{scores['accuracy']:.2f}"] in rows
    with Image.open(out / "predictions.png") as image:
        assert image.height > 3 * 224
        assert image.width > 4 * 224  # image, labels, checkpoint, untrained


@pytest.mark.parametrize("name", PROBES)
def test_figure_gets_the_images_labels_and_predictions(
    name: str, checkpoint: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(
        segmentation_probe, "draw_predictions", lambda *args: calls.append(args) or draw_predictions(*args)
    )
    content = run_probe(name, checkpoint, folder, tmp_path, *PROBE_FLAGS[name])
    ((images, label_maps, _),) = calls
    dataset = SegmentationDataset("folder", folder, "val", 64)
    assert list(label_maps) == ["labels", "prediction (checkpoint)"]
    for number, (image, labels) in enumerate(dataset[number] for number in range(3)):
        assert np.array_equal(images[number], image.permute(1, 2, 0))
        assert np.array_equal(label_maps["labels"][number], labels)
    # The three images are the whole validation set, so that the shown predictions have its accuracy.
    valid = label_maps["labels"] != VOID
    accuracy = 100 * (label_maps["labels"] == label_maps["prediction (checkpoint)"])[valid].mean()
    assert accuracy == pytest.approx(next(iter(content["results"]["checkpoint"].values()))["accuracy"])


def test_progress_is_shown_on_a_terminal(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run_probe("linear", "random", folder, tmp_path, "--arch", "resnet18", *PROBE_FLAGS["linear"])
    bars = capsys.readouterr().err
    assert all(text in bars for text in ("extracting train", "4/4", "extracting val", "3/3", "training", "20/20"))


@pytest.mark.parametrize("name", PROBES)
def test_random_encoder_equals_its_baseline_and_uses_the_cache(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--arch", "resnet18", *PROBE_FLAGS[name]]
    first = run_probe(name, "random", folder, tmp_path, "--baseline", "random", *flags)
    assert first["results"]["checkpoint"] == first["results"]["untrained"]
    monkeypatch.setattr(labeled_features, "_fill_arrays", lambda *args: pytest.fail("the encoder ran again"))
    second = run_probe(name, "random", folder, tmp_path, *flags)
    assert second["results"]["checkpoint"] == first["results"]["checkpoint"]
    assert "- Checkpoint: random (untrained, resnet18)\n" in (tmp_path / "results/results.md").read_text()


@pytest.mark.parametrize(("method", "released"), [("gtsa", False), ("gtsa", True), ("slotcon", False)])
def test_linear_probe_measures_the_teacher_of_a_vit_checkpoint(
    method: str, released: bool, folder: Path, tmp_path: Path
) -> None:
    path = save_vit_checkpoint(tmp_path / "current.pth", method, released)
    content = run_probe("linear", path, folder, tmp_path, *PROBE_FLAGS["linear"])
    provenance = content["checkpoint"]
    assert (provenance["arch"], provenance["encoder"]) == ("vit_tiny_patch16_224", "teacher")
    assert provenance.get("method") == (None if released else method)
    maps = np.concatenate([np.load(file) for file in sorted((tmp_path / "cache").rglob("maps.npy"))])
    assert maps.shape == (7, 4, 4, 192)
    # The final norm, without training, leaves mean 0 and variance 1 at each position; rounded to float16.
    np.testing.assert_allclose(maps.mean(axis=3, dtype=np.float64), 0, atol=1e-3)
    np.testing.assert_allclose(maps.var(axis=3, dtype=np.float64), 1, atol=1e-2)


def test_random_vit_has_the_requested_patch_size(folder: Path, tmp_path: Path) -> None:
    flags = ("--arch", "vit_tiny_patch16_224", "--patch-size", "8")
    content = run_probe("knn", "random", folder, tmp_path, *flags, *PROBE_FLAGS["knn"])
    assert (content["checkpoint"]["arch"], content["output_stride"]) == ("vit_tiny_patch8_224", 8)


def test_vit_is_measured_with_its_baseline(folder: Path, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "vit.pth")
    content = run_probe("knn", tmp_path / "vit.pth", folder, tmp_path, "--baseline", "random")
    assert (content["checkpoint"]["arch"], content["checkpoint"]["encoder"]) == ("vit_tiny_patch16_224", "only")
    assert content["results"].keys() == {"checkpoint", "untrained"}
    assert content["output_stride"] == 16
    text = (tmp_path / "results/results.md").read_text()
    assert f"- Checkpoint: {tmp_path / 'vit.pth'} (vit_tiny_patch16_224)\n" in text
    assert "- Image size: 64 x 64, output stride 16\n" in text


def test_coco_stuff_defaults_to_27_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    clusters = []
    monkeypatch.setattr(unsupervised_segmentation, "run", lambda args, *more: clusters.append(args.clusters))
    for flags in ([], ["--clusters", "5"], ["--prototypes"], ["--dataset", "voc"]):
        unsupervised_segmentation.main(["random", "--data-dir", ".", "--dataset", "coco-stuff-27", *flags])
    assert clusters == [27, 5, None, None]


def test_untrained_projections_are_cached_by_the_shape_of_the_projector(folder: Path, tmp_path: Path) -> None:
    """Two checkpoints of one architecture with different heads do not share the features of the baseline."""
    for name, flags in (("small", []), ("large", ["--dim-hidden", "48"])):
        path = save_checkpoint(tmp_path / f"{name}.pth", *flags)
        run_probe("unsupervised", path, folder, tmp_path, "--baseline", "random")
    assert len(list(tmp_path.rglob("maps.npy"))) == 4


def test_two_torchrun_processes_share_the_extraction(folder: Path, tmp_path: Path) -> None:
    script = Path(knn_segmentation.__file__)
    words = ["random", "--arch", "resnet18", "--data-dir", folder, *SMALL, "--cache", "cache", "--out", "out"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [str(word) for word in (*launcher, script, *words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to out") == 1
    run_probe("knn", "random", folder, tmp_path / "alone", "--arch", "resnet18")
    files = sorted(path.relative_to(tmp_path / "cache") for path in (tmp_path / "cache").rglob("*.npy"))
    assert len(files) == 4
    for file in files:
        # Batches of other sizes may change the order of float32 sums, and thereby one rounding to float16.
        shared, alone = (np.load(cache / file) for cache in (tmp_path / "cache", tmp_path / "alone" / "cache"))
        np.testing.assert_allclose(shared, alone, rtol=2**-9, atol=1e-4 * float(alone.max()))


def test_earlier_spelling_of_neighbors_is_accepted(folder: Path, tmp_path: Path) -> None:
    flags = ("--arch", "resnet18", "--neighbours", "3")
    results = run_probe("knn", "random", folder, tmp_path, *flags)
    assert results["args"]["neighbors"] == 3


# Usage errors


def usage_error(
    name: str, source: object, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *flags: object
) -> str:
    words = [source, "--arch", "resnet18", "--data-dir", root, "--cache", tmp_path / "cache", *SMALL]
    words += ["--out", tmp_path / "out", *flags]
    line = run_expecting_usage_error(PROBES[name].main, [str(word) for word in words], capsys)
    assert not (tmp_path / "out").exists()
    return line


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("linear", ["--steps", "0"]),
        ("linear", ["--lr", "nan"]),
        ("knn", ["--temperature", "0"]),
        ("knn", ["--train-images", "0"]),
        ("knn", ["--output-stride", "16"]),
        ("knn", ["--size", "65"]),
        ("unsupervised", ["--clusters", "100000"]),
        ("unsupervised", ["--prototypes", "--clusters", "2"]),
        ("knn", ["--val-list", "nowhere.txt"]),
        ("knn", ["--cache", "/dev/null/cache"]),
        ("knn", ["--out", "/dev/null/out"]),
        ("knn", ["--data-dir", "nowhere"]),
    ],
    ids=str,
)
def test_invalid_flag_is_named(
    name: str, flags: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert flags[0] in usage_error(name, "random", folder, tmp_path, capsys, *flags)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("missing", "no such folder"), ("file", "is a file; name a folder"), ("empty", "no pairs of image and mask")],
)
def test_data_dir_without_data_is_named(
    kind: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    if kind == "file":
        root.touch()
    elif kind == "empty":
        root.mkdir()
    assert f"--data-dir {root}: {message}" in usage_error("knn", "random", root, tmp_path, capsys)
    with pytest.raises(UsageError, match=f"--data-dir {root}: {'no images' if kind == 'empty' else message}"):
        build_dataset(argparse.Namespace(dataset="folder", data_dir=str(root), seed=0), recipes=())


def test_checkpoint_without_prototypes_suggests_clusters(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    gtsa = save_vit_checkpoint(tmp_path / "gtsa.pth", "gtsa")
    for source in ("random", tmp_path / "resnet18.pth", gtsa):
        assert "--clusters" in usage_error("unsupervised", source, folder, tmp_path, capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size", "72"], "--size 72: not a multiple of the patch size 16; use 64 or 80"),
        (["--size", "320", "--patch-size", "14"], "--size 320: not a multiple of the patch size 14; use 308 or 322"),
        (["--output-stride", "16"], "--output-stride 16: the stride of a vit_tiny_patch16_224 is its patch size"),
        (["--arch", "resnet18", "--patch-size", "8"], "--patch-size 8: a resnet18 has no patches"),
    ],
    ids=" ".join,
)
def test_flag_that_does_not_fit_the_vit_is_named_before_any_work(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--arch", "vit_tiny_patch16_224", *flags]
    assert message in usage_error("knn", "random", tmp_path / "missing", tmp_path, capsys, *arguments)


def truncate(file: Path, length: int) -> None:
    file.write_bytes(file.read_bytes()[:length])


def insert_short_chunk(file: Path) -> None:
    """Insert a chunk that is shorter than its kind, for which Pillow raises a ValueError, after a PNG's first one."""
    content, chunk = file.read_bytes(), b"pHYs" + b"abc"
    file.write_bytes(content[:33] + struct.pack(">I", 3) + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:])


def corrupt(file: Path) -> None:
    """Overwrite the header of a PNG's second chunk."""
    content = file.read_bytes()
    file.write_bytes(content[:33] + b"\xff" * 8 + content[41:])


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {  # a file, what is done to it, the message
    "mask of another size": ("train/masks/1.png", lambda file: write_image(file, np.zeros((9, 9))), "is 9 x 9"),
    "color mask": ("val/masks/1.png", lambda file: write_image(file, np.zeros((72, 96, 3))), "has 3 channels"),
    "16-bit mask": (
        *("val/masks/1.png", lambda file: Image.fromarray(np.full((72, 96), 300, np.uint16)).save(file)),
        "holds the value 300",
    ),
    "truncated image": ("train/images/1.png", lambda file: truncate(file, 200), "cannot be read"),
    "image with a short chunk": ("val/images/1.png", insert_short_chunk, "cannot be read"),
    "mask with a short chunk": ("val/masks/1.png", insert_short_chunk, "cannot be read"),
    "corrupt mask": ("train/masks/1.png", corrupt, "cannot be read"),
    "only void": (
        *("val/masks", lambda folder: [write_image(file, np.full((72, 96), VOID)) for file in folder.iterdir()]),
        "all pixels of its 2 masks are void",
    ),
}


@pytest.mark.parametrize(
    ("damage", "workers"), [*((damage, 0) for damage in DAMAGES), ("mask of another size", 1)], ids=str
)
def test_invalid_pair_is_named(damage: str, workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, apply, message = DAMAGES[damage]
    root = make_folder(tmp_path / "data", 2, 2)
    apply(root / file)
    line = usage_error("knn", "random", root, tmp_path, capsys, "--num-workers", workers)
    assert f"{root / file}: " in line
    assert message in line


def test_label_beyond_the_classes_and_missing_listed_image_are_named(tmp_path: Path) -> None:
    make_layout(tmp_path, "voc")
    mask = write_image(tmp_path / "SegmentationClass/b.png", np.full((4, 4), 200))
    with pytest.raises(UsageError, match=rf"{mask}: holds the value 200; 21 classes"):
        SegmentationDataset("voc", tmp_path, "train", 4)[1]
    (tmp_path / "JPEGImages/b.jpg").unlink()
    with pytest.raises(UsageError, match=r"b\.jpg: listed in the dataset"):
        SegmentationDataset("voc", tmp_path, "train", 4)


def test_val_list_with_unknown_names_is_an_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("other\n")
    with pytest.raises(UsageError, match=r"--val-list .*: 1 of its 1 names"):
        SegmentationDataset("folder", folder, "val", 64, name_list=tmp_path / "list.txt")
