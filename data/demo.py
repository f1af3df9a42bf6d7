"""The demo dataset: procedural scenes with ground-truth masks, so that everything runs without a download.

A scene has one or two grounds and two to six lit, textured objects that overlap and cast shadows. The class of a
surface determines its shape and texture, not its color. Lengths are in units of the shorter side of the image, x to the
right and y down, so that a scene looks the same at every size of one aspect ratio; angles are in radians.
"""

import json
import shutil
import sys
import uuid
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from utils.errors import UsageError

Array = NDArray[np.float64]
VERSION = 1
"""Version of the drawing code; a demo drawn by another version is drawn again."""
SPLITS = ("train", "val")
TWO_PI = 2 * np.pi


@cache
def _noise_table() -> Array:
    """Return a periodic cloud-like texture (1024, 1024) with values uniform in 0..1."""
    n = 1024
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(n, 1 / n), np.fft.fftfreq(n, 1 / n)))
    spectrum = np.fft.fft2(np.random.default_rng(0).standard_normal((n, n)))
    relief = np.fft.ifft2(spectrum / np.maximum(frequency, 6) ** 1.6).real
    return relief.ravel().argsort().argsort().reshape(n, n) / (n * n - 1)


def noise(x: Array, y: Array) -> Array:
    """Return periodic noise in 0..1 at any points, of period 1 and with features of at most about 1/12."""
    table = _noise_table()
    n = len(table)
    x, y = x * n, y * n
    column, row = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    x, y = x - column, y - row
    last = n - 1  # the size is a power of two, so & wraps around
    left, right, top, bottom = column & last, (column + 1) & last, (row & last) * n, ((row + 1) & last) * n
    flat = table.ravel()
    upper = flat.take(top + left) * (1 - x) + flat.take(top + right) * x
    lower = flat.take(bottom + left) * (1 - x) + flat.take(bottom + right) * x
    return upper * (1 - y) + lower * y


def step(value: Array, softness: float) -> Array:
    """Return 0 where value is negative, 1 where positive, with a linear ramp of width `softness` in between."""
    return np.clip(value / softness + 0.5, 0, 1)


def rotate(x: Array, y: Array, angle: float) -> tuple[Array, Array]:
    """Rotate points around the origin, from x towards y."""
    return np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y


# Grounds: (x, y, u) -> height of the relief, and the mix of two colors around 0..1. u: 4 random numbers in 0..1.


def grass(x: Array, y: Array, u: Array) -> tuple[Array, Array]:
    """Blades of grass: ridges of stretched noise, in two layers that lean in opposite directions."""
    blades = np.zeros_like(x)
    for lean, shift in ((0.35, u[:2]), (-0.35, u[2:])):
        across, along = rotate(x, y, lean)
        ridge = 1 - abs(2 * noise(0.9 * across + shift[0], 0.14 * along + shift[1]) - 1)
        blades = np.maximum(blades, ridge**2)
    return 0.006 * blades, 1.5 * blades - 0.5


def tiles(x: Array, y: Array, u: Array) -> tuple[Array, Array]:
    """Beveled square tiles of different tones, with joints between them."""
    size = 0.15 + 0.1 * u[2]
    x, y = x / size + u[0], y / size + u[1]
    column, row = np.floor(x), np.floor(y)
    edge = np.minimum(0.5 - abs(x - column - 0.5), 0.5 - abs(y - row - 0.5))
    joint = step(0.035 - edge, 0.02)
    tone = noise(0.37 * column + u[3], 0.61 * row)
    return 0.012 * step(edge - 0.05, 0.06), 0.45 * tone * (1 - joint) + joint


def sand(x: Array, y: Array, u: Array) -> tuple[Array, Array]:
    """Sand: ripples and fine grains."""
    warp = noise(0.06 * x + u[0], 0.06 * y + u[1])
    phase = (7 + 4 * u[2]) * y + 1.8 * warp
    ripple = 0.5 + 0.5 * np.sin(TWO_PI * phase + 0.7 * np.sin(TWO_PI * phase))
    grains = noise(1.3 * x + u[3], 1.3 * y)
    return 0.016 * ripple, 0.45 * ripple + 0.55 * grains


