"""viz_slots.py: prototype statistics, regions, figures, exported files, and refused calls."""

import csv
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image
from torch import Tensor

import main_pretrain
import utils.checkpoint
import viz_slots
from data.views import center_view
from models import build_method
from tests.helpers import TINY, run_expecting_usage_error
from tests.reference import grouping
from transfer.figures.extractor import CenterCrops, SlotBatch, SlotExtractor
from transfer.figures.layout import IMAGE_SUFFIXES, new_figure, save_figure
from transfer.figures.maps import compute_slot_maps, draw_maps, place_numbers
from transfer.figures.nearest_images import NearestImages
from transfer.figures.neighbors import draw_neighbors
from transfer.figures.prototype_page import collect_data
from transfer.figures.prototype_stats import PrototypeStats
from transfer.figures.regions import connected_regions, highlight_region, pixels_by_depth, region_outline, region_side
from transfer.figures.slot_export import encode_mask
from transfer.figures.strips import render_strips
from transfer.figures.tsne import draw_points, draw_tsne, group_by_prototype, sample_projections
from transfer.figures.usage import draw_usage
from transfer.slot_model import load_slot_model
from utils.files import link_or_copy
from utils.visualization import assign_pixels, normalize, palette, slot_grid

Captured = pytest.CaptureFixture[str]

K, SIZE = 8, 96
UNUSED = (5, 7)
FLAGS = ["--image-size", str(SIZE), "--device", "cpu", "--num-workers", "0", "--dpi", "40"]


def read_crops(images: Path) -> Tensor:
    """(N, 3, SIZE, SIZE) uint8: the largest central square of each image."""
    crops = []
    for path in sorted(images.iterdir()):
        with Image.open(path) as image:
            crops.append(center_view(image, SIZE))
    return torch.stack(crops)


