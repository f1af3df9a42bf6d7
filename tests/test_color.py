"""The color operations, against Pillow one by one and in whole chains."""

import colorsys
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms import functional as tvf

from data.color import (
    BLUR,
    FACTORS,
    GRAY,
    MEAN,
    NEUTRAL,
    ORDER,
    SOLARIZE,
    STD,
    ColorRecipe,
    apply_color,
    draw_color,
    photometric,
)
from data.views import slotcon_views
from utils.batch import Batch

SIZE = 96


def picture(seed: int = 0, size: int = SIZE) -> np.ndarray:
    """(size, size, 3) uint8: soft colored forms, edges and some noise, with black and white in it."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    forms = np.array(small.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)
    forms[size // 4 : size // 2, size // 3 :] = 255 - forms[size // 4 : size // 2, size // 3 :]
    return (1.2 * (forms - 128) + 128 + rng.normal(0, 6, forms.shape)).clip(0, 255).astype(np.uint8)


def row(**columns: float | list[float]) -> Tensor:
    """(1, 11): neutral color parameters but for the named columns."""
    names = {"factors": FACTORS, "order": ORDER, "gray": GRAY, "blur": BLUR, "solarize": SOLARIZE}
    color = torch.tensor([NEUTRAL])
    for name, value in columns.items():
        color[0, names[name]] = torch.as_tensor(value, dtype=torch.float32)
    return color


def levels(views: Tensor) -> Tensor:
    """Normalized views as levels 0..255."""
    return 255 * (views * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1))


def ours(image: np.ndarray, color: Tensor) -> np.ndarray:
    views = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous()
    return levels(photometric(views, color))[0].permute(1, 2, 0).numpy()


JITTERS = (
    lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    tvf.adjust_hue,
)


def by_pillow(image: np.ndarray, color: Tensor) -> np.ndarray:
    pil, values = Image.fromarray(image), color[0].tolist()
    for number in map(int, values[ORDER]):
        if values[number] != NEUTRAL[number]:
            pil = JITTERS[number](pil, values[number])
    if values[GRAY]:
        pil = pil.convert("L").convert("RGB")
    if values[BLUR]:
        pil = pil.filter(ImageFilter.GaussianBlur(values[BLUR]))
    if values[SOLARIZE]:
        pil = ImageOps.solarize(pil, 128)
    return np.asarray(pil, dtype=np.float64)


# --- draws


def draws(recipe: ColorRecipe, count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([draw_color(rng, recipe) for _ in range(count)])


def test_how_often_each_operation_is_drawn() -> None:
    first, second = (draws(recipe.color, 4000) for recipe in slotcon_views(224, 0.08))
    for color, blur, solarize in ((first, 1.0, 0.0), (second, 0.1, 0.2)):
        shares = {
            0.8: (color[:, FACTORS] != NEUTRAL[FACTORS]).all(1),
            0.2: color[:, GRAY] == 1,
            blur: color[:, BLUR] > 0,
            solarize: color[:, SOLARIZE] == 1,
        }
        for p, happened in shares.items():
            assert abs(happened.mean() - p) <= 4 * math.sqrt(p * (1 - p) / len(color))


def test_strengths_are_uniform_within_their_ranges() -> None:
    color = draws(ColorRecipe(jitter=(0.4, 1.5, 0.2, 0.1), jitter_p=1, blur_p=1), 4000)
    ranges = {0: (0.6, 1.4), 1: (0, 2.5), 2: (0.8, 1.2), 3: (-0.1, 0.1), BLUR: (0.1, 2)}
    quantiles = np.linspace(0, 1, 11)
    for column, (low, high) in ranges.items():
        values = np.quantile(color[:, column], quantiles)
        assert color[:, column].min() >= np.float32(low)
        assert color[:, column].max() <= np.float32(high)
        assert np.abs((values - low) / (high - low) - quantiles).max() < 0.03


def test_every_order_is_as_likely() -> None:
    orders = Counter(map(tuple, draws(ColorRecipe(jitter_p=1), 4800)[:, ORDER].tolist()))
    assert len(orders) == 24
    assert all(abs(count - 200) < 75 for count in orders.values())


def test_a_view_without_color_changes_is_neutral() -> None:
    color = draw_color(np.random.default_rng(0), ColorRecipe(jitter_p=0, gray_p=0))
    assert color.dtype == np.float32
    assert tuple(color.tolist()) == NEUTRAL


# --- single operations


def test_neutral_parameters_only_normalize() -> None:
    image = picture()
    views = torch.from_numpy(image).permute(2, 0, 1)[None]
    expected = tvf.normalize(views.float() / 255, MEAN, STD)
    torch.testing.assert_close(photometric(views, row()), expected, rtol=0, atol=2e-6)
    assert views.dtype == torch.uint8
    assert np.array_equal(views[0].permute(1, 2, 0).numpy(), image)


# Pillow cuts the fraction off after a blend, so that it lies half a level lower; its HSV has 8 bits a channel.
@pytest.mark.parametrize(
    ("name", "color", "mean", "largest"),
    [
        *((f"brightness {f}", row(factors=[f, 1, 1, 0]), 0.5, 1.01) for f in (0.6, 0.93, 1.1, 1.4)),
        *((f"contrast {f}", row(factors=[1, f, 1, 0]), 0.5, 1.3) for f in (0.6, 0.93, 1.1, 1.4)),
        *((f"saturation {f}", row(factors=[1, 1, f, 0]), 0.52, 1.3) for f in (0.8, 0.97, 1.05, 1.2)),
        *((f"hue {f}", row(factors=[1, 1, 1, f]), 1.4, 15) for f in (-0.1, -0.05, 0.02, 0.1)),
        ("grayscale", row(gray=1), 0.3, 0.51),
        *((f"blur {s}", row(blur=s), 0.85, 3) for s in (0.1, 0.35, 0.7, 1.0, 1.4, 2.0)),
        ("solarize", row(solarize=1), 1e-4, 1e-3),
    ],
)
def test_each_operation_is_pillows(name: str, color: Tensor, mean: float, largest: float) -> None:
    for seed in range(3):
        difference = np.abs(ours(picture(seed), color) - by_pillow(picture(seed), color))
        assert difference.mean() <= mean, name
        assert difference.max() <= largest, name


def test_solarize_from_128_on() -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    expected = np.where(ramp >= 128, 255 - ramp.astype(float), ramp)
    np.testing.assert_allclose(ours(ramp, row(solarize=1)), expected, atol=1e-3)


def test_gray_pixels_have_no_hue_to_turn() -> None:
    gray = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    np.testing.assert_allclose(ours(gray, row(factors=[1, 1, 1, 0.3])), gray, atol=1e-3)


def test_the_hue_turns_as_in_hsv() -> None:
    image = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    for shift in (-0.45, -0.1, 0.03, 0.1, 0.5):
        expected = []
        for pixel in image.reshape(-1, 3) / 255:
            turn, saturation, value = colorsys.rgb_to_hsv(*pixel)
            expected.append(colorsys.hsv_to_rgb((turn + shift) % 1, saturation, value))
        turned = ours(image, row(factors=[1, 1, 1, shift]))
        np.testing.assert_allclose(turned.reshape(-1, 3), 255 * np.array(expected), atol=0.01)


@settings(max_examples=60, deadline=None)
@given(st.floats(-0.5, 0.5), st.integers(0, 2**32))
def test_a_turned_hue_keeps_value_and_chroma(shift: float, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    turned = ours(image, row(factors=[1, 1, 1, shift]))
    np.testing.assert_allclose(turned.max(2), image.max(2), atol=0.01)
    np.testing.assert_allclose(turned.min(2), image.min(2), atol=0.01)
    thirds = ours(image, row(factors=[1, 1, 1, 1 / 3]))
    np.testing.assert_allclose(thirds, np.roll(image, 1, axis=2), atol=0.01)


@pytest.mark.parametrize("size", [32, 50, 96, 224])
def test_blur_at_the_edges_and_at_any_size(size: int) -> None:
    image = picture(1, size)
    difference = np.abs(ours(image, row(blur=2.0)) - by_pillow(image, row(blur=2.0)))
    assert difference.max() <= 3.5
    assert np.abs(difference[0]).mean() < 1


# --- chains


def test_chains_in_random_order_are_pillows() -> None:
    means, largest = [], []
    for seed in range(60):
        recipe = slotcon_views(SIZE, 0.08)[seed % 2].color
        color = torch.from_numpy(draw_color(np.random.default_rng(seed), recipe))[None]
        difference = np.abs(ours(picture(seed), color) - by_pillow(picture(seed), color))
        means.append(difference.mean())
        largest.append(np.quantile(difference, 0.999))
    assert np.mean(means) < 1.4
    assert np.max(means) < 3
    assert np.max(largest) < 20


def test_the_order_matters_and_is_kept() -> None:
    image, factors = picture(), [1.4, 0.6, 1.2, 0.1]
    colors = [row(factors=factors, order=order) for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2])]
    for number, color in enumerate(colors):
        distances = [np.abs(ours(image, color) - by_pillow(image, other)).mean() for other in colors]
        assert min(distances) == distances[number]
        assert sorted(distances)[1] > 1.5 * min(distances)


# --- batches


def batch_of(count: int) -> tuple[Tensor, Tensor]:
    views = torch.stack([torch.from_numpy(picture(seed)).permute(2, 0, 1) for seed in range(count)])
    recipes = slotcon_views(SIZE, 0.08)
    rng = np.random.default_rng(0)
    color = np.stack([draw_color(rng, recipes[index % 2].color) for index in range(count)])
    return views, torch.from_numpy(color)


def test_a_batch_is_its_images_each_alone() -> None:
    views, color = batch_of(11)
    together = photometric(views, color)
    alone = torch.cat([photometric(views[i : i + 1], color[i : i + 1]) for i in range(len(views))])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(photometric(views[order], color[order]), together[order], rtol=0, atol=1e-4)


def test_apply_color_serves_every_view_of_a_batch() -> None:
    views, color = batch_of(6)
    small = views[:, :, :40, :40].contiguous()
    batch = Batch(
        views=[views, small],
        crops=torch.zeros(6, 2, 4),
        flips=torch.zeros(6, 2, dtype=torch.bool),
        turns=torch.zeros(6, 2, dtype=torch.int64),
        index=torch.arange(6),
        color=torch.stack([color, color.flip(0)], dim=1),
        step=7,
    )
    done = apply_color(batch)
    assert done.color is None
    assert done.step == 7
    assert torch.equal(done.views[0], photometric(views, color))
    assert torch.equal(done.views[1], photometric(small, color.flip(0)))
    assert apply_color(done) is done


def test_nothing_is_read_back_from_the_device() -> None:
    """On the meta device, where tensors have no values, every read by the host fails."""
    views, color = batch_of(16)
    assert photometric(views.to("meta"), color).shape == views.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_it_is_the_same_and_never_waits() -> None:
    views, color = batch_of(32)
    on_device = views.cuda()
    photometric(on_device, color)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = photometric(on_device, color)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result.cpu(), photometric(views, color), rtol=0, atol=2e-2)
