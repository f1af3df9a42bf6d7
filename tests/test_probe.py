"""Probes of frozen features: scores, what is trained or remembered, data layouts, the cache, commands, mistakes."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import confusion_matrix, jaccard_score
from torch import Tensor, nn

import main_pretrain
from data import scenes
from data.demo import render_scene
from models import build_method
from tests.conftest import TINY
from tests.reference import segmentation_scores as reference
from transfer.encoders import read_encoder
from transfer.probe import (
    clusters,
    cocostuff,
    features,
    knn_segmentation,
    linear,
    linear_segmentation,
    neighbors,
    unsupervised_segmentation,
)
from transfer.probe.command import Task, make_parser
from transfer.probe.features import Features
from transfer.probe.labeled import LAYOUTS, Labeled
from transfer.probe.predict import cell_shares, count, label_maps, winners
from transfer.probe.scores import VOID, confusion, majority, match, relabel, score
from transfer.encoders import build_network, load_encoder, untrained_encoder
from transfer.trained_slots import load_slots, untrained_slots
from utils.errors import UsageError

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
PROBES = {"linear": linear_segmentation, "knn": knn_segmentation, "unsupervised": unsupervised_segmentation}
SMALL = ["--size", "64", "--device", "cpu", "--num-workers", "0"]
OWN = {"linear": ["--steps", "20"], "knn": ["--memory", "50"], "unsupervised": ["--clusters", "3"]}
Ints = np.ndarray[Any, np.dtype[np.int64]]


# Scores


@st.composite
def label_pairs(draw: st.DrawFn) -> tuple[Ints, Ints, int, int]:
    """Truth with void, clusters, and how many there may be of each; some are nowhere."""
    classes, found = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    truths = st.one_of(st.integers(0, classes - 1), st.just(VOID))
    pairs = draw(st.lists(st.tuples(truths, st.integers(0, found - 1)), max_size=40))
    truth, clusters = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return truth, clusters, classes, found


@settings(deadline=None, max_examples=100)
@given(label_pairs())
def test_the_confusion_matrix_is_that_of_loops_and_of_scikit_learn(pair: tuple[Ints, Ints, int, int]) -> None:
    truth, found, classes, clusters = pair
    counts = confusion(truth.astype(np.uint8), found, classes, clusters)
    assert counts.shape == (classes, clusters)
    assert np.array_equal(counts, reference.confusion(truth, found, classes, clusters))
    assume((truth != VOID).any())
    every = list(range(max(classes, clusters, 2)))  # of a single label scikit-learn warns
    theirs = confusion_matrix(truth[truth != VOID], found[truth != VOID], labels=every)
    assert np.array_equal(counts, theirs[:classes, :clusters])


@settings(deadline=None, max_examples=100)
@given(label_pairs())
def test_iou_and_accuracy_are_those_of_loops_and_of_scikit_learn(pair: tuple[Ints, Ints, int, int]) -> None:
    truth, found, classes, _ = pair
    found %= classes
    ours = score(confusion(truth, found, classes, classes))
    ious = reference.ious(truth, found, classes)
    np.testing.assert_allclose(ours.iou, ious)
    np.testing.assert_allclose(ours.miou, reference.mean(ious))
    np.testing.assert_allclose(ours.accuracy, reference.accuracy(truth, found))
    known = truth != VOID
    assume(known.any())
    present = sorted({*truth[known].tolist(), *found[known].tolist()})
    theirs = jaccard_score(truth[known], found[known], labels=present, average="macro", zero_division=0)
    assert ours.miou == pytest.approx(100 * theirs)


def test_a_class_that_is_found_and_not_there_counts_as_zero_and_one_that_is_neither_not_at_all() -> None:
    truth, found = np.array([0, 0, 1, 1, VOID]), np.array([0, 0, 1, 2, 3])
    ours = score(confusion(truth, found, 4, 4))
    np.testing.assert_allclose(ours.iou, [100, 50, 0, np.nan])
    assert (ours.miou, ours.accuracy) == (50, 75)


def test_nothing_but_void_has_no_score() -> None:
    ours = score(confusion(np.full(9, VOID), np.zeros(9, dtype=np.int64), 3, 3))
    assert np.isnan([ours.miou, ours.accuracy, *ours.iou]).all()


@settings(deadline=None, max_examples=100)
@given(label_pairs())
def test_hungarian_matching_is_one_to_one_and_gets_the_most_pixels_right(pair: tuple[Ints, Ints, int, int]) -> None:
    truth, found, classes, clusters = pair
    counts = confusion(truth, found, classes, clusters)
    class_of = match(counts)
    taken = class_of[class_of >= 0].tolist()
    assert len(taken) == len(set(taken)) == min(classes, clusters)
    right = sum(int(counts[label, cluster]) for cluster, label in enumerate(class_of) if label >= 0)
    assert right == reference.most_right(counts)
    assert right == counts[linear_sum_assignment(-counts)].sum()

    # Scored as label maps are: pixels of clusters that are left over have a label of no class.
    given_labels = np.where(class_of < 0, classes, class_of)[found]
    ours = score(relabel(counts, class_of))
    np.testing.assert_allclose(ours.iou, reference.ious(truth, given_labels, classes))
    np.testing.assert_allclose(ours.accuracy, reference.accuracy(truth, given_labels))


@settings(deadline=None, max_examples=100)
@given(label_pairs())
def test_majority_gives_each_cluster_the_class_of_most_of_its_pixels(pair: tuple[Ints, Ints, int, int]) -> None:
    truth, found, classes, clusters = pair
    counts = confusion(truth, found, classes, clusters)
    class_of = majority(counts)
    for cluster, label in enumerate(class_of):
        mine = [int(value) for value in truth[found == cluster] if value != VOID]
        if mine:
            assert mine.count(int(label)) == max(mine.count(other) for other in range(classes))
        else:
            assert label == -1
    given_labels = np.where(class_of < 0, classes, class_of)[found]
    ours = score(relabel(counts, class_of))
    np.testing.assert_allclose(ours.iou, reference.ious(truth, given_labels, classes))
    np.testing.assert_allclose(ours.accuracy, reference.accuracy(truth, given_labels))
    one = score(relabel(counts, match(counts)))
    assert np.isnan(one.accuracy) or ours.accuracy >= one.accuracy - 1e-9


def test_an_encoding_of_uint8_labels_does_not_overflow_with_many_clusters() -> None:
    truth, found = np.array([26, 26, 3], dtype=np.uint8), np.array([2047, 2047, 1000])
    counts = confusion(truth, found, 27, 2048)
    assert (counts[26, 2047], counts[3, 1000], counts.sum()) == (2, 1, 3)


# From maps to pixels


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 11), st.data())
def test_cell_shares_are_those_of_loops(size: int, data: st.DataObject) -> None:
    height, width = (data.draw(st.integers(1, size)) for _ in range(2))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    labels = rng.choice([0, 1, 2, VOID], (2, size, size)).astype(np.uint8)
    ours = cell_shares(labels, (height, width), 4)
    assert ours.shape == (2, height, width, 4)
    np.testing.assert_allclose(ours, reference.cell_shares(labels, height, width, 4), atol=1e-6)
    assert (ours[..., 3] == 0).all()
    without_void = np.where(labels == VOID, 3, labels).astype(np.uint8)
    np.testing.assert_allclose(cell_shares(without_void, (height, width), 4).sum(axis=3), 1, atol=1e-6)


def test_winners_are_those_of_bilinear_scores_as_torch_makes_them() -> None:
    scores = torch.randn(5, 3, 3, generator=torch.Generator().manual_seed(0))
    fine = F.interpolate(scores[None], (12, 12), mode="bilinear")[0]
    assert np.array_equal(winners(scores, 12), fine.argmax(dim=0).numpy())
    coarse = winners(scores, 3)
    assert np.array_equal(coarse, scores.argmax(dim=0).numpy())


def as_features(maps: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> Features:
    return Features(maps.astype(np.float16), labels.astype(np.uint8))


def one_hot(labels: np.ndarray[Any, Any], classes: int, cell: int = 1) -> Features:
    """Labels (N, h, w) of cells, each `cell` pixels wide, and features that say just them; void cells are zeros."""
    maps = np.eye(VOID + 1)[labels][..., :classes]
    return as_features(maps, labels.repeat(cell, axis=1).repeat(cell, axis=2))


def test_labels_of_each_image_have_the_size_of_its_labels() -> None:
    truth = one_hot(np.array([[[0, 1], [1, 0]], [[1, 1], [0, 0]]]), 2, cell=4)
    maps = list(label_maps(truth, lambda seen: seen))
    assert [found.shape for found in maps] == [(8, 8), (8, 8)]
    assert np.array_equal(maps[1], truth.labels[1])


# Sanity: truth scores 100, noise scores chance


TRUTHS = {
    "a cell a pixel": partial(one_hot, np.random.default_rng(0).choice([0, 1, 2, 3, VOID], (6, 12, 12)), 4),
    # Stripes, where bilinear scores put no border out of place: as many cells along as across, each of 4 pixels.
    "cells of 4 pixels": partial(
        one_hot, np.random.default_rng(1).choice([0, 1, 2, 3], (6, 8, 1)).repeat(8, axis=2), 4, 4
    ),
}


@pytest.mark.parametrize("truth", TRUTHS)
def test_features_that_are_the_truth_score_100_in_every_probe(truth: str) -> None:
    seen = TRUTHS[truth]()
    probe = linear.fit(seen, 4, steps=150, lr=0.05, seed=0, device=CPU)
    memory = neighbors.remember(seen, 4, 1000, 5, 0.02, 0, CPU)
    for predict in (probe, memory):
        scored = score(count(seen, predict, 4, 4))
        assert (scored.miou, scored.accuracy) == (100, 100)
        assert scored.iou == (100,) * 4
    mixed = torch.eye(4)[[2, 0, 3, 1]]
    for centers in (torch.eye(4), mixed, torch.cat([mixed, -torch.eye(4)])):
        counts = count(seen, partial(clusters.nearest, centers), 4, len(centers))
        for class_of in (match(counts), majority(counts)):
            scored = score(relabel(counts, class_of))
            assert (scored.miou, scored.accuracy) == (100, 100)
    counts = count(seen, partial(clusters.nearest, mixed), 4, 4)
    assert match(counts).tolist() == [2, 0, 3, 1]


def test_random_labels_score_chance() -> None:
    """Four classes alike in number: accuracy 1/4; mIoU (1/16) / (2/4 - 1/16) = 1/7 where all four are guessed."""
    rng = np.random.default_rng(0)
    noise = [as_features(rng.normal(size=(8, 16, 16, 6)), rng.integers(4, size=(8, 16, 16))) for _ in range(2)]
    train, val = noise
    probe = linear.fit(train, 4, steps=100, lr=0.02, seed=0, device=CPU)
    memory = neighbors.remember(train, 4, 2048, 1, 0.02, 0, CPU)
    centers = clusters.kmeans(train, 4, seed=0)
    counts = count(val, partial(clusters.nearest, centers), 4, 4)
    scores = [score(count(val, predict, 4, 4)) for predict in (probe, memory)]
    for scored in [*scores, score(relabel(counts, match(counts)))]:
        assert scored.accuracy == pytest.approx(25, abs=3.5)
        assert scored.miou == pytest.approx(100 / 7, abs=3)


def test_features_that_say_nothing_give_the_most_frequent_class() -> None:
    labels = np.random.default_rng(0).choice([0, 1, 2], (4, 16, 16), p=[0.2, 0.5, 0.3])
    seen = as_features(np.ones((4, 16, 16, 3)), labels)
    share = 100 * (labels == 1).mean()
    probe = linear.fit(seen, 3, steps=100, lr=0.05, seed=0, device=CPU)
    scored = score(count(seen, probe, 3, 3))
    assert scored.accuracy == pytest.approx(share)
    assert scored.iou == pytest.approx((0, share, 0))


# The linear probe


def blobs(seed: int = 0, gap: float = 6) -> Features:
    """Cells of three classes about three points, channels of very different sizes, one of them constant."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=(5, 20, 20))
    maps = rng.normal(size=(*labels.shape, 4)) + gap * np.eye(4)[labels]
    maps[..., 3] = 7
    return as_features(maps * [100, 1, 0.01, 1] + [1000, 0, 0, 0], labels)


