"""data/color.py: draws in distribution, operations and chains of them against Pillow, batches."""

import colorsys
import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms import functional as tvf

from data.color import BLUR, FACTORS, GRAY, NEUTRAL, ORDER, SOLARIZE, apply_color, augment_color, draw_color
from tests.helpers import make_batch, make_image
from utils.batch import MEAN, STD
from utils.view_recipes import ColorRecipe, two_view_recipes

SIZE = 96
COLUMNS = {"factors": FACTORS, "gray": GRAY, "blur": BLUR, "solarize": SOLARIZE}
PILLOW_JITTER = (
    lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    tvf.adjust_hue,
)


def make_color(**columns: float | list[float]) -> Tensor:
    """Make color parameters (1, 11), neutral except for the named columns."""
    color = torch.tensor([NEUTRAL])
    for name, value in columns.items():
        color[0, COLUMNS[name]] = torch.as_tensor(value, dtype=torch.float32)
    return color


def to_view(pixels: np.ndarray | Image.Image) -> Tensor:
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].contiguous()


def augment(pixels: np.ndarray | Image.Image, color: Tensor) -> np.ndarray:
    """Augment an image and return levels 0..255."""
    view = augment_color(to_view(pixels), color)[0].permute(1, 2, 0)
    return (255 * (view * torch.tensor(STD) + torch.tensor(MEAN))).numpy()


def augment_with_pillow(image: Image.Image, color: Tensor) -> np.ndarray:
    values = color[0].tolist()
    for number in map(int, values[ORDER]):
        if values[number] != NEUTRAL[number]:
            image = PILLOW_JITTER[number](image, values[number])
    if values[GRAY]:
        image = image.convert("L").convert("RGB")
    if values[BLUR]:
        image = image.filter(ImageFilter.GaussianBlur(values[BLUR]))
    if values[SOLARIZE]:
        image = ImageOps.solarize(image, 128)
    return np.asarray(image, dtype=np.float64)


def draw_colors(recipe: ColorRecipe, count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([draw_color(rng, recipe) for _ in range(count)])


def test_operations_are_drawn_with_their_probabilities() -> None:
    first, second = (draw_colors(recipe.color, 4000) for recipe in two_view_recipes(224, 0.08))
    for color, blur_p, solarize_p in ((first, 1.0, 0.0), (second, 0.1, 0.2)):
        drawn = {
            "jitter": (0.8, (color[:, FACTORS] != NEUTRAL[FACTORS]).all(1)),
            "gray": (0.2, color[:, GRAY] == 1),
            "blur": (blur_p, color[:, BLUR] > 0),
            "solarize": (solarize_p, color[:, SOLARIZE] == 1),
        }
        for name, (p, is_drawn) in drawn.items():
            assert abs(is_drawn.mean() - p) <= 4 * math.sqrt(p * (1 - p) / len(color)), name


def test_strengths_are_uniform_and_orders_have_the_same_probability() -> None:
    color = draw_colors(ColorRecipe(jitter=(0.4, 1.5, 0.2, 0.1), jitter_p=1, blur_p=1), 4800)
    ranges = {0: (0.6, 1.4), 1: (0, 2.5), 2: (0.8, 1.2), 3: (-0.1, 0.1), BLUR: (0.1, 2)}
    quantiles = np.linspace(0, 1, 11)
    for column, (low, high) in ranges.items():
        values = (np.quantile(color[:, column], quantiles) - low) / (high - low)
        assert np.abs(values - quantiles).max() < 4 * math.sqrt(0.25 / 4800)
        assert values.min() > -1e-6
        assert values.max() < 1 + 1e-6
    orders = Counter(map(tuple, color[:, ORDER].tolist()))
    assert len(orders) == 24
    assert all(abs(count - 200) < 5 * math.sqrt(200) for count in orders.values())


def test_neutral_parameters_only_normalize() -> None:
    color = torch.from_numpy(draw_color(np.random.default_rng(0), ColorRecipe(jitter_p=0, gray_p=0)))[None]
    assert torch.equal(color, make_color())
    views = to_view(make_image(SIZE, SIZE))
    original = views.clone()
    expected = tvf.normalize(views.float() / 255, MEAN, STD)
    torch.testing.assert_close(augment_color(views, color), expected, rtol=0, atol=2e-6)
    assert torch.equal(views, original)


# Pillow cuts off the fraction after a blend, which is half a level lower; its HSV has 8 bits a channel.
@pytest.mark.parametrize(
    ("color", "mean", "largest"),
    [
        *((make_color(factors=[f, 1, 1, 0]), 0.55, 1.05) for f in (0.6, 1.4)),
        *((make_color(factors=[1, f, 1, 0]), 0.55, 1.5) for f in (0.6, 1.4)),
        *((make_color(factors=[1, 1, f, 0]), 0.55, 1.5) for f in (0.8, 1.2)),
        *((make_color(factors=[1, 1, 1, f]), 1.6, 16) for f in (-0.1, 0.02)),
        (make_color(gray=1), 0.35, 0.55),
        *((make_color(blur=s), 0.9, 3.5) for s in (0.1, 0.7, 1.4, 2.0)),
        (make_color(solarize=1), 1e-4, 1e-3),
    ],
)
def test_each_operation_matches_pillow(color: Tensor, mean: float, largest: float) -> None:
    for size in (SIZE, 50):
        image = make_image(size, size, size)
        difference = np.abs(augment(image, color) - augment_with_pillow(image, color))
        assert difference.mean() <= mean
        assert difference.max() <= largest


# Levels up to 255 times a few float32 roundings of 6e-8, which the division by a chroma of 1 multiplies: 1e-2.
@pytest.mark.parametrize("shift", [-0.45, -0.1, 0.03, 0.5])
def test_hue_shift_equals_that_of_hsv(shift: float) -> None:
    image = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    image[0] = np.arange(12)[:, None] * 20  # gray pixels have no hue to shift
    expected = []
    for pixel in image.reshape(-1, 3) / 255:
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        expected.append(colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value))
    shifted = augment(image, make_color(factors=[1, 1, 1, shift]))
    np.testing.assert_allclose(shifted.reshape(-1, 3), 255 * np.array(expected), atol=0.01)


