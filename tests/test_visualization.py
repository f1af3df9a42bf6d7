"""utils/visualization.py: colors of prototypes, slot maps of any photograph, and the images that a run shows."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import main_pretrain
from data.views import center_view
from utils.visualization import (
    assign_pixels,
    palette,
    region_boundaries,
    render_slot_map,
    slot_grid,
    srgb_to_oklab,
)

PHOTOGRAPHS = {
    "black": torch.zeros(3, 60, 60),
    "gray": torch.full((3, 60, 60), 0.5),
    "white": torch.ones(3, 60, 60),
    "half": torch.arange(60).lt(30).float().expand(3, 60, 60),
    "dark": 0.1 * torch.rand(3, 60, 60, generator=torch.Generator().manual_seed(0)),
}
"""Levels (3, 60, 60) of photographs without color."""


def smallest_difference(colors: Tensor) -> float:
    """Return the smallest distance in Oklab between two of the sRGB colors (N, 3)."""
    oklab = srgb_to_oklab(colors.double())
    return float(torch.nn.functional.pdist(oklab).min())


def test_oklab_of_known_colors() -> None:
    colors = torch.tensor([[1.0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 0, 1]])
    expected = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0.628, 0.225, 0.126], [0.452, -0.032, -0.312]])
    torch.testing.assert_close(srgb_to_oklab(colors), expected, atol=1e-3, rtol=0)


def test_color_of_a_number_does_not_depend_on_the_count() -> None:
    colors = palette(300)
    for count in (1, 2, 3, 7, 64, 65, 256):
        assert torch.equal(palette(count), colors[:count])


@pytest.mark.parametrize(("count", "difference"), [(8, 0.2), (32, 0.09), (256, 0.035)])
def test_colors_of_the_palette_differ(count: int, difference: float) -> None:
    # 0.02 is about the smallest difference that one sees.
    colors = palette(count)
    assert colors.shape == (count, 3)
    assert smallest_difference(torch.cat([colors, torch.zeros(1, 3), torch.full((1, 3), 0.5), torch.ones(1, 3)])) > (
        min(difference, 0.1)
    )
    assert smallest_difference(colors) > difference


def test_palette_of_more_numbers_than_colors_repeats_them() -> None:
    colors = palette(2050)
    assert len(colors[:2048].unique(dim=0)) == 2048
    assert torch.equal(colors[2048:], colors[:2])


def slot_map_of_stripes(photograph: Tensor, count: int) -> list[Tensor]:
    """Draw `count` prototypes as stripes of 12 rows over a photograph; return the colors (N, 3) inside each stripe."""
    photograph = photograph[:, :12].repeat(1, count, 1)
    drawn = render_slot_map(photograph, torch.arange(count).repeat_interleave(12)[:, None].expand(-1, 60))
    width = max(1, round(12 * count / 250))
    inside = [drawn[:, 12 * number + width : 12 * (number + 1) - width] for number in range(count)]
    return [stripe.flatten(1).T for stripe in inside]


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_slots_differ_on_dark_and_bright_photographs(name: str) -> None:
    means = torch.stack([colors.mean(dim=0) for colors in slot_map_of_stripes(PHOTOGRAPHS[name], 32)])
    assert smallest_difference(means) > 0.06
    lightness = srgb_to_oklab(means)[:, 0]
    assert lightness.min() > 0.45
    assert lightness.max() < 0.85


def test_a_slot_looks_alike_on_all_photographs() -> None:
    drawn = {name: slot_map_of_stripes(photograph, 8) for name, photograph in PHOTOGRAPHS.items()}
    for colors in zip(*drawn.values()):
        means = srgb_to_oklab(torch.stack([stripe.mean(dim=0) for stripe in colors]))
        assert (means - means[0]).norm(dim=1).max() < 0.03
        # The black and the white half of a photograph can still be told apart.
        lightness = srgb_to_oklab(colors[list(PHOTOGRAPHS).index("half")])[:, 0]
        assert 0.05 < lightness.max() - lightness.min() < 0.2


def test_slot_map_draws_only_the_shown_prototypes_in_color() -> None:
    assignment = torch.arange(3).repeat_interleave(20).expand(60, 60)
    drawn = render_slot_map(PHOTOGRAPHS["half"], assignment, shown=[1])
    saturation = drawn.amax(dim=0) - drawn.amin(dim=0)
    assert (saturation[:, 22:38] > 0.1).all()
    assert (saturation[:, :18] == 0).all()
    assert (saturation[:, 42:] == 0).all()


def test_boundaries_are_a_light_and_a_dark_line() -> None:
    assignment = torch.zeros(60, 60, dtype=torch.int64)
    assignment[20:40, 10:] = 3
    light, dark = region_boundaries(assignment, 1)
    assert light[20, 10:].all()
    assert dark[19, 10:].all()
    assert light[21:40, 10].all()
    assert dark[21:39, 9].all()
    assert not (light | dark)[21:39, 11:].any()
    drawn = render_slot_map(PHOTOGRAPHS["gray"], assignment)
    assert (drawn[:, light] == 1).all()
    assert (drawn[:, dark] == 0).all()


@pytest.mark.parametrize("side", [3, 20, 35])
def test_assign_pixels_equals_the_argmax_of_all_upsampled_scores(side: int) -> None:
    noise = torch.randn(300, 5, 5, generator=torch.Generator().manual_seed(side))
    for scores in (noise, F.avg_pool2d(noise, 3, 1, 1)):
        upsampled = F.interpolate(scores[None], (side, side), mode="bilinear", align_corners=False)[0]
        assert torch.equal(assign_pixels(scores, side), upsampled.argmax(dim=0))


def test_slot_grid_shows_images_above_their_maps() -> None:
    images = torch.stack([PHOTOGRAPHS["half"], PHOTOGRAPHS["white"]])
    scores = torch.randn(2, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    grid = slot_grid(images, scores)
    assert grid.shape == (3, 2 * 64 + 4, 2 * 64 + 4)
    for column, (image, image_scores) in enumerate(zip(images, scores)):
        shown = grid[:, :, 4 + 64 * column :][:, :, :60]
        assert torch.equal(shown[:, 4:64], (255 * image).round().byte())
        drawn = render_slot_map(image, assign_pixels(image_scores, 30).repeat_interleave(2, 0).repeat_interleave(2, 1))
        assert torch.equal(shown[:, 68:128], (255 * drawn).round().byte())


@pytest.mark.usefixtures("small_encoder")
def test_slot_maps_that_cannot_be_written_are_named(
    tiny: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run" / "slots.png"
    path.mkdir(parents=True)
    with pytest.raises(SystemExit, match="2"):
        main_pretrain.main(tiny("--epochs", "1", "--warmup-epoch", "0"))
    assert f"--output-dir {path}: cannot be written (Is a directory); use" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.usefixtures("small_encoder")
def test_a_run_shows_images_spread_over_the_dataset(
    tiny: Callable[..., list[str]], images: Path, tmp_path: Path
) -> None:
    main_pretrain.main(tiny("--epochs", "1", "--warmup-epoch", "0"))
    with Image.open(tmp_path / "run" / "slots.png") as drawn:
        top = np.array(drawn)[4:132]
    paths = sorted(images.iterdir())
    for column, path in enumerate(paths[number * len(paths) // 8] for number in range(8)):
        with Image.open(path) as image:
            expected = center_view(image, 128).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(top[:, 4 + 132 * column :][:, :128], expected)