def test_the_linear_probe_learns_what_is_separable() -> None:
    seen = blobs()
    probe = linear.fit(seen, 3, steps=200, lr=0.05, seed=0, device=CPU)
    assert all(part.isfinite().all() for part in (probe.mean, probe.scale, probe.weight, probe.bias))
    assert score(count(blobs(1), probe, 3, 3)).accuracy > 99
    assert probe.scale[3] == 0
    flat = seen.maps.reshape(-1, 4).astype(np.float64)
    np.testing.assert_allclose(probe.mean, flat.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(probe.scale[:3], 1 / flat.std(axis=0)[:3], rtol=1e-4)


def test_the_linear_probe_is_the_same_by_the_same_seed_alone() -> None:
    first, again, other = (linear.fit(blobs(), 3, 5, 0.05, seed, CPU) for seed in (0, 0, 1))
    assert torch.equal(first.weight, again.weight)
    assert torch.equal(first.bias, again.bias)
    assert not torch.equal(first.weight, other.weight)


def test_the_linear_probe_gives_the_shares_of_mixed_cells() -> None:
    """Cells of two kinds, 4 x 4 pixels each: of one, a quarter is of class 0; of the other three quarters."""
    kinds = np.random.default_rng(0).integers(2, size=(4, 6, 6))
    labels = np.ones((4, 24, 24), dtype=np.int64)
    for n, y, x in np.ndindex(4, 6, 6):
        labels[n, 4 * y : 4 * y + (3 if kinds[n, y, x] else 1), 4 * x : 4 * x + 4] = 0
    seen = as_features(np.eye(2)[kinds], labels)
    probe = linear.fit(seen, 2, steps=300, lr=0.05, seed=0, device=CPU)
    shares = probe(torch.eye(2)[:, :, None]).softmax(dim=0)[0, :, 0]
    torch.testing.assert_close(shares, torch.tensor([0.25, 0.75]), atol=0.01, rtol=0)


def test_void_has_no_part_in_the_linear_probe() -> None:
    seen = blobs()
    labels = np.array(seen.labels)
    labels[:, :10] = VOID
    assert score(count(blobs(1), linear.fit(Features(seen.maps, labels), 3, 200, 0.05, 0, CPU), 3, 3)).accuracy > 99


# Nearest neighbors


@pytest.mark.parametrize("number", [1, 4, 200])
def test_a_memory_votes_as_loops_do(number: int) -> None:
    rng = np.random.default_rng(0)
    train = as_features(rng.normal(size=(3, 4, 4, 5)), rng.choice([0, 1, 2, VOID], (3, 8, 8)))
    shares = reference.cell_shares(train.labels, 4, 4, 3).reshape(-1, 3)
    kept = shares.sum(axis=1) > 0
    memory = neighbors.remember(train, 3, 1000, number, 0.1, 0, CPU)
    assert len(memory.keys) == kept.sum()
    keys = train.maps.reshape(-1, 5).astype(np.float64)[kept]
    seen = rng.normal(size=(5, 2, 3))
    ours = memory(torch.from_numpy(seen).float())
    for y, x in np.ndindex(2, 3):
        expected = reference.votes(seen[:, y, x], keys, shares[kept], number, 0.1)
        np.testing.assert_allclose(ours[:, y, x], expected, atol=1e-5)


def test_a_memory_holds_so_many_labeled_cells_drawn_by_the_seed() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=(4, 6, 6))
    labels[1] = VOID
    train = as_features(rng.normal(size=(4, 6, 6, 5)), labels)
    first, again, other = (neighbors.remember(train, 3, 20, 3, 0.1, seed, CPU) for seed in (0, 0, 1))
    assert first.keys.shape == (20, 5)
    assert torch.equal(first.keys, again.keys)
    assert not torch.equal(first.keys, other.keys)
    torch.testing.assert_close(first.keys.norm(dim=1), torch.ones(20))
    cells = F.normalize(torch.from_numpy(train.maps.reshape(-1, 5)).float(), dim=1)
    for key, share in zip(first.keys, first.shares):
        where = int((cells @ key).argmax())
        assert share[labels.ravel()[where]] == 1
    assert len(first.keys.unique(dim=0)) == 20