def sky(x: Array, y: Array, u: Array) -> tuple[Array, Array]:
    """Clouds over a gradient; objects cast no shadow on it."""
    clouds = noise(0.08 * x + u[0], 0.16 * y + u[1])
    return np.zeros_like(x), np.clip(0.5 * y + step(clouds - 0.65, 0.8), 0, 1)


# Objects, in a unit circle: (x, y, u) -> signed distance to the outline, negative inside, and the mix of two
# colors in 0..1. u: a random number in 0..1.


def ball(x: Array, y: Array, u: float) -> tuple[Array, Array]:
    """A disc with dots, denser towards its rim."""
    bulge = 2.2 + 1.1 * np.minimum(x * x + y * y, 1)
    row = np.floor(bulge * y)
    dots = np.hypot((bulge * x + u + row / 2) % 1 - 0.5, bulge * y - row - 0.5)
    return np.hypot(x, y) - 1, step(0.3 - dots, 0.1)


def ring(x: Array, y: Array, u: float) -> tuple[Array, Array]:
    """A ring with a spiral band."""
    radius, width = np.hypot(x, y), 0.2 + 0.1 * u
    return abs(radius - 1 + width) - width, step(np.sin(10 * np.arctan2(y, x) + 5 * radius), 0.5)


def star(x: Array, y: Array, u: float) -> tuple[Array, Array]:
    """A mottled star with five points; by symmetry, its outline is one straight line in half a point."""
    half, inner = np.pi / 5, 0.4 + 0.12 * u
    radius, angle = np.hypot(x, y), abs((np.arctan2(y, x) + half) % (2 * half) - half)
    edge_x, edge_y = 1 - inner * np.cos(half), inner * np.sin(half)
    side = edge_x * radius * np.sin(angle) + edge_y * (radius * np.cos(angle) - 1)
    return side / np.hypot(edge_x, edge_y), step(noise(0.5 * x + u, 0.5 * y) - 0.5, 0.5)


def flower(x: Array, y: Array, u: float) -> tuple[Array, Array]:
    """Five to seven round petals around a core of the second color."""
    half = np.pi / (5 + int(3 * u))
    radius, angle = np.hypot(x, y), (np.arctan2(y, x) + half) % (2 * half) - half
    petal = 1.15 * np.sin(half) / (1 + np.sin(half))
    petals = np.hypot(radius * np.cos(angle) - 1 + petal, radius * np.sin(angle)) - petal
    return np.minimum(petals, radius - 0.38), step(0.34 - radius, 0.06)


def crescent(x: Array, y: Array, u: float) -> tuple[Array, Array]:
    """A crescent with concentric lines."""
    radius = np.hypot(x, y)
    bite = 0.78 - np.hypot(x - 0.42 - 0.12 * u, y)
    return np.maximum(radius - 1, bite), step(np.sin(TWO_PI * (5 * radius + u)), 0.5)


def cross(x: Array, y: Array, u: float) -> tuple[Array, Array]:
    """A cross with four equal arms and a checkered texture."""
    checks = np.sin(TWO_PI * 2.2 * x) * np.sin(TWO_PI * 2.2 * y)
    x, y = abs(x), abs(y)
    arms = np.maximum(np.maximum(x, y) - 0.95, np.minimum(x, y) - 0.26 - 0.1 * u)
    return arms, step(checks, 0.25)


def fish(x: Array, y: Array, u: float) -> tuple[Array, Array]:
    """A fish with body, tail, stripes and an eye."""
    body = 0.5 * (np.hypot((x - 0.22) / 0.78, y / (0.42 + 0.12 * u)) - 1)
    tail = np.maximum(0.8 * abs(y) + 0.6 * (x + 0.3), -0.95 - x)
    stripes = step(np.sin(TWO_PI * 2.4 * x + 2) - 0.1, 0.5) * step(0.5 - x, 0.05)
    eye = step(0.09 - np.hypot(x - 0.66, y + 0.1), 0.04)
    return np.minimum(body, tail), np.maximum(stripes, eye)


