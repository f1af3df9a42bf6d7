"""models/alignment.py against the float64 reference; aligned views show the same pixels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.alignment import align, overlap
from tests.reference import alignment as reference
from tests.reference.compare import gradient, relative_error
from utils.batch import Batch

WHOLE = (0.0, 0.0, 1.0, 1.0)
POSES = [(flip, turns) for flip in (False, True) for turns in range(4)]

Crop = tuple[float, float, float, float]
View = tuple[Crop, bool, int]


def batch_of(images: list[list[View]]) -> Batch:
    """A batch that carries the geometry of B images in V views each."""
    B, V = len(images), len(images[0])
    return Batch(
        views=[torch.zeros(B, 3, 8, 8) for _ in range(V)],
        crops=torch.tensor([[crop for crop, _, _ in image] for image in images], dtype=torch.float32),
        flips=torch.tensor([[flip for _, flip, _ in image] for image in images]),
        turns=torch.tensor([[turns for _, _, turns in image] for image in images]),
        index=torch.arange(B),
    )


@st.composite
def crops(draw: st.DrawFn, width: int, height: int) -> Crop:
    """A crop of at least 8 pixels a side, from whole or broken coordinates."""
    x0, y0 = draw(st.integers(0, width - 8)), draw(st.integers(0, height - 8))
    x1, y1 = draw(st.integers(x0 + 8, width)), draw(st.integers(y0 + 8, height))
    shrink = draw(st.sampled_from([0.0, 0.25, 0.4375]))  # exact in float32
    return x0 + shrink, y0 + shrink, x1 - shrink, y1 - shrink


@st.composite
def pictures(draw: st.DrawFn, views: int = 2, turned: bool = True) -> list[View]:
    """Some views of one image of random size."""
    width, height = draw(st.integers(8, 700)), draw(st.integers(8, 700))
    return [
        (draw(crops(width, height)), draw(st.booleans()), draw(st.integers(0, 3)) if turned else 0)
        for _ in range(views)
    ]


@given(images=st.lists(pictures(views=3), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_overlap_of_any_two_views_is_that_of_the_reference(images: list[list[View]]) -> None:
    batch = batch_of(images)
    for a, b in ((0, 1), (1, 0), (0, 2), (2, 1)):
        boxes, meets = overlap(batch, a, b)
        assert boxes.dtype == torch.float32
        assert meets.dtype == torch.bool
        for i, image in enumerate(images):
            (crop_a, flip, turns), (crop_b, _, _) = image[a], image[b]
            box, meet = reference.overlap(crop_a, crop_b, flip, turns)
            assert bool(meets[i]) == meet
            np.testing.assert_allclose(boxes[i].numpy(), box, rtol=0, atol=1e-5)


@given(image=pictures())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_boxes_stay_inside_the_view_and_meeting_is_mutual(image: list[View]) -> None:
    batch = batch_of([image])
    (box, meets), (other, mutual) = overlap(batch, 0, 1), overlap(batch, 1, 0)
    assert torch.equal(meets, mutual)
    for x0, y0, x1, y1 in (box[0], other[0]):
        assert 0 <= x0 < x1 <= 1
        assert 0 <= y0 < y1 <= 1


@pytest.mark.parametrize("other", [(60, 0, 90, 40), (50, 0, 90, 40), (0, 40, 50, 80)])
@pytest.mark.parametrize(("flip", "turns"), POSES)
def test_views_apart_or_only_touching_do_not_meet_and_keep_their_whole_frame(
    other: Crop, flip: bool, turns: int
) -> None:
    boxes, meets = overlap(batch_of([[((10, 10, 50, 40), flip, turns), (other, False, 0)]]), 0, 1)
    assert not meets.any()
    assert torch.equal(boxes, torch.tensor([WHOLE]))


@given(
    side=st.integers(1, 6),
    channels=st.integers(1, 3),
    poses=st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_aligned_maps_are_those_of_the_reference_with_a_pose_for_each_image(
    side: int, channels: int, poses: list[tuple[bool, int]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    maps = rng.standard_normal((len(poses), channels, side, side)).astype(np.float32)
    corners = np.sort(rng.uniform(0, 1, (len(poses), 2, 2)), axis=1).reshape(len(poses), 4).astype(np.float32)
    flips, turns = torch.tensor([flip for flip, _ in poses]), torch.tensor([turn for _, turn in poses])
    found = align(torch.from_numpy(maps), torch.from_numpy(corners), flips, turns)
    assert found.dtype == torch.float32
    expected = np.stack([reference.align(maps[i], corners[i], *pose) for i, pose in enumerate(poses)])
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize(("height", "width"), [(3, 5), (6, 2), (7, 7)])
def test_maps_that_are_never_turned_need_not_be_square(height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    maps = rng.standard_normal((2, 4, height, width)).astype(np.float32)
    boxes = np.array([[0.1, 0.2, 0.55, 0.95], [0.0, 0.5, 1.0, 1.0]], dtype=np.float32)
    flips = torch.tensor([True, False])
    found = align(torch.from_numpy(maps), torch.from_numpy(boxes), flips)
    expected = np.stack([reference.align(maps[i], boxes[i], bool(flips[i])) for i in range(2)])
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize(("flip", "turns"), POSES)
def test_the_whole_frame_of_a_mirrored_and_turned_view_comes_back_upright(flip: bool, turns: int) -> None:
    rng = np.random.default_rng(turns)
    upright = rng.standard_normal((3, 5, 5)).astype(np.float32)
    seen = torch.from_numpy(reference.see(upright, flip, turns)).float()[None]
    found = align(seen, torch.tensor([WHOLE]), torch.tensor([flip]), torch.tensor([turns]))
    torch.testing.assert_close(found[0], torch.from_numpy(upright), rtol=1e-6, atol=1e-6)
    assert turns or flip or torch.equal(seen[0], torch.from_numpy(upright))


def coordinates(crop: Crop, side: int, flip: bool, turns: int) -> torch.Tensor:
    """(1, 2, side, side): source x and y of every cell center of a view, as the view shows them."""
    x0, y0, x1, y1 = crop
    planes = np.zeros((2, side, side))
    for row in range(side):
        for column in range(side):
            planes[0, row, column] = x0 + (column + 0.5) / side * (x1 - x0)
            planes[1, row, column] = y0 + (row + 0.5) / side * (y1 - y0)
    return torch.from_numpy(reference.see(planes, flip, turns)).float()[None]


def aligned_coordinates(batch: Batch, image: list[View], a: int, b: int, side: int) -> np.ndarray:
    crop, flip, turns = image[a]
    boxes, _ = overlap(batch, a, b)
    return align(coordinates(crop, side, flip, turns), boxes, batch.flips[:, a], batch.turns[:, a])[0].numpy()


def cell_size(crop: Crop, side: int) -> np.ndarray:
    """Width and height of a view's cell in source pixels: (2, 1, 1)."""
    return np.array([crop[2] - crop[0], crop[3] - crop[1]]).reshape(2, 1, 1) / side