# k-means


def test_k_means_finds_blobs_and_is_the_same_by_the_same_seed() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(4, size=(5, 8, 8))
    centers = np.linalg.qr(rng.normal(size=(6, 6)))[0][:4]
    # Direction alone tells a cell's cluster: by distance the first would be several, and the others one.
    lengths = np.where(truth == 0, 100, 1)[..., None] * rng.uniform(0.3, 1, size=(*truth.shape, 1))
    seen = as_features(lengths * (centers[truth] + 0.05 * rng.normal(size=(*truth.shape, 6))), truth)
    found = clusters.kmeans(seen, 4, seed=3)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    cosine = torch.from_numpy(centers).float() @ found.T
    assert (cosine.amax(dim=1) > 0.98).all()
    assert sorted(cosine.argmax(dim=1).tolist()) == [0, 1, 2, 3]
    assert torch.equal(found, clusters.kmeans(seen, 4, seed=3))
    counts = count(seen, partial(clusters.nearest, found), 4, 4)
    assert score(relabel(counts, match(counts))).accuracy == 100


def test_nearest_is_the_cosine() -> None:
    generator = torch.Generator().manual_seed(0)
    centers, seen = torch.randn(3, 5, generator=generator), torch.randn(5, 2, 4, generator=generator)
    for k, y, x in np.ndindex(3, 2, 4):
        expected = F.cosine_similarity(centers[k], seen[:, y, x], dim=0)
        torch.testing.assert_close(clusters.nearest(centers, seen)[k, y, x], expected)


# Layouts


def arguments(root: Path, *more: str) -> argparse.Namespace:
    return make_parser("A probe.").parse_args(["random", "--data-dir", str(root), *SMALL, *more])


def write(path: Path, values: np.ndarray[Any, Any] | list[list[int]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(path)
    return path


def picture(number: int, width: int = 4, height: int = 4) -> np.ndarray[Any, Any]:
    return np.full((height, width, 3), 10 * number, dtype=np.uint8)


def make_folder(root: Path, train: int = 4, val: int = 3) -> Path:
    """Layout `folder`: scenes of 96 x 72, a strip of void at the left."""
    for split, number in [(split, n) for split, many in (("train", train), ("val", val)) for n in range(many)]:
        pixels, mask = render_scene(0, split, number, 96, 72)
        mask[:, 12:20] = VOID
        write(root / split / "images" / f"{number}.png", pixels)
        write(root / split / "masks" / f"{number}.png", mask)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("labeled"))


Made = tuple[dict[str, list[str]], list[list[int]]]
"""Stems of the images of each split, and what labels the mask [[0, 1], [2, 255]] has, doubled in size."""


def make_ade20k(root: Path) -> Made:
    for split, names in (("training", ("a", "b")), ("validation", ("c",))):
        for number, name in enumerate(names):
            write(root / "images" / split / f"{name}.jpg", picture(number))
            write(root / "annotations" / split / f"{name}.png", np.kron([[0, 1], [2, 150]], np.ones((2, 2))))
        write(root / "images" / split / "lonely.jpg", picture(1))
    return {"train": ["a", "b"], "val": ["c"]}, [[VOID, 0], [1, 149]]


def make_voc(root: Path) -> Made:
    for number, name in enumerate("abcd"):
        write(root / "JPEGImages" / f"{name}.jpg", picture(number))
        mask = Image.fromarray(np.kron([[0, 1], [20, 255]], np.ones((2, 2))).astype(np.uint8))
        mask.putpalette([value for value in range(256) for _ in range(3)])  # published as pictures of a palette
        (root / "SegmentationClass").mkdir(exist_ok=True)
        mask.save(root / "SegmentationClass" / f"{name}.png")
    lists = {"train": ["d", "a"], "val": ["c"]}
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    for split, names in lists.items():
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return lists, [[0, 1], [20, VOID]]


def make_cityscapes(root: Path) -> Made:
    for split, names in (("train", ("aachen/x_0", "bochum/y_0")), ("val", ("ulm/z_0",)), ("test", ("bonn/t_0",))):
        for number, name in enumerate(names):
            write(root / "leftImg8bit" / split / f"{name}_leftImg8bit.png", picture(number))
            write(root / "gtFine" / split / f"{name}_gtFine_labelIds.png", np.full((4, 4), 33))
            mask = np.kron([[0, 1], [18, 255]], np.ones((2, 2)))
            write(root / "gtFine" / split / f"{name}_gtFine_labelTrainIds.png", mask)
            write(root / "gtFine" / split / f"{name}_gtFine_color.png", picture(3))
    return {"train": ["x_0_leftImg8bit", "y_0_leftImg8bit"], "val": ["z_0_leftImg8bit"]}, [[0, 1], [18, VOID]]


def make_camvid(root: Path) -> Made:
    for split, names in (("train", ("a", "b")), ("val", ("c",)), ("test", ("d",))):
        for number, name in enumerate(names):
            write(root / split / f"{name}.png", picture(number))
            write(root / f"{split}annot" / f"{name}.png", np.kron([[0, 1], [10, 11]], np.ones((2, 2))))
    return {"train": ["a", "b"], "val": ["c"]}, [[0, 1], [10, VOID]]


def make_plain(root: Path) -> Made:
    for split, names in (("train", ("deep/a", "b")), ("val", ("c",))):
        for number, name in enumerate(names):
            write(root / split / "images" / f"{name}.{'JPG' if number else 'png'}", picture(number))
            write(root / split / "masks" / f"{name}.png", np.kron([[0, 1], [2, 255]], np.ones((2, 2))))
        write(root / split / "masks" / "lonely.png", [[0]])
        (root / split / "images" / "notes.txt").write_text("no image")
    return {"train": ["b", "a"], "val": ["c"]}, [[0, 1], [2, VOID]]


MAKERS: dict[str, tuple[Callable[[Path], Made], int]] = {
    "folder": (make_plain, 3),
    "ade20k": (make_ade20k, 150),
    "voc": (make_voc, 21),
    "cityscapes": (make_cityscapes, 19),
    "camvid": (make_camvid, 11),
}


@pytest.mark.parametrize("dataset", MAKERS)
def test_each_layout_has_its_pairs_and_values(dataset: str, tmp_path: Path) -> None:
    make, classes = MAKERS[dataset]
    expected, labels = make(tmp_path)
    args = arguments(tmp_path, "--dataset", dataset, "--size", "4")
    for split, stems in expected.items():
        found = Labeled(args, split)
        assert [image.stem for image, _ in found.pairs] == stems
        assert len(found.classes) == len(set(found.classes)) == classes
        for number in range(len(found)):
            pixels, mask = found[number]
            assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 4, 4))
            assert np.array_equal(mask, np.kron(labels, np.ones((2, 2))))


