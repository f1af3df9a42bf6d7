"""Alignment against the float64 reference and torchvision's RoIAlign; aligned views show the same pixels."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import roi_align

from models.alignment import align, overlap_boxes
from tests.reference import alignment as reference
from utils.batch import Batch

Crop = tuple[float, float, float, float]
View = tuple[Crop, bool, int]
"""A crop, whether it is flipped, and its rotation in quarter turns."""
POSES = list(itertools.product((False, True), range(4)))
SIZES = [(14, 10), (14, 4), (6, 4), (7, 7), (3, 5)]
"""Sides of the map and of the result: more than one sample for each output in the first three."""


def batch_of(images: list[list[View]]) -> Batch:
    """A batch of B images in V views, in float64, of which only the geometry is used."""
    B, V = len(images), len(images[0])
    return Batch(
        views=[torch.zeros(B, 3, 8, 8) for _ in range(V)],
        crops=torch.tensor([[crop for crop, _, _ in image] for image in images], dtype=torch.float64),
        flips=torch.tensor([[flip for _, flip, _ in image] for image in images]),
        rotations=torch.tensor([[rotation for _, _, rotation in image] for image in images]),
        index=torch.arange(B),
    )


@st.composite
def views_of_an_image(draw: st.DrawFn) -> list[View]:
    """Three views, of at least 8 pixels a side, of an image of random size."""
    width, height = draw(st.integers(8, 700)), draw(st.integers(8, 700))
    views = []
    for _ in range(3):
        x0, y0 = draw(st.integers(0, width - 8)), draw(st.integers(0, height - 8))
        x1, y1 = draw(st.integers(x0 + 8, width)), draw(st.integers(y0 + 8, height))
        inset = draw(st.sampled_from([0.0, 0.4375]))
        views.append(((x0 + inset, y0 + inset, x1 - inset, y1 - inset), draw(st.booleans()), draw(st.integers(0, 3))))
    return views


@given(images=st.lists(views_of_an_image(), min_size=1, max_size=5))
@settings(max_examples=25)
def test_overlap_boxes_match_reference_and_lie_inside_the_view(images: list[list[View]]) -> None:
    batch = batch_of(images)
    for a, b in ((0, 1), (1, 0), (0, 2), (2, 1)):
        boxes, intersects = overlap_boxes(batch, a, b)
        assert torch.equal(intersects, overlap_boxes(batch, b, a)[1])
        assert (boxes >= 0).all()
        assert (boxes <= 1).all()
        assert (boxes[:, :2] < boxes[:, 2:]).all()
        for i, image in enumerate(images):
            expected, expected_intersects = reference.overlap_box(image[a][0], image[b][0], *image[a][1:])
            assert bool(intersects[i]) == expected_intersects
            np.testing.assert_allclose(boxes[i], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("other", [(60, 0, 90, 40), (50, 0, 90, 40), (0, 40, 50, 80)], ids=["apart", "side", "bottom"])
def test_views_that_do_not_intersect_keep_their_whole_frame(other: Crop) -> None:
    boxes, intersects = overlap_boxes(
        batch_of([[((10, 10, 50, 40), *pose), (other, False, 0)] for pose in POSES]), 0, 1
    )
    assert not intersects.any()
    assert torch.equal(boxes, torch.tensor([[0.0, 0, 1, 1]], dtype=torch.float64).repeat(len(POSES), 1))


def random_boxes(rng: np.random.Generator, count: int) -> Tensor:
    corners = np.sort(rng.uniform(0, 1, (count, 2, 2)), axis=1).reshape(count, 4)
    corners[0] = 0, 0, 1, 1
    return torch.from_numpy(corners)


@given(
    side=st.integers(1, 9),
    output=st.integers(1, 9) | st.none(),
    poses=st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=2, max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=30)
def test_align_matches_reference_for_every_pose_and_output_size(
    side: int, output: int | None, poses: list[tuple[bool, int]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    maps, boxes = torch.from_numpy(rng.standard_normal((len(poses), 2, side, side))), random_boxes(rng, len(poses))
    flips, rotations = torch.tensor([flip for flip, _ in poses]), torch.tensor([rotation for _, rotation in poses])
    size = None if output is None else (output, output)
    aligned = align(maps, boxes, flips, rotations, size)
    expected = [
        reference.align(plane, box, *pose, size) for plane, box, pose in zip(maps.numpy(), boxes.numpy(), poses)
    ]
    np.testing.assert_allclose(aligned, np.stack(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [None, (10, 10), (4, 4), (3, 9), (20, 2)])
@pytest.mark.parametrize("shape", [(14, 14), (6, 9)])
def test_align_matches_torchvision_roi_align(shape: tuple[int, int], size: tuple[int, int] | None) -> None:
    rng = np.random.default_rng(1)
    maps, boxes = torch.from_numpy(rng.standard_normal((20, 3, *shape))), random_boxes(rng, 20)
    flips = torch.arange(20) % 2 == 0
    cells = boxes * torch.tensor([shape[1], shape[0]] * 2)
    expected = roi_align(maps, list(cells[:, None]), size or shape, sampling_ratio=0, aligned=True)
    expected = torch.where(flips[:, None, None, None], expected.flip(3), expected)
    torch.testing.assert_close(align(maps, boxes, flips, output_size=size), expected, rtol=0, atol=1e-12)


def test_whole_number_of_samples_is_not_rounded_up() -> None:
    """Boxes of two cells for each output: in float32, their sides are a little more or less than that."""
    start = torch.linspace(0, 0.4, 20)[:, None]
    boxes = torch.cat([start, start, start + 8 / 14, start + 8 / 14], dim=1)
    maps = torch.from_numpy(np.random.default_rng(4).standard_normal((20, 3, 14, 14)))
    expected = roi_align(maps, list(boxes[:, None].double() * 14), (4, 4), sampling_ratio=2, aligned=True)
    aligned = align(maps, boxes, torch.zeros(20, dtype=torch.bool), output_size=(4, 4))
    torch.testing.assert_close(aligned, expected, rtol=0, atol=1e-12)


def coordinates(crop: Crop, side: int, flip: bool = False, rotation: int = 0) -> Tensor:
    """The source x and y of the center of every cell of a view: (2, side, side)."""
    centers = (np.arange(side) + 0.5) / side
    x, y = crop[0] + centers * (crop[2] - crop[0]), crop[1] + centers * (crop[3] - crop[1])
    return torch.from_numpy(reference.apply_pose(np.stack(np.meshgrid(x, y)), flip, rotation))


@pytest.mark.parametrize(("side", "output"), SIZES)
def test_aligned_views_show_the_same_pixels_for_every_pair_of_poses(side: int, output: int) -> None:
    """Maps whose values are their coordinates are interpolated exactly, but for samples that the border clamps."""
    crops = [(20.0, 10, 180, 90), (60.0, 30, 230, 120)]
    images = [[(crops[0], *first), (crops[1], *second)] for first, second in itertools.product(POSES, POSES)]
    batch = batch_of(images)
    common = coordinates((60, 30, 180, 90), output)
    for a, b in ((0, 1), (1, 0)):
        maps = torch.stack([coordinates(crop, side, *pose) for crop, *pose in (image[a] for image in images)])
        boxes, _ = overlap_boxes(batch, a, b)
        aligned = align(maps, boxes, batch.flips[:, a], batch.rotations[:, a], (output, output))
        inner = (..., slice(1, -1), slice(1, -1))
        torch.testing.assert_close(aligned[inner], common.expand_as(aligned)[inner], rtol=0, atol=1e-10)
        cell = torch.tensor([crops[a][2] - crops[a][0], crops[a][3] - crops[a][1]])[:, None, None] / side
        assert ((aligned - common).abs() <= cell / 2).all()


def test_half_precision_maps_are_aligned_in_float32() -> None:
    rng = np.random.default_rng(3)
    maps = torch.from_numpy(rng.standard_normal((20, 3, 14, 14))).bfloat16()
    boxes, flips, rotations = random_boxes(rng, 20).float(), torch.arange(20) % 2 == 0, torch.arange(20) % 4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        aligned = align(maps, boxes, flips, rotations, (10, 10))
    assert aligned.dtype == torch.float32
    expected = align(maps.double(), boxes.double(), flips, rotations, (10, 10))
    # Positions round by 14 cells x 6e-8, products of two weights and a value up to 4 by little more: below 2e-5.
    torch.testing.assert_close(aligned.double(), expected, rtol=0, atol=2e-5)
