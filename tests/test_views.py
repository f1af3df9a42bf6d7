"""data/views.py and utils/batch.py: crops in distribution, overlap, pixels against Pillow, and the record of a view."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from data import views
from data.datasets import Sample
from data.loader import collate
from data.views import (
    Box,
    central_crop,
    crop_and_resize,
    draw_crop,
    draw_views,
    intersection_area,
    make_views,
    rgb_pixels,
)
from models.alignment import align, overlap_boxes
from tests.helpers import make_image
from utils import batch as batch_module
from utils.batch import Batch, ViewRecord
from utils.view_recipes import ColorRecipe, OverlapCondition, ViewRecipe, two_view_recipes

RECIPE = ViewRecipe(224, (0.08, 1.0), ColorRecipe())
QUANTILES = np.linspace(0.05, 0.95, 19)


def multi_crop_recipes(share: float = 0.01, of: str = "image", tries: int = 100) -> tuple[ViewRecipe, ...]:
    """Make 2 + 8 views: rotated, not flipped, bilinear, each crop overlapping every global crop."""
    first = ViewRecipe(32, (0.3, 1.0), ColorRecipe(), flip_p=0, rotate=True, interpolation="bilinear")
    second = replace(first, overlap=OverlapCondition((0,), 2 * share, of, tries))
    local = replace(first, size=16, scale=(0.1, 0.3), overlap=OverlapCondition((0, 1), share, of, tries))
    return (first, second, *[local] * 8)


def assert_records_equal(a: ViewRecord, b: ViewRecord) -> None:
    for name, value in vars(a).items():
        other = getattr(b, name)
        pairs = zip(value, other, strict=True) if isinstance(value, list) else [(value, other)]
        assert all(torch.equal(x, y) for x, y in pairs), name


# Crops


@settings(max_examples=200)
@given(st.integers(1, 900), st.integers(1, 900), st.integers(0, 2**32), st.floats(0.01, 1))
def test_crops_lie_inside_the_image(width: int, height: int, seed: int, min_scale: float) -> None:
    rng = np.random.default_rng(seed)
    first = draw_crop(rng, (width, height), replace(RECIPE, scale=(min_scale, 1.0)))
    second = draw_crop(rng, (width, height), replace(RECIPE, overlap=OverlapCondition((0,), 0.01, "crop")), [first])
    for x0, y0, x1, y1 in (first, second):
        assert 0 <= x0 < x1 <= width
        assert 0 <= y0 < y1 <= height


def test_crops_are_distributed_like_torchvisions() -> None:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    image = torch.empty(3, 480, 640)
    ours = np.array([draw_crop(rng, (640, 480), RECIPE) for _ in range(4000)])
    draws = np.array([RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(4000)])
    top, left, height, width = draws.T
    for edge, theirs in enumerate((left, top, left + width, top + height)):
        difference = np.quantile(ours[:, edge], QUANTILES) - np.quantile(theirs, QUANTILES)
        assert np.abs(difference).max() < 0.04 * (640, 480)[edge % 2]


def test_second_crop_of_slotcon_intersects_the_first() -> None:
    first, second = two_view_recipes(224, 0.08)
    missed = {second: 0, first: 0}
    for recipe in missed:
        for number in range(2000):
            crops = draw_views((640, 480), (first, recipe), 0, 0, number).crops.int().tolist()
            missed[recipe] += intersection_area(*crops) == 0
    assert missed[second] == 0
    assert missed[first] > 50


@pytest.mark.parametrize("of", ["crop", "image"])
def test_overlap_is_a_share_of_the_target_area_or_of_the_image(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of the recorded draws that fulfills the condition is taken."""
    draws: list[tuple[Box | None, float]] = []
    try_crop = views.try_crop

    def record(*args: object) -> tuple[Box | None, float]:
        draws.append(try_crop(*args))
        return draws[-1]

    monkeypatch.setattr(views, "try_crop", record)
    earlier, recipe = (
        [(0, 0, 200, 200), (100, 0, 300, 240)],
        replace(RECIPE, overlap=OverlapCondition((0, 1), 0.05, of, 10)),
    )
    fulfilled_at = []
    for seed in range(200):
        draws.clear()
        box = draw_crop(np.random.default_rng(seed), (640, 480), recipe, earlier)
        smallest = [min(intersection_area(draw, e) for e in earlier) if draw else 0 for draw, _ in draws]
        required = [0.05 * (640 * 480 if of == "image" else area) for _, area in draws]
        fulfilled = [draw for (draw, _), a, b in zip(draws[:10], smallest, required) if a > b]
        assert box == (fulfilled[0] if fulfilled else draws[-1][0])
        fulfilled_at.append(len(draws) - 1 if fulfilled else -1)
    assert max(fulfilled_at) > 2
    assert -1 in fulfilled_at