def test_classes_are_those_that_the_benchmarks_publish() -> None:
    voc, cityscapes = LAYOUTS["voc"].classes, LAYOUTS["cityscapes"].classes
    assert [voc[n] for n in (0, 1, 7, 8, 12, 15, 16, 20)] == [
        *("background", "aeroplane", "car", "cat", "dog", "person", "pottedplant", "tvmonitor")
    ]
    assert [cityscapes[n] for n in (0, 2, 10, 13, 17, 18)] == [
        "road",
        "building",
        "sky",
        "car",
        "motorcycle",
        "bicycle",
    ]
    camvid = "sky building pole road pavement tree sign fence car pedestrian bicyclist"
    assert list(LAYOUTS["camvid"].classes) == camvid.split()


def test_the_demo_is_drawn_and_has_its_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "make_demo", partial(scenes.make_demo, train=3, val=2))
    args = arguments(tmp_path, "--dataset", "demo")
    train, val = (Labeled(args, split) for split in ("train", "val"))
    assert (len(train), len(val), train.classes) == (3, 2, scenes.CLASSES)
    pixels, mask = render_scene(0, "val", 1)
    again, labels = Labeled(arguments(tmp_path, "--dataset", "demo", "--size", "120"), "val")[1]
    assert np.array_equal(labels, mask[:, 20:140])
    assert abs(again.permute(1, 2, 0).numpy().astype(int) - pixels[:, 20:140]).mean() < 6  # the demo's are JPEG files


def test_real_photographs_have_their_masks(photographs: Path) -> None:
    args = arguments(photographs, "--dataset", "coco-stuff-27", "--train-images", "5", "--val-images", "7")
    train, val = (Labeled(args, split) for split in ("train", "val"))
    assert (len(train), len(val), len(val.classes)) == (5, 7, 27)
    everything = Labeled(arguments(photographs, "--dataset", "coco-stuff-27"), "val")
    assert len(everything) == 100
    assert everything.pairs[:7] == val.pairs
    image, mask = val.pairs[3]
    assert (image.parent.name, mask.parent, image.stem) == ("val2017", photographs / "semantic27/val2017", mask.stem)
    lines = [line.split() for line in (photographs / "classes27.txt").read_text().splitlines() if line[0] != "#"]
    assert list(val.classes) == [name for _, _, name in lines]
    whole = np.array(Image.open(mask))
    assert set(val[3][1].unique().tolist()) <= set(whole.ravel().tolist())


def test_the_center_square_is_taken_and_labels_are_never_mixed(tmp_path: Path) -> None:
    pixels = np.zeros((60, 100, 3), dtype=np.uint8)
    pixels[:, 20:80] = [200, 0, 0]
    pixels[:, 80:] = [0, 200, 0]
    mask = np.where(pixels[..., 0] > 0, 7, np.where(pixels[..., 1] > 0, 1, VOID))
    write(tmp_path / "val/images/a.png", pixels)
    write(tmp_path / "val/masks/a.png", mask)
    for size in (60, 30, 90):
        image, labels = Labeled(arguments(tmp_path, "--size", str(size)), "val")[0]
        assert image.shape == (3, size, size)
        assert labels.unique().tolist() == [7]
        middle = image[:, :, size // 8 : -size // 8].float().mean(dim=(1, 2))
        torch.testing.assert_close(middle, torch.tensor([200.0, 0, 0]), atol=1, rtol=0)


@pytest.mark.parametrize("size", [64, 50, 31])
def test_labels_stay_with_their_pixels(size: int, folder: Path) -> None:
    """The demo draws a gray image of the labels: what is seen of it says what the labels are, but at borders."""
    _, mask = render_scene(0, "train", 0, 96, 72)
    root = folder.parent / f"gray_{size}"
    write(root / "val/images/a.png", np.repeat(20 * mask[..., None], 3, axis=2))
    write(root / "val/masks/a.png", mask)
    image, labels = Labeled(arguments(root, "--size", str(size)), "val")[0]
    same = (image[0].float() / 20).round().long() == labels
    assert same.float().mean() > 0.85
    for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)):
        shifted = (image[0].float() / 20).round().long().roll((dy, dx), (0, 1)) == labels
        assert shifted.float().mean() < same.float().mean()


def test_a_list_of_validation_images_is_kept_to(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("2\n0\n")
    args = arguments(folder, "--val-list", str(tmp_path / "list.txt"))
    assert [image.stem for image, _ in Labeled(args, "val").pairs] == ["0", "2"]
    assert len(Labeled(args, "train")) == 4


def test_the_classes_of_a_folder_are_those_of_both_splits(tmp_path: Path) -> None:
    for split, largest in (("train", 2), ("val", 4)):
        write(tmp_path / split / "images/a.png", picture(1))
        write(tmp_path / split / "masks/a.png", np.kron([[0, 1], [largest, 255]], np.ones((2, 2))))
    args = arguments(tmp_path)
    assert len(Task(args, Labeled(args, "train"), Labeled(args, "val"), CPU).classes) == 5


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
"""The 91 stuff categories, 92 to 182, and the super-category that COCO-Stuff's hierarchy has each of them in."""

THINGS = "person vehicle outdoor animal accessory sports kitchen food furniture electronic appliance indoor"


def test_the_27_classes_hold_each_of_the_182_values_once() -> None:
    table = cocostuff.coarse_classes()
    assert (table.shape, table.dtype) == ((256,), np.uint8)
    assert (table[182:] == VOID).all()
    assert set(table[:182].tolist()) == set(range(27))
    assert list(cocostuff.CLASSES[:12]) == THINGS.split()
    assert (table[:91] < 12).all()
    assert ((table[91:182] >= 12) & (table[91:182] < 27)).all()
    written = [
        value
        for part in " ".join(cocostuff._VALUES.values()).split()
        for value in range(int(part.split("-")[0]), int(part.split("-")[-1]) + 1)
    ]
    assert sorted(written) == list(range(182))


def test_each_stuff_category_is_in_its_super_category() -> None:
    stuff = [entry.split() for entry in STUFF.replace("\n", " ").split(", ")]
    assert len(stuff) == 91
    table = cocostuff.coarse_classes()
    wrong = [name for n, (name, above) in enumerate(stuff) if cocostuff.CLASSES[table[91 + n]] != above]
    assert wrong == []


def test_each_thing_category_is_in_its_super_category(photographs: Path) -> None:
    categories = json.loads((photographs / "annotations/instances_val2017.json").read_text())["categories"]
    assert len(categories) == 80
    table = cocostuff.coarse_classes()
    for category in categories:
        assert cocostuff.CLASSES[table[category["id"] - 1]] == category["supercategory"], category


def refused(main: Callable[[list[str]], None], argv: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    """Run; expect exit status 2 and one line on stderr; return it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in argv])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert "Traceback" not in said
    return said


def test_coarse_masks_are_made_and_a_second_call_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = np.arange(256, dtype=np.uint8)
    values[182:255] = 255
    for name in ("train2017/a", "train2017/b", "val2017/c"):
        write(tmp_path / "maps" / f"{name}.png", values.reshape(16, 16))
    cocostuff.main([str(tmp_path / "maps"), str(tmp_path / "out")])
    made = sorted((tmp_path / "out").rglob("*.*"))
    assert [str(path.relative_to(tmp_path / "out")) for path in made] == [
        *("train2017/a.png", "train2017/b.png", "val2017/c.png")
    ]
    mask = np.array(Image.open(made[0]))
    table = cocostuff.coarse_classes()
    for value, label in zip(values.tolist(), mask.ravel().tolist()):
        assert label == table[value]
    assert (mask.ravel()[[0, 8, 91, 156, 255]] == [0, 1, 12, 25, VOID]).all()
    assert "3 masks" in capsys.readouterr().out

    made[1].unlink()
    write(made[0], [[5]])  # not made anew: what is there is kept
    cocostuff.main([str(tmp_path / "maps"), str(tmp_path / "out")])
    assert np.array(Image.open(made[0])).tolist() == [[5]]
    assert np.array_equal(np.array(Image.open(made[1])), mask)


@pytest.mark.parametrize("bad", ["a value", "colors", "no picture", "16 bit", "empty"])
def test_maps_of_another_kind_are_refused(bad: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "maps/train2017/a.png"
    file.parent.mkdir(parents=True)
    if bad == "a value":
        write(file, [[0, 182]])
    elif bad == "colors":
        write(file, picture(1))
    elif bad == "no picture":
        file.write_text("none")
    elif bad == "16 bit":
        Image.fromarray(np.array([[0, 300]], dtype=np.uint16)).save(file)
    line = refused(cocostuff.main, [tmp_path / "maps", tmp_path / "out"], capsys)
    assert (str(tmp_path / "maps") if bad == "empty" else str(file)) in line
    assert not list((tmp_path / "out").rglob("*.*"))


def test_a_folder_of_coarse_masks_that_cannot_be_made_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "maps/val2017/a.png", [[0]])
    (tmp_path / "out").write_text("a file")
    assert str(tmp_path / "out") in refused(cocostuff.main, [tmp_path / "maps", tmp_path / "out"], capsys)


# Features and their cache


class Counting(nn.Module):
    """An encoder of a mean for each 16 x 16 pixels, which counts the images that it sees."""

    def __init__(self, stop_at: int | None = None):
        super().__init__()
        self.seen, self.stop_at = 0, stop_at

    def forward(self, images: Tensor) -> Tensor:
        if images.any():  # all zeros are looked at for the sizes of a map alone
            self.seen += len(images)
        if self.stop_at is not None and self.seen >= self.stop_at:
            raise KeyboardInterrupt
        return F.avg_pool2d(images, 16)


FACTS: dict[str, object] = {"encoder": "teacher", "source_sha256": "abc", "layer": "map", "stride": 32}


def extracted(see: Counting, cache: Path, root: Path, *more: str, **facts: object) -> Features:
    args = arguments(root, "--cache", str(cache), "--batch-size", "2", *more)
    return features.extract(see, Labeled(args, "train"), args, CPU, FACTS | facts)


def test_features_are_those_of_each_image_alone(folder: Path, tmp_path: Path) -> None:
    network = build_network(untrained_encoder("resnet18", 0))
    args = arguments(folder, "--cache", str(tmp_path), "--batch-size", "3")
    data = Labeled(args, "train")
    found = features.extract(network, data, args, CPU, FACTS)
    assert found.maps.shape == (4, 2, 2, 512)
    assert (found.maps.dtype, found.labels.dtype, found.labels.shape) == (np.float16, np.uint8, (4, 64, 64))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for number in range(4):
        image, labels = data[number]
        seen = network(((image / 255 - mean[:, None, None]) / std[:, None, None])[None])[0]
        np.testing.assert_allclose(found.maps[number].transpose(2, 0, 1), seen.numpy(), rtol=2e-3, atol=2e-3)
        assert np.array_equal(found.labels[number], labels)
    chosen = np.array([5, 0, 13])
    cells = found.cells(chosen)
    for row, cell in zip(cells, chosen):
        n, y, x = np.unravel_index(cell, (4, 2, 2))
        assert np.array_equal(row.numpy(), found.maps[n, y, x].astype(np.float32))


def test_the_same_call_again_does_not_run_the_encoder(folder: Path, tmp_path: Path) -> None:
    first, second = Counting(), Counting()
    before = extracted(first, tmp_path, folder)
    after = extracted(second, tmp_path, folder)
    assert (first.seen, second.seen) == (4, 0)
    assert np.array_equal(before.maps, after.maps)
    assert np.array_equal(before.labels, after.labels)


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        ([], {"source_sha256": "abd"}),
        ([], {"encoder": "student"}),
        ([], {"layer": "projections"}),
        ([], {"stride": 16}),
        (["--size", "48"], {}),
        (["--train-images", "3"], {}),
    ],
    ids=str,
)
def test_anything_else_does_run_the_encoder(
    flags: list[str], facts: dict[str, object], folder: Path, tmp_path: Path
) -> None:
    extracted(Counting(), tmp_path, folder)
    other = Counting()
    found = extracted(other, tmp_path, folder, *flags, **facts)
    assert other.seen == len(found.maps) > 0
    again = Counting()
    extracted(again, tmp_path, folder)
    assert again.seen == 0


@pytest.mark.parametrize("changed", ["images", "masks"])
def test_a_file_that_was_changed_is_looked_at_anew(changed: str, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", 2, 1)
    before = extracted(Counting(), tmp_path / "cache", root)
    before = Features(np.array(before.maps), np.array(before.labels))
    path = root / "train" / changed / "1.png"
    write(path, np.array(Image.open(path))[::-1])
    os.utime(path, (1, 1))
    after = extracted(Counting(), tmp_path / "cache", root)
    assert np.array_equal(before.maps, after.maps) == (changed == "masks")
    assert np.array_equal(before.labels, after.labels) == (changed == "images")


def test_an_interrupted_extraction_is_not_taken_for_complete(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        extracted(Counting(stop_at=3), tmp_path, folder)
    assert list(tmp_path.rglob("maps.npy"))
    again = Counting()
    found = extracted(again, tmp_path, folder)
    assert again.seen == 4
    whole = extracted(Counting(), tmp_path / "other", folder)
    assert np.array_equal(found.maps, whole.maps)
    assert np.array_equal(found.labels, whole.labels)


def test_features_beyond_half_precision_stay_finite(folder: Path, tmp_path: Path) -> None:
    args = arguments(folder, "--cache", str(tmp_path))
    found = features.extract(lambda x: 1e6 * F.avg_pool2d(x, 16), Labeled(args, "train"), args, CPU, FACTS)
    assert np.isfinite(found.maps).all()
    assert abs(found.maps).max() == np.finfo(np.float16).max


def test_a_disk_without_room_is_told_before_anything_is_computed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = argparse.Namespace(free=100)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: free)
    see = Counting()
    with pytest.raises(UsageError, match="--cache"):
        extracted(see, tmp_path, folder)
    assert see.seen == 0


def test_another_checkpoint_size_and_stride_are_told_apart_by_the_commands_task(folder: Path, tmp_path: Path) -> None:
    seen = []

    def look(seed: int, *flags: str) -> int:
        args = arguments(folder, "--cache", str(tmp_path), *flags)
        data = Labeled(args, "val")
        see = Counting()
        encoder = read_or_make(seed)
        Task(args, data, data, CPU).look(data, see, encoder)
        seen.append(see.seen)
        return see.seen

    def read_or_make(seed: int) -> Any:
        return argparse.Namespace(provenance={"encoder": "teacher", "source_sha256": str(seed)})

    assert [look(0), look(0), look(1), look(0, "--output-stride", "16"), look(0, "--size", "80"), look(1)] == [
        *(3, 0, 3, 3, 3, 0)
    ]


def untrained_projections(slots_path: Path, folder: Path, cache: Path) -> Features:
    args = arguments(folder, "--cache", str(cache))
    args.checkpoint = str(slots_path)
    data = Labeled(args, "val")
    return unsupervised_segmentation.probe(make_task(args, data), untrained_encoder("resnet18", 0)).seen


def make_task(args: argparse.Namespace, data: Labeled) -> Task:
    args.clusters, args.prototypes = None, True
    return Task(args, data, data, CPU)


def test_the_baselines_projections_are_told_apart_by_the_sizes_of_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    """Two checkpoints of one architecture, of other heads: the untrained projector is not the same, either."""
    for name, more in (("a", []), ("b", ["--dim-out", "24"]), ("c", ["--dim-hidden", "48"])):
        args = main_pretrain.parse_args(["--dataset", "folder", "--data-dir", str(folder), *TINY, *more])
        torch.save({"model": build_method(args).state_dict()}, tmp_path / f"{name}.pth")
    for name in "abc":
        shared = untrained_projections(tmp_path / f"{name}.pth", folder, tmp_path / "cache")
        alone = untrained_projections(tmp_path / f"{name}.pth", folder, tmp_path / name)
        assert np.array_equal(shared.maps, alone.maps), name


# Trained models


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of main_pretrain after two steps."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    flags = ["--dataset", "folder", "--data-dir", str(images), *TINY, "--epochs", "1", "--warmup-epoch", "0"]
    main_pretrain.main([*flags, "--output-dir", str(out)])
    return out / "current.pth"


@pytest.fixture(scope="module")
def released(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as the authors' files are: a Namespace, and DDP's prefix."""
    state = torch.load(trained, weights_only=True)
    model = {f"module.{name}": value for name, value in state["model"].items()}
    path = tmp_path_factory.mktemp("released") / "slotcon.pth"
    torch.save({"args": argparse.Namespace(arch="resnet50", epochs=800), "model": model, "epoch": 800}, path)
    return path


@pytest.fixture(scope="module")
def torchvisions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("torchvision") / "resnet18.pth"
    torch.manual_seed(5)
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


@pytest.mark.parametrize("file", ["trained", "released"])
@pytest.mark.parametrize(("which", "half"), [(None, "k"), ("teacher", "k"), ("student", "q")])
def test_encoder_and_slots_are_those_of_the_checkpoint(
    file: str, which: str | None, half: str, trained: Path, request: pytest.FixtureRequest, images: Path
) -> None:
    path = request.getfixturevalue(file)
    args = main_pretrain.parse_args(["--dataset", "folder", "--data-dir", str(images), *TINY])
    method: Any = build_method(args).eval()
    method.load_state_dict(torch.load(trained, weights_only=True)["model"])
    batch = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    encoder, slots = load_encoder(path, which), load_slots(path, which)
    for network in (encoder, slots):
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
    with torch.no_grad():
        expected = getattr(method, f"encoder_{half}")(batch)
        projected = getattr(method, f"projector_{half}")(expected)
    torch.testing.assert_close(encoder(batch), expected)
    prototypes = getattr(method, f"grouping_{half}").slot_embed.weight.detach()
    assert torch.equal(slots.prototypes, prototypes)
    projections, scores = slots(batch)
    assert (projections.shape, scores.shape) == ((2, 16, 2, 3), (2, 8, 2, 3))
    torch.testing.assert_close(projections, projected)
    cosine = F.cosine_similarity(projected[:, None], prototypes[None, :, :, None, None], dim=2)
    torch.testing.assert_close(scores, cosine)
    for image, one in zip(projections, scores):
        torch.testing.assert_close(clusters.nearest(slots.prototypes, image), one)


def test_a_torchvision_file_is_its_network(torchvisions: Path) -> None:
    theirs = torchvision.models.resnet18()
    theirs.load_state_dict(torch.load(torchvisions, weights_only=True))
    batch = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = nn.Sequential(*list(theirs.eval().children())[:-2])(batch)
    torch.testing.assert_close(load_encoder(torchvisions)(batch), expected)
    with pytest.raises(UsageError, match="no prototypes"):
        load_slots(torchvisions)


@pytest.mark.parametrize("damage", ["a layer less", "another width", "not finite"])
def test_slots_that_are_not_whole_are_refused(damage: str, trained: Path, tmp_path: Path) -> None:
    model = torch.load(trained, weights_only=True)["model"]
    if damage == "a layer less":
        del model["projector_k.mlp.6.weight"]
    elif damage == "another width":
        model["grouping_k.slot_embed.weight"] = torch.ones(8, 12)
    else:
        model["grouping_k.slot_embed.weight"][3, 1] = torch.nan
    torch.save({"model": model}, tmp_path / "damaged.pth")
    with pytest.raises(UsageError, match=r"damaged\.pth"):
        load_slots(tmp_path / "damaged.pth")


def test_strides_below_32_are_dilations_of_the_same_weights() -> None:
    encoder = untrained_encoder("resnet50", 0)
    for name, value in encoder.weights.items():
        if name.endswith("bn3.weight"):
            value.fill_(0.2)  # blocks start as the identity, where dilation has no effect
    batch = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for stride, dilated in ((32, (False, False, False)), (16, (False, False, True)), (8, (False, True, True))):
        network = build_network(encoder, stride)
        theirs = torchvision.models.resnet50(replace_stride_with_dilation=dilated)
        theirs.load_state_dict({**theirs.state_dict(), **encoder.weights})
        with torch.no_grad():
            expected = nn.Sequential(*list(theirs.eval().children())[:-2])(batch)
        assert expected.shape == (1, 2048, 64 // stride, 64 // stride)
        torch.testing.assert_close(network(batch), expected)


def test_an_untrained_encoder_is_that_of_its_seed_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(2)
    torch.manual_seed(11)
    first, again, other = (untrained_encoder("resnet18", seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(2), expected)
    name = "layer3.0.conv1.weight"
    assert torch.equal(first.weights[name], again.weights[name])
    assert not torch.equal(first.weights[name], other.weights[name])
    assert first.provenance == again.provenance
    assert first.provenance["source_sha256"] != other.provenance["source_sha256"]
    assert untrained_encoder("resnet34", 0).provenance["source_sha256"] != first.provenance["source_sha256"]


def test_untrained_slots_have_the_sizes_of_the_trained_ones(trained: Path) -> None:
    slots = load_slots(trained)
    network = build_network(untrained_encoder("resnet18", 0))
    first, again, other = (untrained_slots(slots, network, seed) for seed in (0, 0, 1))
    shapes = {name: value.shape for name, value in slots.state_dict().items()}
    assert {name: value.shape for name, value in first.state_dict().items()} == shapes
    assert torch.equal(first.prototypes, again.prototypes)
    assert not torch.equal(first.prototypes, other.prototypes)
    assert not torch.equal(first.prototypes, slots.prototypes)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    timm = pytest.importorskip("timm")
    path = tmp_path_factory.mktemp("vit") / "vit.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), path)
    return path


def test_the_tokens_of_a_vit_lie_where_their_patches_do(vit: Path) -> None:
    network = load_encoder(vit)
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    seen = network(image)
    assert seen.shape == (1, 192, 4, 6)
    tokens = network.vit.forward_features(image)[0, 1:]
    for y, x in np.ndindex(4, 6):
        torch.testing.assert_close(seen[0, :, y, x], tokens[6 * y + x])
    other = image.clone()
    other[:, :, 16:32, 48:64] += 3
    changed = (network(other) - seen).norm(dim=1)[0]
    assert divmod(int(changed.argmax()), 6) == (1, 3)


# The commands


def launch(name: str, argv: list[object], cwd: Path, processes: int = 1) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "transfer" / "probe" / f"{PROBES[name].__name__.rpartition('.')[2]}.py")
    start = [sys.executable, script]
    if processes > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", script]
    more = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    words = [*start, *[str(word) for word in argv]]
    return subprocess.run(words, cwd=cwd, env=os.environ | more, capture_output=True, text=True, check=False)


def results(out: Path) -> dict[str, Any]:
    """results.json, which is JSON as other languages read it."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads((out / "results.json").read_text(), parse_constant=refuse)


def real(photographs: Path, *more: object) -> list[object]:
    where = ["--data-dir", photographs, "--dataset", "coco-stuff-27", "--train-images", "6", "--val-images", "4"]
    return [*where, *SMALL, *more]


@pytest.mark.parametrize(
    ("name", "flags", "measures"),
    [
        ("linear", ["--steps", "50"], ["linear probe"]),
        ("knn", ["--memory", "100"], ["nearest neighbors"]),
        ("unsupervised", ["--prototypes"], ["Hungarian, one to one", "majority, many to one"]),
    ],
)
def test_each_command_measures_a_checkpoint_and_its_baseline_on_real_photographs(
    name: str, flags: list[str], measures: list[str], trained: Path, photographs: Path, tmp_path: Path
) -> None:
    done = launch(name, [trained, *real(photographs, "--baseline", "random", *flags)], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    out = tmp_path / "output" / "probe" / f"{name}_coco-stuff-27_run_current"
    assert sorted(path.name for path in out.iterdir()) == ["predictions.png", "results.json", "results.md"]
    content = results(out)
    assert content["images"] == {"train": 6, "val": 4}
    assert content["checkpoint"]["arch"] == "resnet18"
    assert content["args"]["size"] == 64
    table = (out / "results.md").read_text()
    assert table in done.stdout
    assert list(content["results"]) == ["checkpoint", "untrained"]
    for which, of in content["results"].items():
        assert list(of) == measures
        for measure, numbers in of.items():
            assert 0 <= numbers["miou"] <= 100
            assert 0 < numbers["accuracy"] <= 100
            assert list(numbers["iou"]) == list(cocostuff.CLASSES)
            known = [value for value in numbers["iou"].values() if value is not None]
            assert numbers["miou"] == pytest.approx(sum(known) / len(known))
            row = f"| {which} | {measure} | {numbers['miou']:.2f} | {numbers['accuracy']:.2f} |"
            assert row in table.splitlines()
    with Image.open(out / "predictions.png") as shown:
        assert shown.size == (4 * 64 + 110, 4 * 64)
        pixels = np.array(shown)
    args = arguments(photographs, "--dataset", "coco-stuff-27", "--val-images", "4")
    for number in range(4):
        image, labels = Labeled(args, "val")[number]
        left = 110 + 64 * number
        assert np.array_equal(pixels[:64, left : left + 64], image.permute(1, 2, 0))
        black = (pixels[64:128, left : left + 64] == 0).all(axis=2)
        assert np.array_equal(black, labels == VOID)


def run_here(name: str, checkpoint: object, root: Path, out: Path, *flags: object) -> dict[str, Any]:
    """A command in this process on layout `folder`; its results.json."""
    words = [checkpoint, "--data-dir", root, "--cache", out / "cache", "--out", out / "results", *SMALL]
    PROBES[name].main([str(word) for word in (*words, *OWN[name], *flags)])
    return results(out / "results")


@pytest.mark.parametrize("name", PROBES)
def test_random_gives_the_same_numbers_twice(name: str, folder: Path, tmp_path: Path) -> None:
    first, second = (
        run_here(name, "random", folder, tmp_path / part, "--arch", "resnet18", "--baseline", "random")
        for part in ("a", "b")
    )
    assert first["results"] == second["results"]
    assert first["results"]["checkpoint"] == first["results"]["untrained"]
    assert first["checkpoint"]["encoder"] == "untrained"


@pytest.mark.parametrize("name", PROBES)
def test_the_validation_images_are_those_that_are_scored(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = []

    def recording(seen: Features, *more: Any) -> Any:
        scored.append(np.array(seen.labels))
        return count(seen, *more)

    monkeypatch.setattr(PROBES[name], "count", recording)
    run_here(name, "random", folder, tmp_path, "--arch", "resnet18")
    val = Labeled(arguments(folder), "val")
    assert np.array_equal(scored, [[labels.numpy() for _, labels in (val[number] for number in range(len(val)))]])


@pytest.mark.parametrize("file", ["torchvisions", "released"])
def test_files_of_others_are_measured(file: str, folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    content = run_here("knn", request.getfixturevalue(file), folder, tmp_path)
    assert content["checkpoint"]["arch"] == "resnet18"
    assert content["checkpoint"]["encoder"] == ("only" if file == "torchvisions" else "teacher")


def test_a_second_call_takes_the_features_from_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_here("knn", "random", folder, tmp_path, "--arch", "resnet18")
    monkeypatch.setattr(features, "_fill", lambda *args: pytest.fail("the encoder ran again"))
    assert run_here("knn", "random", folder, tmp_path, "--arch", "resnet18")["results"] == first["results"]


def test_coco_stuff_has_27_clusters_if_nothing_else_is_said(photographs: Path, tmp_path: Path, trained: Path) -> None:
    words = [trained, *real(photographs, "--cache", tmp_path / "cache", "--out", tmp_path / "out")]
    unsupervised_segmentation.main([str(word) for word in (*words, "--output-stride", "32", "--train-images", "10")])
    assert results(tmp_path / "out")["args"]["clusters"] == 27


def test_more_prototypes_than_classes_are_left_over_one_to_one(trained: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for number in range(2):
            pixels, mask = render_scene(1, split, number, 64, 64)
            write(tmp_path / "data" / split / "images" / f"{number}.png", pixels)
            write(tmp_path / "data" / split / "masks" / f"{number}.png", mask > 3)
    words = [trained, "--data-dir", tmp_path / "data", "--out", tmp_path / "out", "--cache", tmp_path / "c", *SMALL]
    unsupervised_segmentation.main([str(word) for word in words])
    scores = results(tmp_path / "out")["results"]["checkpoint"]
    assert scores["majority, many to one"]["accuracy"] >= scores["Hungarian, one to one"]["accuracy"]


def test_two_processes_of_torchrun_extract_the_features_of_one_and_give_its_numbers(
    folder: Path, tmp_path: Path
) -> None:
    one = run_here("knn", "random", folder, tmp_path / "one", "--arch", "resnet18")
    words = ["random", "--arch", "resnet18", "--data-dir", folder, *SMALL, *OWN["knn"]]
    done = launch("knn", [*words, "--cache", "cache", "--out", "two"], tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    alone, together = tmp_path / "one" / "cache", tmp_path / "cache"
    files = sorted(path.relative_to(alone) for path in alone.rglob("*.npy"))
    assert files == sorted(path.relative_to(together) for path in together.rglob("*.npy"))
    assert len(files) == 4
    for file in files:
        np.testing.assert_allclose(np.load(together / file), np.load(alone / file), atol=2e-3, rtol=2e-3)
    two = results(tmp_path / "two")["results"]["checkpoint"]["nearest neighbors"]
    for measure in ("miou", "accuracy"):
        assert two[measure] == pytest.approx(one["results"]["checkpoint"]["nearest neighbors"][measure], abs=0.5)


@pytest.mark.parametrize("name", [*PROBES, "cocostuff"])
def test_the_help_names_the_flags(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        {**PROBES, "cocostuff": cocostuff}[name].main(["--help"])
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    assert all(flag in told for flag in ([flag for flag in OWN[name] if flag[0] == "-"] if name in OWN else ["OUT"]))


# Mistakes


def mistake(
    name: str, checkpoint: object, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *flags: object
) -> str:
    words = [checkpoint, "--arch", "resnet18", "--data-dir", root, "--cache", tmp_path / "cache", *SMALL, *flags]
    line = refused(PROBES[name].main, [*words, "--out", tmp_path / "out"], capsys)
    assert not (tmp_path / "out").exists()
    return line


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        *(("knn", ["--size", value]) for value in ("0", "-5")),
        *(("linear", ["--steps", value]) for value in ("0", "-3")),
        *(("linear", ["--lr", value]) for value in ("-1", "nan")),
        *(("unsupervised", ["--clusters", value]) for value in ("0", "-2", "100000")),
        *(("knn", ["--memory", value]) for value in ("0", "-1")),
        *(("knn", ["--neighbors", value]) for value in ("0", "-1")),
        *(("knn", ["--temperature", value]) for value in ("0", "-1", "nan")),
        *(("knn", ["--train-images", value]) for value in ("0", "-1")),
        *(("knn", ["--val-images", value]) for value in ("0", "-1")),
        *(("knn", ["--batch-size", value]) for value in ("0", "-1")),
        ("knn", ["--num-workers", "-1"]),
        ("knn", ["--seed", "-1"]),
        ("knn", ["--output-stride", "16"]),
        ("knn", ["--output-stride", "7"]),
        ("knn", ["--dataset", "imagenet"]),
        ("knn", ["--arch", "resnet19"]),
        ("knn", ["--neighbors", "3"]),
    ],
    ids=str,
)
def test_a_wrong_flag_is_named(
    name: str, flags: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = OWN[name] if name == "unsupervised" else []
    assert flags[0] in mistake(name, "random", folder, tmp_path, capsys, *own, *flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_not_there_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--device cuda" in mistake("knn", "random", folder, tmp_path, capsys, "--device", "cuda")


def test_a_checkpoint_without_prototypes_is_told_what_to_do(
    torchvisions: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = mistake("unsupervised", torchvisions, folder, tmp_path, capsys)
    assert str(torchvisions) in line
    assert "no prototypes" in line
    assert "--clusters" in line


def test_random_has_no_prototypes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--clusters" in mistake("unsupervised", "random", folder, tmp_path, capsys)


def test_clusters_and_prototypes_are_not_both_asked_for(
    trained: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--prototypes" in mistake("unsupervised", trained, folder, tmp_path, capsys, "--clusters", 2, "--prototypes")


def test_a_checkpoint_that_is_not_there_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "nowhere.pth" in mistake("knn", "nowhere.pth", folder, tmp_path, capsys)
    assert str(folder) in mistake("knn", folder, folder, tmp_path, capsys)


def break_mask(root: Path) -> str:
    write(root / "train/masks/1.png", np.zeros((9, 9)))
    return "1.png: is 9 x 9"


def break_channels(root: Path) -> str:
    write(root / "val/masks/1.png", picture(1, 96, 72))
    return "3 channels"


def break_image(root: Path) -> str:
    (root / "train/images/1.png").write_bytes((root / "train/images/1.png").read_bytes()[:200])
    return "train/images/1.png"


def break_image_text(root: Path) -> str:
    (root / "val/images/1.png").write_text("none")
    return "val/images/1.png"


def break_mask_file(root: Path) -> str:
    (root / "train/masks/1.png").write_bytes((root / "train/masks/1.png").read_bytes()[:60])
    return "train/masks/1.png"


def break_chunk(root: Path) -> str:
    """A PNG whose second chunk has a length and a name that are none."""
    file = root / "train/masks/1.png"
    whole = file.read_bytes()
    file.write_bytes(whole[:33] + b"\xff" * 8 + whole[41:])
    return "train/masks/1.png"


def break_void(root: Path) -> str:
    for file in (root / "train/masks").iterdir():
        write(file, np.full((72, 96), VOID))
    return "void"


def break_void_of_val(root: Path) -> str:
    for file in (root / "val/masks").iterdir():
        write(file, np.full((72, 96), VOID))
    return "void"


def break_16_bit(root: Path) -> str:
    """More classes than a mask of 8 bits can name."""
    Image.fromarray(np.full((72, 96), 300, dtype=np.uint16)).save(root / "val/masks/1.png")
    return "val/masks/1.png"


BREAKS = [break_mask, break_channels, break_image, break_image_text, break_mask_file, break_chunk]
BREAKS += [break_void, break_void_of_val, break_16_bit]


@pytest.mark.parametrize(("damage", "name"), [*((damage, "knn") for damage in BREAKS), (break_void, "linear")])
def test_files_that_are_no_pairs_are_named(
    damage: Callable[[Path], str], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path / "data", 2, 2)
    named = damage(root)
    assert named in mistake(name, "random", root, tmp_path, capsys)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_what_a_process_that_decodes_images_finds_is_one_line(
    workers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path / "data", 2, 2)
    named = break_mask(root)
    assert named in mistake("knn", "random", root, tmp_path, capsys, "--num-workers", workers)


@pytest.mark.parametrize("dataset", ["voc", "cityscapes", "camvid", "ade20k"])
def test_labels_above_the_number_of_classes_are_named(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    MAKERS[dataset][0](tmp_path / "data")
    mask = LAYOUTS[dataset].pairs(tmp_path / "data", "training" if dataset == "ade20k" else "train")[0][1]
    values = np.zeros((4, 4))
    values[1, 2] = 200
    write(mask, values)
    line = mistake("knn", "random", tmp_path / "data", tmp_path, capsys, "--dataset", dataset)
    assert str(mask) in line
    assert "200" in line
    assert str(MAKERS[dataset][1]) in line


@pytest.mark.parametrize("dataset", [name for name in LAYOUTS if name != "demo"])
def test_a_folder_without_pairs_is_named(dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "data"
    write(root / "train/images/a.png", picture(1))
    line = mistake("knn", "random", root, tmp_path, capsys, "--dataset", dataset)
    assert str(root) in line
    assert dataset in line
    assert "--data-dir" in mistake("knn", "random", tmp_path / "none", tmp_path, capsys, "--dataset", dataset)


def test_a_listed_image_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_voc(tmp_path / "data")
    (tmp_path / "data/JPEGImages/a.jpg").unlink()
    assert "a.jpg" in mistake("knn", "random", tmp_path / "data", tmp_path, capsys, "--dataset", "voc")


def test_a_val_list_that_is_missing_or_names_none_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = tmp_path / "list.txt"
    assert f"--val-list {listed}" in mistake("knn", "random", folder, tmp_path, capsys, "--val-list", listed)
    listed.write_text("other\n")
    assert "--val-list" in mistake("knn", "random", folder, tmp_path, capsys, "--val-list", listed)


def test_a_cache_that_cannot_be_made_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("a file")
    cache = tmp_path / "file" / "cache"
    assert "--cache" in mistake("knn", "random", folder, tmp_path, capsys, "--cache", cache)


def test_results_that_cannot_be_written_are_told_before_anything_is_computed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("a file")
    words = ["random", "--arch", "resnet18", "--data-dir", folder, "--cache", tmp_path / "cache", *SMALL]
    line = refused(knn_segmentation.main, [*words, "--out", tmp_path / "file"], capsys)
    assert "--out" in line
    assert not (tmp_path / "cache").exists()


def test_a_vit_has_an_untrained_baseline(vit: Path, folder: Path, tmp_path: Path) -> None:
    found = run_here("knn", vit, folder, tmp_path, "--baseline", "random")
    assert found["results"].keys() == {"checkpoint", "untrained"}


def test_a_size_that_is_not_of_whole_patches_is_named(
    vit: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--size" in mistake("knn", vit, folder, tmp_path, capsys, "--size", "72")


def test_a_vit_is_measured(vit: Path, folder: Path, tmp_path: Path) -> None:
    assert run_here("knn", vit, folder, tmp_path)["checkpoint"]["arch"] == "vit_tiny_patch16_224"


def test_the_provenance_in_the_results_is_that_of_the_file(trained: Path, folder: Path, tmp_path: Path) -> None:
    content = run_here("knn", trained, folder, tmp_path, "--encoder", "student")
    assert content["checkpoint"] == read_encoder(trained, "student").provenance
