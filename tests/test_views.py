"""Crops, flips and pixels of the views, against Pillow and torchvision."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from data.color import ColorRecipe
from data.views import (
    Box,
    ViewRecipe,
    central_crop,
    cut,
    draw_crop,
    make_views,
    overlap,
    rgb_pixels,
    slotcon_views,
    try_crop,
)

PHOTOGRAPHS = Path(__file__).parents[2] / "shared/data/coco_mini/train2017"
RECIPE = ViewRecipe(224, (0.08, 1.0), ColorRecipe())


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Soft forms under noise."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    forms = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    return Image.fromarray((forms + rng.normal(0, 12, forms.shape)).clip(0, 255).astype(np.uint8))


# --- crops


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 900), st.integers(1, 900), st.integers(0, 2**32), st.floats(0.01, 1))
def test_crops_lie_inside_the_image(width: int, height: int, seed: int, smallest: float) -> None:
    recipe = ViewRecipe(224, (smallest, 1.0), ColorRecipe())
    rng = np.random.default_rng(seed)
    first = draw_crop(rng, (width, height), recipe)
    for x0, y0, x1, y1 in (first, draw_crop(rng, (width, height), recipe, meet=first)):
        assert 0 <= x0 < x1 <= width
        assert 0 <= y0 < y1 <= height
        assert all(isinstance(edge, int) for edge in (x0, y0, x1, y1))


def test_area_is_uniform_and_aspect_log_uniform() -> None:
    recipe = ViewRecipe(224, (0.1, 0.5), ColorRecipe())  # always fits into a square
    rng = np.random.default_rng(0)
    boxes = np.array([draw_crop(rng, (2000, 2000), recipe) for _ in range(4000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    levels = np.linspace(0.05, 0.95, 19)
    assert np.abs(np.quantile(width * height / 4e6, levels) - (0.1 + 0.4 * levels)).max() < 0.015
    aspect = np.quantile(np.log(width / height), levels) / math.log(4 / 3)
    assert np.abs(aspect - (2 * levels - 1)).max() < 0.05
    position = np.quantile(boxes[:, 0] / (2000 - width), levels)
    assert np.abs(position - levels).max() < 0.03


def test_crops_are_distributed_like_torchvisions() -> None:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    image = torch.empty(3, 480, 640)
    ours = np.array([draw_crop(rng, (640, 480), RECIPE) for _ in range(4000)])
    theirs = np.array([RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(4000)])
    theirs = np.stack([theirs[:, 1], theirs[:, 0], theirs[:, 1] + theirs[:, 3], theirs[:, 0] + theirs[:, 2]], 1)
    levels = np.linspace(0.05, 0.95, 19)
    for edge, side in enumerate((640, 480, 640, 480)):
        difference = np.quantile(ours[:, edge], levels) - np.quantile(theirs[:, edge], levels)
        assert np.abs(difference).max() < 0.04 * side


def test_the_second_crop_meets_the_first() -> None:
    rng = np.random.default_rng(0)
    missed = missed_unconditioned = 0
    for _ in range(4000):
        first = draw_crop(rng, (640, 480), RECIPE)
        second = draw_crop(rng, (640, 480), RECIPE, meet=first)
        missed += overlap(first, second) == 0
        missed_unconditioned += overlap(first, draw_crop(rng, (640, 480), RECIPE)) == 0
    assert missed == 0
    assert missed_unconditioned > 100


def test_the_overlap_is_one_percent_of_the_target_area() -> None:
    """A first crop in the corner: what is accepted of the first draws is what the rule says, replayed."""
    corner = (0, 0, 60, 60)
    accepted = 0
    for seed in range(300):
        replay = np.random.default_rng(seed)
        tries = [try_crop(replay, (640, 480), RECIPE) for _ in range(10)]
        fits = [box for box, area in tries if box and overlap(box, corner) >= 0.01 * area]
        drawn = draw_crop(np.random.default_rng(seed), (640, 480), RECIPE, meet=corner)
        accepted += bool(fits)
        assert drawn == fits[0] if fits else drawn not in [box for box, _ in tries]
    assert 20 < accepted < 300


@pytest.mark.parametrize(
    ("size", "box"),
    [((1000, 100), (433, 0, 566, 100)), ((100, 1000), (0, 433, 100, 566)), ((120, 100), (0, 0, 120, 100))],
)
def test_the_last_resort_is_the_largest_central_crop(size: tuple[int, int], box: Box) -> None:
    assert central_crop(size, (3 / 4, 4 / 3)) == box


@pytest.mark.parametrize("meet", [None, (0, 0, 10, 10)])
def test_ten_draws_that_do_not_fit_end_in_the_central_crop(meet: Box | None) -> None:
    recipe = ViewRecipe(224, (0.9, 1.0), ColorRecipe())
    assert draw_crop(np.random.default_rng(0), (1000, 100), recipe, meet) == (433, 0, 566, 100)


def test_overlap_is_the_area_of_the_intersection() -> None:
    assert overlap((0, 0, 10, 10), (5, 8, 20, 20)) == 10
    assert overlap((0, 0, 10, 10), (10, 0, 20, 10)) == 0
    assert overlap((0, 0, 10, 10), (20, 20, 30, 30)) == 0


# --- chance


def equal(a: object, b: object) -> bool:
    return all(
        torch.equal(torch.stack(x) if isinstance(x, list) else x, torch.stack(y) if isinstance(y, list) else y)
        for x, y in zip(a, b)  # type: ignore[call-overload]
    )


def test_views_depend_on_seed_epoch_index_and_nothing_else() -> None:
    image, recipes = picture(320, 240), slotcon_views(64, 0.08)
    views = make_views(image, recipes, 1, 2, 3)
    np.random.seed(5)
    torch.manual_seed(5)
    assert equal(views, make_views(image, recipes, 1, 2, 3))
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0), (2, 1, 3), (1, 3, 2)):
        drawn = make_views(image, recipes, *other)
        assert not torch.equal(drawn.crops, views.crops)
        assert not torch.equal(drawn.color, views.color)


def test_the_views_of_an_image_draw_differently() -> None:
    image, recipe = picture(320, 240), slotcon_views(64, 0.08)[0]
    two, three = (make_views(image, [recipe] * count, 0, 0, 0) for count in (2, 3))
    assert not torch.equal(two.crops[0], two.crops[1])
    assert not torch.equal(two.color[0], two.color[1])
    assert torch.equal(two.crops, three.crops[:2])


def test_half_of_the_views_are_mirrored_each_on_its_own() -> None:
    image, recipes = picture(16, 16), slotcon_views(8, 0.08)
    flips = torch.stack([make_views(image, recipes, 0, 0, index).flips for index in range(1000)])
    codes = (flips * torch.tensor([1, 2])).sum(1).bincount(minlength=4)
    assert ((codes - 250).abs() < 60).all()


# --- what a worker sends


def test_what_a_worker_sends() -> None:
    drawn = make_views(picture(200, 150), slotcon_views(96, 0.08), 0, 0, 0)
    assert [view.shape for view in drawn.views] == [(3, 96, 96)] * 2
    assert all(view.dtype == torch.uint8 and view.is_contiguous() for view in drawn.views)
    assert drawn.crops.shape == (2, 4)
    assert drawn.crops.dtype == torch.float32
    assert drawn.flips.shape == (2,)
    assert drawn.flips.dtype == torch.bool
    assert drawn.turns.tolist() == [0, 0]
    assert drawn.turns.dtype == torch.int64
    assert drawn.color.shape == (2, 11)
    assert drawn.color.dtype == torch.float32


def test_the_published_recipe() -> None:
    first, second = slotcon_views(224, 0.08)
    for recipe in (first, second):
        assert (recipe.size, recipe.scale, recipe.ratio, recipe.flip_p) == (224, (0.08, 1), (3 / 4, 4 / 3), 0.5)
        assert recipe.color.jitter == (0.4, 0.4, 0.2, 0.1)
        assert (recipe.color.jitter_p, recipe.color.gray_p) == (0.8, 0.2)
        assert recipe.color.blur_sigma == (0.1, 2.0)
    assert (first.color.blur_p, first.color.solarize_p) == (1.0, 0.0)
    assert (second.color.blur_p, second.color.solarize_p) == (0.1, 0.2)


# --- pixels


def by_pillow(image: Image.Image, box: Box, size: int) -> torch.Tensor:
    """Crop and resize, rows before columns whatever the release of Pillow prefers."""
    crop = image.crop(box).resize((size, box[3] - box[1]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(crop.resize((size, size), Image.Resampling.BICUBIC))).permute(2, 0, 1)


def assert_pillows(image: Image.Image, seed: int, size: int = 224) -> None:
    rng = np.random.default_rng(seed)
    box = draw_crop(rng, image.size, RECIPE)
    difference = cut(np.asarray(image), box, size, False).int() - by_pillow(image, box, size).int()
    assert difference.abs().max() <= 2
    assert (difference != 0).float().mean() < 0.02
    assert (difference.abs() > 1).float().mean() < 1e-4


@pytest.mark.parametrize("seed", range(8))
def test_pixels_are_pillows(seed: int) -> None:
    assert_pillows(picture(640, 480, seed), seed)
    assert_pillows(picture(120, 90, seed), seed)


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="no photographs here")
def test_pixels_are_pillows_on_photographs() -> None:
    for seed, file in enumerate(sorted(PHOTOGRAPHS.glob("*.jpg"))[:24]):
        assert_pillows(Image.open(file).convert("RGB"), seed)


def test_a_flip_mirrors_the_view() -> None:
    pixels = np.asarray(picture(100, 80))
    plain, flipped = (cut(pixels, (10, 5, 90, 75), 32, flip) for flip in (False, True))
    assert torch.equal(flipped, plain.flip(2))


def test_crops_say_where_the_pixels_come_from() -> None:
    """On a picture whose red is x and green is y, the view's corners are the crop's."""
    ramp = np.zeros((200, 250, 3), dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(250)[None], np.arange(200)[:, None]
    drawn = make_views(Image.fromarray(ramp), slotcon_views(64, 0.3), 0, 0, 4)
    for view, (x0, y0, x1, y1), flip in zip(drawn.views, drawn.crops.tolist(), drawn.flips):
        red = view[0].flip(1) if flip else view[0]
        assert abs(red[:, 0].float().mean() - x0) < 5
        assert abs(red[:, -1].float().mean() - x1) < 5
        assert abs(view[1, 0].float().mean() - y0) < 5
        assert abs(view[1, -1].float().mean() - y1) < 5


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "LA", "1"])
def test_every_kind_of_image_becomes_rgb(mode: str) -> None:
    image, recipes = picture(80, 60).convert(mode), slotcon_views(32, 0.08)
    assert equal(make_views(image, recipes, 0, 0, 0), make_views(image.convert("RGB"), recipes, 0, 0, 0))


def test_sixteen_bit_levels_keep_their_upper_half() -> None:
    levels = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    for image in (Image.fromarray(levels), Image.fromarray(levels.astype(np.int32))):
        assert np.array_equal(rgb_pixels(image), np.repeat((levels // 256).astype(np.uint8)[:, :, None], 3, axis=2))


def test_the_exif_orientation_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    for name, kept in (("turned.jpg", exif), ("plain.jpg", Image.Exif())):
        picture(120, 60).save(tmp_path / name, exif=kept, quality=95)
    recipes = slotcon_views(32, 0.08)
    turned, plain = (make_views(Image.open(tmp_path / n), recipes, 0, 0, 0) for n in ("turned.jpg", "plain.jpg"))
    assert equal(turned, plain)