def triangle(x: Array, y: Array, u: float) -> tuple[Array, Array]:
    """A triangle with zigzag lines."""
    zigzag = 3 * y + 1.5 * abs((2 * x) % 1 - 0.5)
    return np.maximum(0.866 * abs(x) + 0.5 * y, -y) - 0.5, step(np.sin(TWO_PI * (zigzag + u)), 0.5)


Ground = Callable[[Array, Array, Array], tuple[Array, Array]]
Object = Callable[[Array, Array, float], tuple[Array, Array]]
GROUNDS: tuple[Ground, ...] = (grass, tiles, sand, sky)
OBJECTS: tuple[Object, ...] = (ball, ring, star, flower, crescent, cross, fish, triangle)
CLASSES: tuple[str, ...] = tuple(paint.__name__ for paint in (*GROUNDS, *OBJECTS))
"""The names of the classes in the masks: first the grounds, then the objects."""
SKY = GROUNDS.index(sky)


def halve(values: Array) -> Array:
    """Average every four values: (..., 2H, 2W) -> (..., H, W)."""
    rows = values[..., ::2, :] + values[..., 1::2, :]
    return (rows[..., ::2] + rows[..., 1::2]) / 4


def two_colors(rng: np.random.Generator, hue: float, chroma: float, contrast: float) -> Array:
    """Draw two colors (2, 3, 1, 1) near `hue`, one of them lighter, in random order."""
    lightness = rng.uniform(0.35, 0.7) + contrast * rng.permutation([-0.5, 0.5])
    hues = hue + rng.uniform(-0.5, 0.5, 2)
    rgb = lightness[:, None] + chroma * np.cos(hues[:, None] - TWO_PI * np.arange(3) / 3)
    return rgb[..., None, None]


def blend(colors: Array, mix: Array) -> Array:
    """Interpolate between two colors by `mix` (h, w): (3, h, w)."""
    return colors[0] + mix * (colors[1] - colors[0])


def shade(height: Array, unit: float, light: Array) -> Array:
    """Shade a relief (h, w) under `light` (3,), 1 where it is level; `unit` is the pixels in a length of 1."""
    down, right = np.gradient(height * unit)
    toward = light[2] - right * light[0] - down * light[1]
    return np.clip(toward / np.sqrt(1 + right**2 + down**2) / light[2], 0, 1.6)