def check_same_pixels(image: list[View], side: int) -> None:
    batch = batch_of([image])
    first, second = (
        aligned_coordinates(batch, image, 0, 1, side),
        aligned_coordinates(batch, image, 1, 0, side),
    )
    cells = [cell_size(crop, side) for crop, _, _ in image]
    assert (np.abs(first - second) <= np.maximum(*cells) + 1e-3).all()

    # And these are the pixels of the intersection, upright: only a view's border, where RoIAlign clamps, is
    # off, by half a cell at most.
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = image[0][0], image[1][0]
    common = (max(ax0, bx0), max(ay0, by0), min(ax1, bx1), min(ay1, by1))
    truth = coordinates(common, side, False, 0)[0].numpy()
    for found, cell in zip((first, second), cells):
        assert (np.abs(found - truth) <= cell / 2 + 1e-3).all()


@given(image=pictures(turned=False), side=st.integers(1, 7))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_two_flipped_views_show_the_same_pixels_once_aligned(image: list[View], side: int) -> None:
    if reference.overlap(image[0][0], image[1][0])[1]:
        check_same_pixels(image, side)


@given(image=pictures(), side=st.integers(1, 7))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_two_flipped_and_turned_views_show_the_same_pixels_once_aligned(image: list[View], side: int) -> None:
    if reference.overlap(image[0][0], image[1][0])[1]:
        check_same_pixels(image, side)


@pytest.mark.parametrize("first", POSES)
@pytest.mark.parametrize("second", [(False, 0), (True, 1), (True, 2), (False, 3)])
def test_every_pair_of_poses_shows_the_same_pixels_once_aligned(
    first: tuple[bool, int], second: tuple[bool, int]
) -> None:
    check_same_pixels([((20, 10, 180, 90), *first), ((90, 40, 230, 200), *second)], side=7)


@pytest.mark.parametrize(("flip", "turns"), POSES)
def test_the_gradient_of_align_is_the_slope_of_the_reference(flip: bool, turns: int) -> None:
    rng = np.random.default_rng(10 + turns)
    maps = torch.from_numpy(rng.standard_normal((1, 2, 3, 3))).float().requires_grad_(True)
    box = torch.tensor([[0.12, 0.3, 0.71, 0.93]])
    weights = rng.standard_normal((2, 3, 3))
    found = align(maps, box, torch.tensor([flip]), torch.tensor([turns]))
    (found[0] * torch.from_numpy(weights).float()).sum().backward()
    assert maps.grad is not None
    slope = gradient(
        lambda planes: float((reference.align(planes, box[0].numpy(), flip, turns) * weights).sum()),
        maps.detach()[0].numpy(),
    )
    assert relative_error(maps.grad[0], slope) < 1e-5


def test_half_precision_maps_are_aligned_in_float32() -> None:
    maps = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    boxes = torch.tensor([[0.1, 0.1, 0.6, 0.9], [0.2, 0.0, 1.0, 0.4]])
    flips, turns = torch.tensor([True, False]), torch.tensor([0, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = align(maps, boxes, flips, turns)
    assert mixed.dtype == torch.float32
    assert relative_error(mixed, align(maps.float(), boxes, flips, turns)) < 1e-6