def test_chains_in_their_orders_equal_pillows() -> None:
    """Another order would differ by 15 levels on average where all four operations are strong."""
    means, largest = [], []
    for seed in range(40):
        recipe = two_view_recipes(SIZE, 0.08)[seed % 2].color
        color = torch.from_numpy(draw_color(np.random.default_rng(seed), recipe))[None]
        if seed < 10:
            color[0, FACTORS] = torch.tensor([1.5, 1.5, 0.3, 0.2])
        image = make_image(SIZE, SIZE, seed)
        difference = np.abs(augment(image, color) - augment_with_pillow(image, color))
        means.append(difference.mean())
        largest.append(np.quantile(difference, 0.999))
    assert np.mean(means) < 1.5
    assert np.max(means) < 4
    assert np.max(largest) < 25


def make_colored_views(count: int) -> tuple[Tensor, Tensor]:
    views = torch.cat([to_view(make_image(SIZE, SIZE, seed)) for seed in range(count)])
    rng, recipes = np.random.default_rng(0), two_view_recipes(SIZE, 0.08)
    return views, torch.from_numpy(np.stack([draw_color(rng, recipes[row % 2].color) for row in range(count)]))


def test_images_of_a_batch_do_not_affect_each_other() -> None:
    """Up to the order of additions in the products of the blur: some float32 roundings of levels up to 255."""
    views, color = make_colored_views(11)
    separate = torch.cat([augment_color(views[i : i + 1], color[i : i + 1]) for i in range(len(views))])
    torch.testing.assert_close(augment_color(views, color), separate, rtol=0, atol=1e-4)


def test_apply_color_colors_every_view_of_a_batch_once() -> None:
    views, color = make_colored_views(6)
    small = views[:, :, :40, :40].contiguous()
    batch = make_batch(6)
    batch.views, batch.color, batch.step = [views, small], torch.stack([color, color.flip(0)], dim=1), 7
    colored = apply_color(batch)
    assert (colored.color, colored.step) == (None, 7)
    assert torch.equal(colored.views[0], augment_color(views, color))
    assert torch.equal(colored.views[1], augment_color(small, color.flip(0)))
    assert apply_color(colored) is colored


def test_color_does_not_read_the_device() -> None:
    """On the meta device, where tensors have no values, every read by the host fails."""
    views, color = make_colored_views(16)
    assert augment_color(views.to("meta"), color).shape == views.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_color_on_a_gpu_equals_the_cpu_and_never_waits() -> None:
    views, color = make_colored_views(32)
    on_device = views.cuda()
    augment_color(on_device, color)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = augment_color(on_device, color)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result.cpu(), augment_color(views, color), rtol=0, atol=2e-2)