class Scene:
    """A scene that is drawn at twice its size and averaged at the end.

    `pixels` (3, 2H, 2W) around 0..1, `labels` (H, W), `light` (3,) the direction towards the light. The mean of the
    shading is 1 on every surface, so that brightness does not depend on shape and relief.
    """

    def __init__(self, rng: np.random.Generator, width: int, height: int) -> None:
        self.rng = rng
        self.unit = 2 * min(width, height)
        self.width, self.height = 2 * width / self.unit, 2 * height / self.unit
        self.y, self.x = (np.mgrid[: 2 * height, : 2 * width] + 0.5) / self.unit
        self.pixels = np.zeros((3, 2 * height, 2 * width))
        self.labels = np.zeros((height, width), np.uint8)
        bearing, elevation = rng.uniform([0, 0.6], [TWO_PI, 0.9])
        across = np.cos(elevation)
        self.light = np.array([across * np.cos(bearing), across * np.sin(bearing), np.sin(elevation)])
        self.hue = rng.uniform(0, TWO_PI)

    def paint_grounds(self) -> None:
        """Paint one ground seen from above, or two that meet at a horizon, the lower one in perspective."""
        rng = self.rng
        near, far = rng.permutation(len(GROUNDS))[:2]
        if rng.random() < 0.35:
            self._paint_ground(near, slice(None), None)
            return
        if near == SKY:
            near, far = far, near
        elif rng.random() < 0.3:
            far = SKY
        level, tilt, offset = rng.uniform([0.3 * self.height, -0.08, 0], [0.6 * self.height, 0.08, 1])
        hills = 0.08 * (noise(0.06 * self.x + offset, 0 * self.x) - 0.5) * (GROUNDS[near] is not tiles)
        below = step(self.y - level - tilt * (self.x - self.width / 2) - hills, 1 / self.unit)
        self._paint_ground(far, slice(0, np.flatnonzero(below.min(axis=1) < 1)[-1] + 1), None)
        behind, behind_labels = self.pixels.copy(), self.labels.copy()
        self._paint_ground(near, slice(np.flatnonzero(below.max(axis=1))[0], None), level)
        self.pixels = behind + below * (self.pixels - behind)
        self.labels = np.where(halve(below) > 0.5, self.labels, behind_labels)

    def _paint_ground(self, label: int, rows: slice, horizon: float | None) -> None:
        rng, x, y = self.rng, self.x[rows], self.y[rows]
        glow = 1 + 0.2 * ((x - self.width / 2) * self.light[0] + (y - self.height / 2) * self.light[1])
        angle, clear = rng.uniform(0, TWO_PI), np.ones_like(x)
        if horizon is not None:
            distance = 0.8 / (np.maximum(y - horizon, -0.05) + 0.25)
            x, y, clear = (x - self.width / 2) * distance, -1.3 * distance, np.minimum(1, 1.5 / distance)
        elif label != SKY:
            x, y = rotate(x, y, angle)
        height, mix = GROUNDS[label](x, y, rng.random(4))
        bright = 1 + clear * (shade(height, self.unit, self.light) - 1)
        colors = two_colors(rng, self.hue + rng.uniform(-0.8, 0.8), rng.uniform(0.05, 0.16), 0.3)
        self.pixels[:, rows] = glow * bright / bright.mean() * blend(colors, 0.5 + clear * (mix - 0.5))
        self.labels[:] = label

    def paint_objects(self) -> None:
        """Paint two to six objects, every other one next to an earlier one; lower objects occlude higher ones."""
        rng = self.rng
        placed: list[tuple[float, float, float]] = []
        for number in range(int(rng.integers(2, 7))):
            radius = 0.06 + 0.165 * np.sqrt(rng.random())
            for _ in range(20):
                x, y = rng.uniform(0.1, [self.width - 0.1, self.height - 0.1])
                if number % 2:
                    x, y, r = placed[rng.integers(len(placed))]
                    bearing, gap = rng.uniform(0, TWO_PI), 0.8 * (radius + r)
                    x, y = x + gap * np.cos(bearing), y + gap * np.sin(bearing)
                inside = 0.05 < x < self.width - 0.05 and 0.05 < y < self.height - 0.05
                if inside and all(np.hypot(x - a, y - b) > 0.7 * (radius + r) for a, b, r in placed):
                    placed.append((x, y, radius))
                    break
        for x, y, radius in sorted(placed, key=lambda place: place[1]):
            self._paint_object(int(rng.integers(len(OBJECTS))), x, y, radius)

    def _region(self, x: float, y: float, radius: float, reach: float) -> tuple[Array, NDArray[np.uint8], Array]:
        """Return the pixels and labels within `reach` radii of (x, y) as views, and their offsets in radii."""
        starts = [max(0, int((center - reach * radius) * self.unit / 2)) for center in (y, x)]
        stops = [int((center + reach * radius) * self.unit / 2) + 1 for center in (y, x)]
        box = tuple(slice(2 * start, 2 * stop) for start, stop in zip(starts, stops))
        offset = np.stack([self.x[box] - x, self.y[box] - y]) / radius
        return self.pixels[:, *box], self.labels[starts[0] : stops[0], starts[1] : stops[1]], offset

    def _paint_object(self, kind: int, x: float, y: float, radius: float) -> None:
        rng, scale = self.rng, radius * self.unit
        angle, squeeze, u = rng.uniform([0, 0.8, 0], [TWO_PI, 1, 1])
        colors = two_colors(rng, self.hue + rng.uniform(1, TWO_PI - 1), rng.uniform(0.1, 0.28), 0.35)

        def draw(offset: Array) -> tuple[Array, Array]:
            right, down = rotate(offset[0], offset[1], angle)
            return OBJECTS[kind](right, down / squeeze, u)

        pixels, labels, offset = self._region(x, y, radius, 1.7)
        away, _ = draw(halve(offset) + 0.45 * self.light[:2, None, None])
        shadow = step(-away, 0.5) * (labels != SKY)
        pixels *= 1 - 0.5 * shadow.repeat(2, axis=0).repeat(2, axis=1)

        pixels, labels, offset = self._region(x, y, radius, 1.05)
        distance, mix = draw(offset)
        cover, depth = step(-distance, 1 / scale), np.clip(-distance, 0, 1)
        bright = 0.4 + 0.6 * shade(np.sqrt(depth * (2 - depth)), scale, self.light)
        bright /= np.average(bright, weights=cover + 1e-6)
        pixels += cover * (bright * blend(colors, mix) - pixels)
        labels[halve(cover) > 0.5] = len(GROUNDS) + kind