@pytest.fixture(scope="module")
def state(images: Path) -> dict[str, Any]:
    """A checkpoint whose prototypes are projections of the images, except two that no image uses.

    Output 0 of the projector is the largest norm of the other outputs, so that the cosine of two projections is not
    negative. The unused prototypes point away from output 0, so that their cosine with every projection is negative.
    """
    flags = ["--dataset", "folder", "--data-dir", str(images), *TINY, "--image-size", str(SIZE // 2)]
    args = main_pretrain.parse_args(flags)
    torch.manual_seed(0)
    method: Any = build_method(args).eval()
    inputs = normalize(read_crops(images) / 255)
    with torch.no_grad():
        for half, stride in (("q", 16), ("k", 17)):
            encoder, projector = getattr(method, f"encoder_{half}"), getattr(method, f"projector_{half}")
            for name, parameter in encoder.named_parameters():
                if name.endswith("bn2.weight"):
                    parameter.fill_(1)  # initialized as 0, which makes all positions similar
            projector.mlp[6].weight[0] = 0
            projections = projector(encoder(inputs)).transpose(0, 1).flatten(1).T
            projector.mlp[6].bias -= projections.mean(dim=0)
            projections -= projections.mean(dim=0)
            largest = projections.norm(dim=1).max()
            projector.mlp[6].bias[0] += largest
            projections[:, 0] += largest
            prototypes = getattr(method, f"grouping_{half}").slot_embed.weight
            prototypes.copy_(projections[torch.arange(K) * stride])
            prototypes[list(UNUSED)] = -torch.eye(prototypes.shape[1])[0]
    return {"args": vars(args), "model": method.state_dict(), "epoch": 3}


@pytest.fixture(scope="module")
def checkpoints(state: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole checkpoint and others that lack something."""
    folder = tmp_path_factory.mktemp("checkpoints")
    encoder = {name[10:]: value for name, value in state["model"].items() if name.startswith("encoder_k.")}
    torch.save(state, folder / "current.pth")
    torch.save({"model": encoder, "args": state["args"]}, folder / "backbone.pth")
    torch.save({"model": state["model"], "args": {"data_dir": "/missing"}}, folder / "moved.pth")
    torch.save({"model": state["model"]}, folder / "no_args.pth")
    return folder


@pytest.fixture
def checkpoint(checkpoints: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run" / "current.pth"
    path.parent.mkdir()
    link_or_copy(path, checkpoints / "current.pth")
    return path


def command(checkpoint: Path, *flags: str) -> list[str]:
    return ["--model_path", str(checkpoint), *FLAGS, *flags]


def export(checkpoint: Path, folder: Path, *flags: str) -> dict[str, np.ndarray]:
    viz_slots.main(command(checkpoint, "--export", str(folder), "--topk", "3", *flags))
    with np.load(folder / "prototypes.npz") as arrays:
        return dict(arrays)


def read_scores(folder: Path) -> np.ndarray:
    paths = [row["scores"] for row in csv.DictReader((folder / "images.csv").open())]
    return np.stack([np.load(folder / path)["scores"] for path in paths])


# Statistics


def rank_by_sorting(scores: np.ndarray, k: int) -> list[list[int]]:
    """The k highest-scoring images of each prototype from all scores (N, K); ties go to the lower index."""
    rankings = []
    for column in scores.T:
        candidates = [index for index in range(len(column)) if column[index] > -np.inf]
        rankings.append(sorted(candidates, key=lambda index: (-column[index], index))[:k])
    return rankings


@pytest.mark.parametrize("batch_size", [1, 7, 200])
@pytest.mark.parametrize("shuffled", [False, True])
def test_nearest_images_equal_those_from_sorting_all_scores(batch_size: int, shuffled: bool) -> None:
    rng = np.random.default_rng(0)
    scores = np.round(rng.standard_normal((200, 12)), 1).astype(np.float32)  # rounded, so that there are ties
    scores[rng.random(scores.shape) < 0.3] = -np.inf
    scores[:, 4] = -np.inf
    nearest = NearestImages(12, 10)
    indices = rng.permutation(200) if shuffled else np.arange(200)
    for batch in np.split(indices, range(batch_size, 200, batch_size)):
        nearest.update(torch.from_numpy(batch), torch.from_numpy(scores[batch]))
    expected = [[(index, scores[index, k]) for index in row] for k, row in enumerate(rank_by_sorting(scores, 10))]
    assert [nearest.ranking(prototype) for prototype in range(12)] == expected
    assert expected[4] == []


def test_prototype_stats_equal_the_reference() -> None:
    rng = np.random.default_rng(3)
    projections, prototypes = torch.from_numpy(rng.standard_normal((9, 5, 3, 4))), torch.from_numpy(rng.random((6, 5)))
    scores = torch.einsum("kd,bdhw->bkhw", F.normalize(prototypes, dim=1), F.normalize(projections, dim=1))
    batch = SlotBatch(torch.arange(9), torch.zeros(9, 3, 8, 8), torch.zeros(9, 4), projections, scores)
    stats = PrototypeStats(prototypes, 0.05, topk=9)
    for part in (slice(0, 2), slice(2, 9)):
        stats.update(SlotBatch(*(tensor[part] for tensor in batch)))

    used = grouping.occupied(scores.numpy())
    slots = grouping.slots(projections.numpy(), scores.numpy(), 0.05)
    similarity = np.array(
        [[grouping.unit(z) @ grouping.unit(p) for z, p in zip(row, prototypes.numpy())] for row in slots]
    )
    similarity[~used] = -np.inf
    assignment = scores.numpy().argmax(axis=1)
    assert stats.num_images == 9
    assert stats.image_counts.tolist() == used.sum(axis=0).tolist()
    assert stats.slots_histogram.tolist() == [int((used.sum(axis=1) == number).sum()) for number in range(7)]
    assert stats.slots_per_image == pytest.approx(used.sum() / 9)
    assert stats.used == used.any(axis=0).nonzero()[0].tolist()
    area = [(assignment == k).sum() / 12 for k in range(6)]
    np.testing.assert_allclose(stats.area.numpy(), area, rtol=1e-6)  # the shares are float32
    stats.area = torch.tensor([3.0, 3, 0, 3])
    assert stats.perplexity == pytest.approx(3)
    for k, ranking in enumerate(rank_by_sorting(similarity, 9)):
        assert [index for index, _ in stats.nearest.ranking(k)] == ranking
        np.testing.assert_allclose([score for _, score in stats.nearest.ranking(k)], similarity[ranking, k], rtol=1e-9)


# Regions


@pytest.mark.parametrize(("map_side", "target", "side"), [(3, 100, 99), (14, 98, 98), (14, 5, 14), (6, 100, 102)])
def test_every_slot_has_a_region_at_the_region_side(map_side: int, target: int, side: int) -> None:
    assert region_side(map_side, target) == side
    scores = torch.randn(500, map_side, map_side, generator=torch.Generator().manual_seed(0))
    assert set(scores.argmax(dim=0).unique().tolist()) <= set(assign_pixels(scores, side).unique().tolist())


def test_region_is_outlined_in_color_and_the_rest_is_gray() -> None:
    image = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(0))
    region = torch.zeros(40, 40, dtype=torch.bool)
    region[5:20, 10:] = True
    inside = torch.zeros_like(region)
    inside[6:19, 11:] = True  # no outline along the border of the image
    highlighted = highlight_region(image, region, alpha=0.25).permute(2, 0, 1)
    assert torch.equal(region & ~region_outline(region, 1), inside)
    assert torch.equal(highlighted[:, inside].float(), (image * 255).round()[:, inside])
    gray = (image.mean(dim=0) * 0.75 * 255).round()
    assert torch.equal(highlighted[:, ~region].float(), gray[~region].expand(3, -1))


def test_connected_regions_are_those_of_at_least_a_size() -> None:
    assignment = torch.zeros(10, 10, dtype=torch.int64)
    assignment[1:4, 1:4] = 3
    assignment[4, 4] = 3  # touches the other region of prototype 3 at a corner only
    assignment[7:9, 5:9] = 3
    for min_pixels, sizes in ((1, [82, 9, 8, 1]), (8, [82, 9, 8]), (8.5, [82, 9])):
        regions = connected_regions(assignment, min_pixels)
        assert [prototype for prototype, _ in regions] == [0, 3, 3, 3][: len(sizes)]
        assert [region.sum() for _, region in regions] == sizes
    _, square = regions[1]
    pixels = pixels_by_depth(square)
    assert pixels[0].tolist() == [2, 2]
    assert sorted(map(tuple, pixels.tolist())) == [(x, y) for x in (1, 2, 3) for y in (1, 2, 3)]


# Figures, page and export


@pytest.fixture(scope="module")
def extractor(checkpoints: Path, images: Path) -> SlotExtractor:
    path = checkpoints / "current.pth"
    args = viz_slots.parse_args(command(path, "--data-dir", str(images), "--dataset", "folder"))
    crops = CenterCrops(viz_slots.find_images(args, {}), SIZE)
    return SlotExtractor(load_slot_model(path), crops, torch.device("cpu"), 16, 0)


def test_strips_show_the_region_in_each_nearest_image(extractor: SlotExtractor) -> None:
    rankings = {2: [(4, 0.9), (0, 0.8)], 1: [(4, 0.9)], 6: []}
    strips = dict(render_strips(extractor, rankings, target_side=33, alpha=1, gap_share=2 / 33))
    assert strips.keys() == {1, 2}
    scores = dict(zip((0, 4), next(extractor.extract([0, 4], "extracting")).scores))
    for prototype, strip in strips.items():
        assert strip.shape == (33, 35 * len(rankings[prototype]), 3)
        for rank, (index, _) in enumerate(rankings[prototype]):
            region = assign_pixels(scores[index], 33) == prototype
            colored = strip[:, 35 * rank : 35 * rank + 33].any(dim=2)
            assert not colored[~region].any()  # alpha = 1 makes the rest black
            assert (strip[:, 35 * rank + 33 : 35 * (rank + 1)] == 255).all()


def test_page_data_equal_the_statistics(extractor: SlotExtractor) -> None:
    prototypes: Any = extractor.model.prototypes  # type: ignore[attr-defined]
    stats = PrototypeStats(prototypes, 0.07, topk=3)
    for batch in extractor.extract(range(16), "extracting"):
        stats.update(batch)
    data = collect_data(extractor, stats, 0.5)
    assert data["images"] == 16
    cosines = F.normalize(prototypes, dim=1) @ F.normalize(prototypes, dim=1).T
    for k, prototype in enumerate(data["prototypes"]):
        assert prototype["images"] == stats.image_counts[k]
        assert prototype["area"] == pytest.approx(float(stats.area[k]) / 16, abs=1e-7)
        nearest = [(data["names"][index], score) for index, score in prototype["nearest"]]
        expected = [(extractor.crops.name(index), score) for index, score in stats.nearest.ranking(k)]
        assert nearest == [(name, pytest.approx(score, abs=6e-4)) for name, score in expected]
        assert bool(prototype["strip"]) == bool(nearest) == (k not in UNUSED)
        assert len(prototype["similar"]) == 4
        for other, cosine in prototype["similar"]:
            assert other != k
            assert cosine == pytest.approx(float(cosines[k, other]), abs=6e-3)


Colors = dict[int, tuple[float, ...]]


@pytest.fixture(scope="module")
def stats(extractor: SlotExtractor) -> PrototypeStats:
    prototypes: Any = extractor.model.prototypes  # type: ignore[attr-defined]
    stats = PrototypeStats(prototypes, 0.07, topk=2)
    for batch in extractor.extract(range(16), "extracting"):
        stats.update(batch)
    return stats


@pytest.fixture(scope="module")
def maps(extractor: SlotExtractor) -> Figure:
    return draw_maps(extractor, range(6), 60, "details")


def colors_of_usage(stats: PrototypeStats) -> Colors:
    colors = {}
    for axes in draw_usage(stats, 40, "").axes[1:]:
        for label, bar in zip(axes.get_xticklabels(), axes.patches, strict=True):
            colors[int(label.get_text())] = bar.get_facecolor()[:3]
    return colors


def colors_of_neighbors(extractor: SlotExtractor, stats: PrototypeStats) -> Colors:
    figure = draw_neighbors(extractor, stats, [7, 0, 3, 1], 0.5, 40, "")
    panels = [panel for panel in figure.axes if panel.patches]
    return {
        int(panel.get_title(loc="left").split()[1]): panel.patches[0].get_facecolor()[:3]  # such as `prototype 7 · ...`
        for panel in panels
    }


@pytest.mark.parametrize("dpi", [40, 200])
def test_strip_of_nearest_images_fits_into_its_panel(dpi: int, extractor: SlotExtractor, stats: PrototypeStats) -> None:
    panel = draw_neighbors(extractor, stats, [0], 0.5, dpi, "").axes[0]
    left, right, *_ = panel.images[0].get_extent()
    assert (left, right) == pytest.approx((0, panel.get_xlim()[1]), rel=0.02)


def colors_of_tsne(prototypes: np.ndarray, axes: Axes) -> Colors:
    """Read the colors of the points, whose prototypes are known, the labels and the legend; they have to agree."""
    points = {number: color[:3] for number, color in zip(prototypes, axes.collections[0].get_facecolor())}
    labels = {int(text.get_text()): text.get_bbox_patch().get_facecolor()[:3] for text in axes.texts}
    legend = axes.get_legend()
    in_legend = {
        int(text.get_text().split(":")[0]): to_rgb(mark.get_color())
        for text, mark in zip(legend.get_texts(), legend.legend_handles, strict=True)
    }
    assert points.keys() == in_legend.keys() >= labels.keys()
    for number, color in (*labels.items(), *in_legend.items()):
        assert color == pytest.approx(points[number], abs=1e-6)
    return points


def test_prototype_has_the_same_color_in_all_figures(extractor: SlotExtractor, stats: PrototypeStats) -> None:
    """Expect the colors of the palette, in figures of other images and other prototypes."""
    expected = palette(K)
    _, prototypes = sample_projections(extractor, range(4), 36, seed=0)
    tsne = draw_tsne(extractor, range(4), 36, 0, 40, "")
    with Image.open(BytesIO(encode_mask(torch.arange(K)[None], K))) as mask:
        exported = np.array(mask.convert("RGB"))[0] / 255
    for colors in (
        colors_of_usage(stats),
        colors_of_neighbors(extractor, stats),
        colors_of_tsne(prototypes, tsne.axes[0]),
        dict(enumerate(exported)),
    ):
        assert len(colors) >= 4
        for number, color in colors.items():
            assert color == pytest.approx(expected[number].tolist(), abs=1 / 255)


def test_slot_maps_have_the_colors_of_their_prototypes(maps: Figure, extractor: SlotExtractor) -> None:
    """Compare without the gray of the photograph, which adds the same to red, green and blue."""
    expected = 0.7 * 255 * (palette(K) - palette(K).mean(dim=1, keepdim=True))
    pixels: list[tuple[int, np.ndarray]] = []
    for panel in maps.axes[:6]:
        column = panel.images[0].get_array()
        for number, (x, y) in numbers_in_regions(panel):
            pixels.append((number, column[round(y), round(x)]))
    batch = next(extractor.extract(range(6), "extracting"))
    grid = slot_grid(batch.images / 255, batch.scores)
    for column, scores in enumerate(batch.scores):
        drawn = grid[:, SIZE + 8 :, 4 + (SIZE + 4) * column :]
        assignment = assign_pixels(scores, SIZE // 2).repeat_interleave(2, 0).repeat_interleave(2, 1)
        for number, region in connected_regions(assignment, SIZE):
            x, y = pixels_by_depth(region)[0]
            pixels.append((number, drawn[:, y, x].numpy()))
    assert len({number for number, _ in pixels}) >= 4
    for number, pixel in pixels:
        np.testing.assert_allclose(pixel - pixel.mean(), expected[number], atol=2)  # rounded twice


def numbers_in_regions(panel: Axes) -> list[tuple[int, tuple[float, float]]]:
    """Return the numbers in a panel of the figure `maps` and their positions, without the caption."""
    texts = [text for text in panel.texts if text.get_text().isdigit()]
    return [(int(text.get_text()), text.get_position()) for text in texts]


def flood(assignment: np.ndarray, start: tuple[int, int]) -> set[tuple[int, int]]:
    """Return the pixels (row, column) of the connected region of `start`."""
    region, border = {start}, [start]
    while border:
        row, column = border.pop()
        for pixel in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            inside = 0 <= pixel[0] < len(assignment) and 0 <= pixel[1] < len(assignment)
            if inside and pixel not in region and assignment[pixel] == assignment[start]:
                region.add(pixel)
                border.append(pixel)
    return region


def test_every_region_above_the_stated_size_has_its_number_inside(maps: Figure, extractor: SlotExtractor) -> None:
    assert "regions of at least 1% of an image are numbered" in maps.get_supxlabel().replace("\n", " ")
    num_regions = 0
    for panel, slot_map in zip(maps.axes, compute_slot_maps(extractor, range(6), round(1.7 * 60))):
        assignment = slot_map.assignment.numpy()
        side = len(assignment)
        top = panel.images[0].get_array().shape[0] - side
        numbers = {(round(y) - top, round(x)): number for number, (x, y) in numbers_in_regions(panel)}
        unseen = {(row, column) for row in range(side) for column in range(side)}
        while unseen:
            region = flood(assignment, next(iter(unseen)))
            unseen -= region
            inside = [number for pixel, number in numbers.items() if pixel in region]
            is_large = len(region) >= 0.01 * side**2
            assert inside == ([assignment[next(iter(region))]] if is_large else [])
            num_regions += is_large
    assert num_regions >= 12


def overlaps(boxes: Sequence[Bbox]) -> int:
    """Return how many pairs of boxes overlap."""
    return sum(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_numbers_in_maps_do_not_overlap() -> None:
    # Stripes that are narrower than their numbers, so that numbers side by side would overlap.
    assignment = (1000 + torch.arange(100) // 4).expand(100, 100)
    numbers = place_numbers(assignment)
    assert sorted(number for number, _ in numbers) == list(range(1000, 1025))
    axes = Figure(figsize=(1.7, 1.7), dpi=300).add_axes((0, 0, 1, 1), xlim=(0, 100), ylim=(0, 100))
    style: dict[str, Any] = {"fontsize": 6.5, "weight": "bold", "ha": "center", "va": "center"}
    texts = [axes.text(x, y, str(number), **style) for number, (x, y) in numbers]
    assert overlaps([text.get_window_extent() for text in texts]) == 0
    assert [number for number, _ in place_numbers(assignment, [1002, 7])] == [1002]


def test_labels_of_the_tsne_lie_on_their_points_and_do_not_overlap() -> None:
    rng = np.random.default_rng(0)
    prototypes = np.minimum(rng.geometric(0.05, 2000), 60) + 100
    points = rng.normal(size=(60, 2))[prototypes - 101] + rng.normal(scale=0.3, size=(2000, 2))
    figure = draw_points(points, prototypes, 50, "details")
    axes = figure.axes[0]
    labels = {int(text.get_text()): text for text in axes.texts}
    most_frequent = np.argsort(-np.bincount(prototypes), kind="stable")[:40]
    assert set(most_frequent[:20]) <= labels.keys() <= set(most_frequent)
    for number, text in labels.items():
        assert (points[prototypes == number] == text.get_position()).all(axis=1).any()
    figure.draw_without_rendering()
    assert overlaps([text.get_bbox_patch().get_window_extent() for text in axes.texts]) == 0
    legend = [text.get_text().rstrip("%").split(": ") for text in axes.get_legend().get_texts()]
    assert [int(number) for number, _ in legend] == most_frequent.tolist()
    for number, share in legend:
        assert float(share) == pytest.approx(100 * (prototypes == int(number)).mean(), abs=0.051)


def test_prototypes_of_a_few_points_have_no_label() -> None:
    rng = np.random.default_rng(0)
    prototypes = np.repeat([3, 8, 5], [40, 10, 9])
    axes = draw_points(rng.normal(size=(59, 2)), prototypes, 50, "details").axes[0]
    assert {text.get_text() for text in axes.texts} == {"3", "8"}
    assert len(axes.get_legend().get_texts()) == 3


def test_label_of_a_prototype_lies_where_its_points_are_densest() -> None:
    rng = np.random.default_rng(0)
    sizes = {0: 30, 20: 20, 40: 40}  # the median lies in the middle one
    points = np.concatenate([rng.normal(center, 1, (size, 2)) for center, size in sizes.items()])
    others = rng.uniform(0, 40, (50, 2))
    groups = group_by_prototype(np.concatenate([points, others]), np.repeat([5, 3], [90, 50]))
    assert [group.prototype for group in groups] == [5, 3]
    np.testing.assert_allclose(groups[0].points[0], 40, atol=2)
    assert sorted(groups[0].points.tolist()) == sorted(points.tolist())


def is_round(step: float) -> bool:
    """Return whether a number is 1, 2 or 5 times a power of ten."""
    return f"{step:.6e}"[:8] in ("1.000000", "2.000000", "5.000000")


@pytest.mark.parametrize(("num_images", "num_prototypes"), [(1, 2), (7, 3), (37, 30), (264, 49), (1000, 300), (5, 600)])
def test_ticks_of_usage_are_round_numbers(num_images: int, num_prototypes: int) -> None:
    stats = PrototypeStats(torch.eye(num_prototypes), 0.07, topk=1)
    rng = np.random.default_rng(num_images)
    stats.num_images = num_images
    stats.image_counts = torch.from_numpy(rng.integers(1, num_images + 1, num_prototypes))
    stats.area = torch.from_numpy(num_images * rng.dirichlet(np.ones(num_prototypes)))
    stats.slots_histogram = torch.from_numpy(rng.multinomial(num_images, rng.dirichlet(np.ones(num_prototypes + 1))))
    figure = draw_usage(stats, 40, "details")
    figure.draw_without_rendering()
    slots, *shares = figure.axes
    axis_list = [slots.xaxis, slots.yaxis, *(axes.yaxis for axes in shares)]
    if num_prototypes > 48:  # the ranks of the prototypes instead of their numbers
        axis_list += [axes.xaxis for axes in shares]
    for axis in axis_list:
        ticks = axis.get_majorticklocs()
        assert 2 <= len(ticks) <= 15
        assert is_round(ticks[1] - ticks[0])
        np.testing.assert_allclose(ticks / (ticks[1] - ticks[0]), np.round(ticks / (ticks[1] - ticks[0])), atol=1e-6)
    for axis in (slots.xaxis, slots.yaxis):
        assert all(float(tick).is_integer() for tick in axis.get_majorticklocs())
    for axes in shares:
        ticks = axes.yaxis.get_majorticklocs()
        assert [label.get_text() for label in axes.get_yticklabels()] == [f"{tick:g}%" for tick in ticks]


def test_details_are_as_wide_as_their_figure() -> None:
    details = "run/current.pth · 1 image of COCO, 192 px\nregions of at least 1% of an image are numbered"
    for width, num_lines in ((1.8, 4), (20, 2)):
        lines = new_figure((width, 2), 40, "title", details).get_supxlabel().splitlines()
        assert len(lines) == num_lines
        assert " ".join(lines) == details.replace("\n", " ")


@pytest.mark.parametrize("figure", [*viz_slots.SLOT_FIGURES, "patches"])
def test_figure_is_written_next_to_the_checkpoint(
    figure: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint.parent / f"{'slots' if figure in viz_slots.SLOT_FIGURES else 'features'}_{figure}.png"
    load = Mock(wraps=utils.checkpoint.load)
    monkeypatch.setattr(utils.checkpoint, "load", load)
    viz_slots.main(command(checkpoint, "--figure", figure, "--points", "50", "--sampling", "4"))
    assert load.call_count == 1
    assert capsys.readouterr().out == f"figure: {path}\n"
    with Image.open(path) as image:
        assert np.array(image.convert("RGB")).std() > 10


@pytest.mark.parametrize(("flag", "out"), [("--save-path", "out.png"), ("--html", "out.html"), ("--export", "out")])
def test_full_disk_is_named_with_the_flag_of_the_output(
    flag: str, out: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SystemExit, match="2"):
        viz_slots.main(command(checkpoint, flag, str(tmp_path / out), "--max-images", "2"))
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(rf"{flag} {tmp_path / out}.*: cannot be written \(No space left on device\); use", line)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [checkpoint]


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_figure_is_saved_in_every_format(suffix: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_figure("--save-path", tmp_path / f"{name}{suffix}", new_figure((1, 1), 20, "title", "details"))
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_flags_with_dashes_and_underscores_give_the_same_neighbors(checkpoint: Path, tmp_path: Path) -> None:
    figures = []
    for mark in "_-":
        flags = [f"--save{mark}path", str(tmp_path), f"--num{mark}prototypes=8", f"--dim{mark}hidden", "32"]
        flags += [f"--dim{mark}out", "16", f"--batch{mark}size", "3", "--arch", "resnet18", "--topk", "2"]
        viz_slots.main(command(checkpoint, *flags, "--max-images", "4", "--overwrite"))
        figures.append((tmp_path / "slots_neighbors.png").read_bytes())
    assert figures[0] == figures[1]


@pytest.mark.parametrize("flags", [["--topk", "50"], ["--figure", "maps", "--sampling", "1"]])
def test_figure_of_unused_prototypes(flags: list[str], checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    viz_slots.main(command(checkpoint, *flags, "--idxs", "7", "0", "7", "--max-images", "4", "--save-path", str(path)))
    assert path.stat().st_size > 1000


def test_exported_files_equal_the_outputs_of_the_model(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    arrays = export(checkpoint, folder)
    model = load_slot_model(checkpoint)
    _, scores = model(normalize(read_crops(images) / 255))
    masks = F.interpolate(scores, (SIZE, SIZE), mode="bilinear", align_corners=False).argmax(dim=1)
    rows = list(csv.DictReader((folder / "images.csv").open()))
    assert [row["image"] for row in rows] == [path.name for path in sorted(images.iterdir())]
    for row, mask in zip(rows, masks):
        with Image.open(folder / row["mask"]) as image:
            assert image.mode == "P"
            np.testing.assert_array_equal(np.array(image), mask.numpy())
        assert [int(row[name]) for name in ("x0", "y0", "x1", "y1")] == [12, 0, 84, 72]
    np.testing.assert_array_equal(read_scores(folder), scores.half().numpy())
    np.testing.assert_array_equal(arrays["prototypes"], model.prototypes.numpy())
    used = [[bool((image.argmax(dim=0) == k).any()) for k in range(K)] for image in scores]
    assert arrays["images_using"].tolist() == np.sum(used, axis=0).tolist()
    assert [k for k in range(K) if not arrays["images_using"][k]] == list(UNUSED)
    assert not (checkpoint.parent / "slots_neighbors.png").exists()


def test_export_does_not_depend_on_batch_size_and_workers(checkpoint: Path, tmp_path: Path) -> None:
    whole, parts, workers = tmp_path / "whole", tmp_path / "parts", tmp_path / "workers"
    export(checkpoint, whole, "--max-images", "8")
    export(checkpoint, parts, "--max-images", "8", "--batch-size", "3")
    export(checkpoint, workers, "--max-images", "8", "--batch-size", "3", "--num-workers", "2")
    np.testing.assert_allclose(read_scores(parts), read_scores(whole), atol=1e-3)  # one unit of float16 below 1
    for path in (path.relative_to(parts) for path in parts.rglob("*.*")):
        assert (workers / path).read_bytes() == (parts / path).read_bytes()


def test_student_and_temperature_come_from_the_checkpoint(state: dict[str, Any], tmp_path: Path) -> None:
    path, folder = tmp_path / "a.pth", tmp_path / "out"
    torch.save({**state, "args": {**state["args"], "teacher_temp": 0.25}}, path)
    arrays = export(path, folder, "--encoder", "student", "--max-images", "2")
    np.testing.assert_array_equal(arrays["prototypes"], state["model"]["grouping_q.slot_embed.weight"].numpy())
    metadata = json.loads((folder / "metadata.json").read_text())
    assert (metadata["encoder"], metadata["temperature"]) == ("student", 0.25)
    assert sorted(mask.name for mask in (folder / "masks").iterdir()) == ["00.png", "08.png"]


def test_arguments_of_a_checkpoint_that_are_no_numbers_are_not_used(
    state: dict[str, Any], images: Path, tmp_path: Path
) -> None:
    args = {"dataset": "folder", "data_dir": str(images), "image_size": "large", "teacher_temp": None}
    torch.save({**state, "args": args}, tmp_path / "a.pth")
    flags = ["--device", "cpu", "--num-workers", "0", "--max-images", "1", "--export", str(tmp_path / "out")]
    viz_slots.main(["--model-path", str(tmp_path / "a.pth"), *flags])
    metadata = json.loads((tmp_path / "out/metadata.json").read_text())
    assert (metadata["image_size"], metadata["temperature"]) == (448, 0.07)


def test_masks_of_more_than_256_prototypes_have_16_bits(tmp_path: Path) -> None:
    (tmp_path / "mask.png").write_bytes(encode_mask(torch.tensor([[0, 299]]), 300))
    with Image.open(tmp_path / "mask.png") as mask:
        assert np.array(mask).tolist() == [[0, 299]]


def test_exports_of_images_with_the_same_stem_do_not_collide(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    folder, masks = tmp_path / "images", tmp_path / "out/masks"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.jpg", "a.jpeg", "b.jpg", "deep/a.jpg"):
        shutil.copy(images / "00.jpg", folder / name)
    export(checkpoint, tmp_path / "out", "--data-dir", str(folder))
    names = {str(mask.relative_to(masks)) for mask in masks.rglob("*.png")}
    assert names == {"a.jpg.png", "a.jpeg.png", "b.png", "deep/a.png"}


def test_unreadable_images_are_reported_and_skipped(
    checkpoint: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"no image")
    argv = command(checkpoint, "--data-dir", str(folder), "--dataset", "folder", "--export", str(tmp_path / "out"))
    with pytest.raises(SystemExit):
        viz_slots.main(argv)
    assert "none of 1 images can be read" in capsys.readouterr().err.splitlines()[-1]
    shutil.copy(images / "00.jpg", folder / "b.jpg")
    viz_slots.main([*argv, "--overwrite"])
    assert f"skipped, cannot be read: {folder / 'a.jpg'}" in capsys.readouterr().err
    assert [mask.name for mask in (tmp_path / "out/masks").iterdir()] == ["b.png"]


def test_command_runs_from_another_folder(checkpoint: Path, tmp_path: Path) -> None:
    flags = command(checkpoint, "--html", "page.html", "--max-images", "4")
    argv = [sys.executable, str(Path(viz_slots.__file__)), *flags]
    result = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "page: page.html\n", "")
    assert (tmp_path / "page.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_prototypes", "256"], "--num-prototypes 256: .* has 8"),
        (["--arch", "resnet50"], "--arch resnet50: .* has resnet18"),
        (["--idxs", "3", "8"], "--idxs 8: .* 0 to 7"),
        (["--figure", "usage", "--idxs", "3"], "--idxs: .*neighbors"),
        (["--data-dir", "missing"], "--data-dir missing: no such folder"),
        (["--save-path", "missing/a.png"], "--save-path missing/a.png"),
        (["--save-path", "a.txt"], "--save-path a.txt: .*png"),
        (["--html", "kept.html"], "--html kept.html: .*--overwrite"),
        (["--export", "run"], "--export run: .*--overwrite"),
        (["--topk", "101"], "--topk 101: .*100"),
        (["--output-stride", "16"], "--output-stride 16: .*resnet"),
        (["--dpi", "20000"], "pixels .*--dpi"),
        (
            ["--model-path", "backbone.pth", "--figure", "maps"],
            "--figure maps: .* has no prototypes; use pca or patches",
        ),
        (["--model-path", "backbone.pth", "--num-prototypes", "8"], "--num-prototypes 8: .* no prototypes; omit it"),
        (
            ["--figure", "attention"],
            "--figure attention: .* no class token, it is a resnet18; use .* or pca or patches",
        ),
        (["--model-path", "moved.pth"], "--data-dir: .*/missing"),
        (["--model-path", "no_args.pth"], "--data-dir: .*names no folder"),
    ],
)
def test_invalid_call_is_refused_in_one_line(
    flags: list[str],
    message: str,
    checkpoints: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("kept.html").write_text("kept")
    for path in checkpoints.iterdir():
        link_or_copy(tmp_path / path.name, path)
    files = set(tmp_path.rglob("*"))
    line = run_expecting_usage_error(viz_slots.main, command(checkpoint, *flags), capsys)
    assert re.search(message, line), line
    assert set(tmp_path.rglob("*")) == files
    assert Path("kept.html").read_text() == "kept"


def test_earlier_spelling_of_neighbors_is_accepted() -> None:
    assert viz_slots.parse_args(["--model-path", "x.pth", "--figure", "neighbours"]).figure == "neighbors"