def test_crop_tries_are_bounded_and_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    try_crop = views.try_crop
    monkeypatch.setattr(views, "try_crop", lambda *args: calls.append(1) or try_crop(*args))
    recipe = replace(RECIPE, overlap=OverlapCondition((0,), 1.1, "image", tries=7))  # more than there can be
    box = draw_crop(np.random.default_rng(0), (640, 480), recipe, [(0, 0, 640, 480)])
    rng = np.random.default_rng(0)
    draws = [try_crop(rng, (640, 480), recipe)[0] for _ in calls]
    assert [draw for draw in draws[7:] if draw] == [box]  # the first without the condition that fits
    calls.clear()
    for size, central in (((1000, 100), (433, 0, 566, 100)), ((100, 1000), (0, 433, 100, 566))):
        assert draw_crop(np.random.default_rng(0), size, replace(recipe, scale=(0.9, 1.0)), [(0, 0, 9, 9)]) == central
    assert len(calls) == 2 * (7 + views.MAX_CROP_TRIES)
    assert central_crop((120, 100), (3 / 4, 4 / 3)) == (0, 0, 120, 100)


@pytest.mark.parametrize("of", ["image", "crop"])
def test_every_one_of_ten_crops_overlaps_both_global_crops(of: str) -> None:
    for number in range(40):
        crops = draw_views((640, 480), multi_crop_recipes(0.01, of), 0, 0, number).crops.int().tolist()
        for view, crop in enumerate(crops):
            base = 640 * 480 if of == "image" else 0.98 * intersection_area(crop, crop)  # sides are rounded
            share = 0.02 if view == 1 else 0.01
            assert all(intersection_area(crop, crops[other]) >= share * base for other in range(min(view, 2)))


# Random numbers


def test_views_depend_on_seed_epoch_and_image_number_only() -> None:
    image, recipes = make_image(320, 240), two_view_recipes(64, 0.08)
    record = make_views(image, recipes, 1, 2, 3)
    np.random.seed(5)
    torch.manual_seed(5)
    assert_records_equal(record, make_views(image, recipes, 1, 2, 3))
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0), (2, 1, 3), (1, 3, 2)):
        drawn = make_views(image, recipes, *other)
        assert not torch.equal(drawn.crops, record.crops)
        assert not torch.equal(drawn.color, record.color)
    two, three = (draw_views((320, 240), [RECIPE] * count, 0, 0, 0) for count in (2, 3))
    assert not torch.equal(two.crops[0], two.crops[1])
    assert not torch.equal(two.color[0], two.color[1])
    assert torch.equal(two.crops, three.crops[:2])


def test_flips_and_rotations_are_uniform_and_independent() -> None:
    recipes = [replace(RECIPE, rotate=True)] * 2
    records = [draw_views((64, 48), recipes, 0, 0, number) for number in range(1600)]
    flips, rotations = torch.stack([r.flips for r in records]), torch.stack([r.rotations for r in records])
    codes = (flips * torch.tensor([1, 2])).sum(1) + 4 * rotations[:, 0] + 16 * (rotations[:, 1] == rotations[:, 0])
    counts = codes.bincount(minlength=32)
    expected = 1600 / 4 / 4 * torch.tensor([0.75, 0.25]).repeat_interleave(16)
    assert ((counts - expected).abs() < 5 * expected.sqrt()).all()
    assert rotations.amax() == 3


# Pixels


def pillow_view(image: Image.Image, box: Box, size: int, interpolation: str) -> Tensor:
    """Crop and resize with Pillow, rows before columns whatever its release prefers."""
    resampling = Image.Resampling[interpolation.upper()]
    crop = image.crop(box).resize((size, box[3] - box[1]), resampling)
    return torch.from_numpy(np.array(crop.resize((size, size), resampling))).permute(2, 0, 1)


def assert_pixels_equal_pillows(image: Image.Image, seed: int, interpolation: str = "bicubic") -> None:
    recipe = replace(RECIPE, interpolation=interpolation)
    box = draw_crop(np.random.default_rng(seed), image.size, recipe)
    view = crop_and_resize(np.asarray(image), recipe, box, flip=False, rotation=0)
    difference = (view.int() - pillow_view(image, box, 224, interpolation).int()).abs()
    assert difference.max() <= 2
    assert (difference != 0).float().mean() < 0.02
    assert (difference > 1).float().mean() < 1e-4


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_equal_pillows(interpolation: str) -> None:
    for seed in range(6):
        assert_pixels_equal_pillows(make_image(640, 480, seed), seed, interpolation)
        assert_pixels_equal_pillows(make_image(120, 90, seed), seed, interpolation)


def test_pixels_of_photographs_equal_pillows(photographs: Path) -> None:
    for seed, file in enumerate(sorted((photographs / "train2017").glob("*.jpg"))[:24]):
        assert_pixels_equal_pillows(Image.open(file).convert("RGB"), seed)


def test_rotation_is_counter_clockwise_after_the_flip() -> None:
    pixels = np.zeros((40, 40, 3), dtype=np.uint8)
    pixels[:20, :20] = 255  # the top left corner of the upright view
    recipe = replace(RECIPE, size=40)
    for flip, corners in ((False, ["tl", "bl", "br", "tr"]), (True, ["tr", "tl", "bl", "br"])):
        for rotation, corner in enumerate(corners):
            view = crop_and_resize(pixels, recipe, (0, 0, 40, 40), flip, rotation)[0] > 127
            row, column = (20 if corner[0] == "b" else 0), (20 if corner[1] == "r" else 0)
            assert view[row : row + 20, column : column + 20].float().mean() > 0.9, (flip, rotation)
            assert view.float().mean() < 0.3


@pytest.mark.parametrize("rotate", [False, True])
def test_boxes_and_pixels_of_two_views_agree(rotate: bool) -> None:
    """Where red is x and green is y, the aligned views of an image show the same coordinates on their overlap."""
    ramp = np.zeros((200, 250, 3), dtype=np.uint8)
    ramp[:, :, 0], ramp[:, :, 1] = np.arange(250), np.arange(200)[:, None]
    image, recipe = Image.fromarray(ramp), replace(RECIPE, size=64, scale=(0.3, 0.8), rotate=rotate)
    recipes = [recipe, replace(recipe, overlap=OverlapCondition((0,), 0.2, "image"))]
    batch = collate([Sample(**vars(make_views(image, recipes, 0, 0, number))) for number in range(60)])
    assert (
        len({(int(flip), int(turn)) for flip, turn in zip(batch.flips[:, 0], batch.rotations[:, 0])}) == 2 + 6 * rotate
    )
    aligned = []
    for a, b in ((0, 1), (1, 0)):
        boxes, intersects = overlap_boxes(batch, a, b)
        assert intersects.all()
        rotations = batch.rotations[:, a] if rotate else None
        aligned.append(align(batch.views[a].float(), boxes, batch.flips[:, a], rotations, output_size=(6, 6)))
    difference = (aligned[0] - aligned[1])[:, :2].abs()
    # Levels are rounded, and the filters see no pixels beyond the crop: up to half a source pixel each at its edges.
    assert difference.mean() < 0.5
    assert difference.max() < 4
    columns = aligned[0][:, 0].mean(1)
    assert (columns.diff(dim=1) > 0).all()  # upright again: x grows to the right
    assert (aligned[0][:, 1].mean(2).diff(dim=1) > 0).all()


def test_images_of_every_mode_become_rgb() -> None:
    for mode in ("L", "P", "RGBA", "CMYK", "1", "LA"):
        image = make_image(80, 60).convert(mode)
        assert np.array_equal(rgb_pixels(image), np.asarray(image.convert("RGB"))), mode
    levels = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)  # 16-bit levels keep their upper half
    for image in (Image.fromarray(levels), Image.fromarray(levels.astype(np.int32))):
        assert np.array_equal(rgb_pixels(image), np.repeat((levels // 256).astype(np.uint8)[:, :, None], 3, axis=2))


def test_exif_orientation_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown rotated by 90 degrees
    make_image(120, 60).save(tmp_path / "rotated.png", exif=exif)
    view = make_views(Image.open(tmp_path / "rotated.png"), [RECIPE], 0, 0, 0).views[0]
    assert torch.equal(view, make_views(make_image(120, 60), [RECIPE], 0, 0, 0).views[0])


# Records


def test_a_record_holds_what_was_drawn() -> None:
    record = make_views(make_image(200, 150), multi_crop_recipes(), 0, 0, 5)
    assert [tuple(view.shape) for view in record.views] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 8
    assert all(view.dtype == torch.uint8 and view.is_contiguous() for view in record.views)
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in vars(record).items() if isinstance(t, Tensor)}
    assert shapes == {
        "crops": ((10, 4), torch.float32),
        "flips": ((10,), torch.bool),
        "rotations": ((10,), torch.int64),
        "index": ((), torch.int64),
        "color": ((10, 11), torch.float32),
    }
    assert record.index == 5
    assert not record.flips.any()


def test_a_new_field_of_a_view_travels_from_worker_to_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if `ViewRecord` had one field more: it is stacked, pinned and copied without a further change."""

    @dataclass
    class DepthRecord(ViewRecord):
        depth: Tensor | None = None

    @dataclass
    class DepthBatch(Batch):
        depth: Tensor | None = None

    monkeypatch.setattr(batch_module, "ViewRecord", DepthRecord)
    records = [make_views(make_image(80, 60), multi_crop_recipes(), 0, 0, number) for number in range(3)]
    stacked = batch_module.stack_records([DepthRecord(**vars(r), depth=torch.ones(10, 2)) for r in records])
    batch = DepthBatch(**stacked, unreadable=("a.jpg",), step=4)
    assert batch.depth.shape == (3, 10, 2)
    assert batch.views[9].shape == (3, 3, 16, 16)
    moved = batch.to("meta")
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor.to("meta"))  # no GPU is needed to see which
    for copy in (moved, batch.pin_memory()):
        on_device = [*copy.views, copy.crops, copy.flips, copy.rotations, copy.index, copy.depth]
        assert all(tensor.device.type == "meta" for tensor in on_device)
        assert copy.color is batch.color  # the host reads it
        assert (copy.unreadable, copy.step) == (("a.jpg",), 4)