def render_scene(
    seed: int, split: str, index: int, width: int = 160, height: int = 120
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Render scene `index` of a split: the image (H, W, 3) and the mask (H, W) of indices into `CLASSES`."""
    scene = Scene(np.random.default_rng([seed, SPLITS.index(split), index]), width, height)
    scene.paint_grounds()
    scene.paint_objects()
    image = np.clip(255 * halve(scene.pixels) + 0.5, 0, 255)
    return np.ascontiguousarray(image.transpose(1, 2, 0), np.uint8), scene.labels


def _write_scene(folder: Path, seed: int, split: str, index: int) -> None:
    image, mask = render_scene(seed, split, index)
    Image.fromarray(image).save(folder / split / "images" / f"{index:06d}.jpg", quality=92)
    Image.fromarray(mask).save(folder / split / "masks" / f"{index:06d}.png")


def _write_demo(folder: Path, parameters: dict[str, int]) -> None:
    for split in SPLITS:
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for index in range(parameters[split]):
            _write_scene(folder, parameters["seed"], split, index)
    kinds = ["ground"] * len(GROUNDS) + ["object"] * len(OBJECTS)
    lines = [f"{label}\t{kind}\t{name}\n" for label, (kind, name) in enumerate(zip(kinds, CLASSES))]
    (folder / "classes.txt").write_text("".join(lines))
    (folder / "scenes.json").write_text(json.dumps(parameters) + "\n")


def _is_complete(folder: Path, parameters: dict[str, int]) -> bool:
    try:
        return bool(json.loads((folder / "scenes.json").read_text()) == parameters)
    except (OSError, ValueError):
        return False


def make_demo(root: Path, seed: int, train: int = 1000, val: int = 200) -> Path:
    """Draw the demo below `root` unless it exists, and return its folder: {train,val}/{images,masks}, classes.txt.

    The name of the folder has all parameters of the scenes, and the folder gets its name when it is complete, so that
    neither an interrupted nor a concurrent process can leave an incomplete demo.

    Raises:
        UsageError: a parameter is out of range, or the folder cannot be written.
    """
    if seed < 0 or train < 1 or val < 0:
        raise UsageError(
            f"the demo needs a --seed of 0 or more and at least one training scene, not {seed=} {train=} {val=}"
        )
    parameters = {"version": VERSION, "seed": seed, "train": train, "val": val}
    folder = Path(root) / f"v{VERSION}_seed{seed}_{train}_{val}"
    if _is_complete(folder, parameters):
        return folder
    part = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    print(f"drawing {train + val} demo scenes into {folder}", file=sys.stderr, flush=True)
    try:
        _write_demo(part, parameters)
        part.rename(folder)
    except OSError as error:
        # Another process may have written the same scenes first.
        if not _is_complete(folder, parameters):
            cause = error.strerror or error
            raise UsageError(
                f"--data-dir: the demo cannot be written to {folder} ({cause}); use another folder"
            ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder
