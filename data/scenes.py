"""The built-in demo: procedural scenes with a ground-truth mask, so that everything runs without a download.

A scene is one or two grounds and two to six lit, textured objects that overlap and cast shadows. Form and
pattern tell the class, colour never does. Lengths are in short sides of the image, x to the right and y down, so
the same scene comes out at every image size; angles are in radians.
"""

import json
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from utils.errors import UsageError

Array = NDArray[np.float64]
VERSION = 1  # of the pictures: a demo drawn by another version is drawn anew
SPLITS = ("train", "val")
TURN = 2 * np.pi


@cache
def _noise_table() -> Array:
    """(512, 512) cloud-like relief that tiles, its values spread evenly over 0..1."""
    n = 512
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(n, 1 / n), np.fft.fftfreq(n, 1 / n)))
    spectrum = np.fft.fft2(np.random.default_rng(0).standard_normal((n, n)))
    relief = np.fft.ifft2(spectrum / np.maximum(frequency, 6) ** 1.6).real
    return relief.ravel().argsort().argsort().reshape(n, n) / (n * n - 1)


def noise(x: Array, y: Array) -> Array:
    """Relief 0..1 at any points; it repeats with period 1 and its largest lumps measure about 1/12."""
    table = _noise_table()
    n = len(table)
    x, y = x * n, y * n
    column, row = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    x, y = x - column, y - row
    last = len(table) - 1  # the size is a power of two, so & wraps around
    left, right, top, bottom = column & last, (column + 1) & last, (row & last) * n, ((row + 1) & last) * n
    flat = table.ravel()
    upper = flat.take(top + left) * (1 - x) + flat.take(top + right) * x
    lower = flat.take(bottom + left) * (1 - x) + flat.take(bottom + right) * x
    return upper * (1 - y) + lower * y


def step(value: Array, softness: float) -> Array:
    """0 where value is negative, 1 where positive, a ramp of width `softness` between."""
    return np.clip(value / softness + 0.5, 0, 1)


def rotate(x: Array, y: Array, angle: float) -> tuple[Array, Array]:
    return np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y


# Grounds: (x, y, u) -> height of the relief in short sides, and the mix 0..1 of two colours. u: 4 draws in 0..1.


def grass(x: Array, y: Array, u: Array) -> tuple[Array, Array]:
    """Blades are the ridges of noise stretched lengthwise; two layers lean against each other."""
    blades = np.zeros_like(x)
    for lean, shift in ((0.35, u[:2]), (-0.35, u[2:])):
        across, along = rotate(x, y, lean)
        ridge = 1 - abs(2 * noise(0.9 * across + shift[0], 0.14 * along + shift[1]) - 1)
        blades = np.maximum(blades, ridge**2)
    return 0.006 * blades, 1.5 * blades - 0.5


def tiles(x: Array, y: Array, u: Array) -> tuple[Array, Array]:
    size = 0.15 + 0.1 * u[2]
    x, y = x / size + u[0], y / size + u[1]
    column, row = np.floor(x), np.floor(y)
    edge = np.minimum(0.5 - abs(x - column - 0.5), 0.5 - abs(y - row - 0.5))
    joint = step(0.035 - edge, 0.02)
    tone = noise(0.37 * column + u[3], 0.61 * row)
    return 0.012 * step(edge - 0.05, 0.06), 0.45 * tone * (1 - joint) + joint


def sand(x: Array, y: Array, u: Array) -> tuple[Array, Array]:
    warp = noise(0.06 * x + u[0], 0.06 * y + u[1])
    phase = (7 + 4 * u[2]) * y + 1.8 * warp
    ripple = 0.5 + 0.5 * np.sin(TURN * phase + 0.7 * np.sin(TURN * phase))
    grains = noise(1.3 * x + u[3], 1.3 * y)
    return 0.016 * ripple, 0.45 * ripple + 0.55 * grains


def sky(x: Array, y: Array, u: Array) -> tuple[Array, Array]:
    clouds = noise(0.08 * x + u[0], 0.16 * y + u[1])
    return np.zeros_like(x), np.clip(0.5 * y + step(clouds - 0.65, 0.8), 0, 1)


# Forms: (x, y, u) -> signed distance to the outline, negative inside; the form fills the unit circle. u: one draw.


def disc(x: Array, y: Array, u: float) -> Array:
    return np.hypot(x, y) - 1


def ring(x: Array, y: Array, u: float) -> Array:
    width = 0.2 + 0.1 * u
    return abs(np.hypot(x, y) - 1 + width) - width


def star(x: Array, y: Array, u: float) -> Array:
    """Five points; the angle is folded onto half a point, where the outline is one straight line."""
    half, inner = np.pi / 5, 0.4 + 0.12 * u
    angle = abs((np.arctan2(y, x) + half) % (2 * half) - half)
    radius = np.hypot(x, y)
    edge_x, edge_y = inner * np.cos(half) - 1, inner * np.sin(half)
    return (radius * np.sin(angle) * -edge_x + (radius * np.cos(angle) - 1) * edge_y) / np.hypot(
        edge_x, edge_y
    )


def flower(x: Array, y: Array, u: float) -> Array:
    half = np.pi / (5 + int(3 * u))
    angle = (np.arctan2(y, x) + half) % (2 * half) - half
    radius, petal = np.hypot(x, y), 1.15 * np.sin(half) / (1 + np.sin(half))
    petals = np.hypot(radius * np.cos(angle) - 1 + petal, radius * np.sin(angle)) - petal
    return np.minimum(petals, radius - 0.38)


def crescent(x: Array, y: Array, u: float) -> Array:
    return np.maximum(np.hypot(x, y) - 1, 0.78 - np.hypot(x - 0.42 - 0.12 * u, y))


def cross(x: Array, y: Array, u: float) -> Array:
    x, y = abs(x), abs(y)
    return np.maximum(np.maximum(x, y) - 0.95, np.minimum(x, y) - 0.26 - 0.1 * u)


def fish(x: Array, y: Array, u: float) -> Array:
    body = 0.5 * (np.hypot((x - 0.22) / 0.78, y / (0.42 + 0.12 * u)) - 1)
    tail = np.maximum(0.8 * abs(y) + 0.6 * (x + 0.3), -0.95 - x)
    return np.minimum(body, tail)


def triangle(x: Array, y: Array, u: float) -> Array:
    return np.maximum(0.866 * abs(x) + 0.5 * y, -y) - 0.5


# Patterns: (x, y, u) -> mix 0..1 of the object's two colours, on the same unit circle.


def dots(x: Array, y: Array, u: float) -> Array:
    bulge = 1 + 0.5 * np.minimum(x * x + y * y, 1)
    x, y = 2.2 * bulge * x + u, 2.2 * bulge * y
    x = x + 0.5 * (np.floor(y) % 2)
    return step(0.3 - np.hypot(x % 1 - 0.5, y % 1 - 0.5), 0.1)


def twist(x: Array, y: Array, u: float) -> Array:
    return step(np.sin(10 * np.arctan2(y, x) + 5 * np.hypot(x, y)), 0.5)


def grain(x: Array, y: Array, u: float) -> Array:
    return step(noise(0.5 * x + u, 0.5 * y) - 0.55, 0.5)


def core(x: Array, y: Array, u: float) -> Array:
    return step(0.34 - np.hypot(x, y), 0.06)


def arcs(x: Array, y: Array, u: float) -> Array:
    return step(np.sin(TURN * 5 * np.hypot(x, y) + TURN * u), 0.5)


def checks(x: Array, y: Array, u: float) -> Array:
    return step(np.sin(TURN * 2.2 * x) * np.sin(TURN * 2.2 * y), 0.25)


def stripes(x: Array, y: Array, u: float) -> Array:
    eye = step(0.09 - np.hypot(x - 0.66, y + 0.1), 0.04)
    bands = step(np.sin(TURN * 2.4 * x + 2) - 0.1, 0.5) * step(0.5 - x, 0.05)
    return np.maximum(eye, bands)


def zigzag(x: Array, y: Array, u: float) -> Array:
    return step(np.sin(TURN * 3 * (y + 0.5 * abs((2 * x) % 1 - 0.5)) + TURN * u), 0.5)


Ground = Callable[[Array, Array, Array], tuple[Array, Array]]
Form = Callable[[Array, Array, float], Array]
GROUNDS: dict[str, Ground] = {"grass": grass, "tiles": tiles, "sand": sand, "sky": sky}
OBJECTS: dict[str, tuple[Form, Form]] = {
    "ball": (disc, dots),
    "ring": (ring, twist),
    "star": (star, grain),
    "flower": (flower, core),
    "crescent": (crescent, arcs),
    "cross": (cross, checks),
    "fish": (fish, stripes),
    "triangle": (triangle, zigzag),
}
CLASSES: tuple[str, ...] = (*GROUNDS, *OBJECTS)
"""The names of the mask's values: first the grounds, then the objects."""


def halve(values: Array) -> Array:
    """(..., 2H, 2W) -> (..., H, W), the mean of every four."""
    rows = values[..., ::2, :] + values[..., 1::2, :]
    return (rows[..., ::2] + rows[..., 1::2]) / 4


def two_colours(rng: np.random.Generator, hue: float, chroma: float, contrast: float) -> Array:
    """(2, 3, 1, 1): two colours near `hue`, one of them lighter; which one is left to chance."""
    light = rng.uniform(0.35, 0.7) + contrast * rng.permutation([-0.5, 0.5])
    hues = hue + rng.uniform(-0.5, 0.5, 2)
    rgb = light[:, None] + chroma * np.cos(hues[:, None] - TURN * np.arange(3) / 3)
    return rgb[..., None, None]


def blend(colours: Array, mix: Array) -> Array:
    """(3, h, w): the first of two colours where `mix` (h, w) is 0, the second where it is 1."""
    return colours[0] + mix * (colours[1] - colours[0])


def shade(height: Array, unit: float, light: Array) -> Array:
    """How bright a relief (h, w) looks under `light` (3,), 1 where it is level; `unit` is pixels in a length of 1."""
    down, right = np.gradient(height * unit)
    toward = light[2] - right * light[0] - down * light[1]
    return np.clip(toward / np.sqrt(1 + right**2 + down**2) / light[2], 0, 1.6)


class Scene:
    """One picture in the making, drawn at twice its size and averaged at the end.

    `pixels` (3, 2H, 2W) around 0..1, `labels` (H, W), `light` (3,) the direction towards the lamp. Every mean
    brightness is brought to that of the colours drawn, so that it tells nothing of form or pattern.
    """

    def __init__(self, rng: np.random.Generator, width: int, height: int) -> None:
        self.rng = rng
        self.unit = 2 * min(width, height)
        self.width, self.height = 2 * width / self.unit, 2 * height / self.unit
        self.y, self.x = (np.mgrid[: 2 * height, : 2 * width] + 0.5) / self.unit
        self.pixels = np.zeros((3, 2 * height, 2 * width))
        self.labels = np.zeros((height, width), np.uint8)
        bearing, elevation = rng.uniform([0, 0.6], [TURN, 0.9])
        across = np.cos(elevation)
        self.light = np.array([across * np.cos(bearing), across * np.sin(bearing), np.sin(elevation)])
        self.hue = rng.uniform(0, TURN)

    def paint_grounds(self) -> None:
        """One ground seen from above, or two that meet at a horizon, the lower one running towards it."""
        rng = self.rng
        near, far = rng.permutation(list(GROUNDS))[:2]
        if rng.random() < 0.35:
            return self._paint_ground(near, slice(None), None)
        if near == "sky":
            near, far = far, near
        elif rng.random() < 0.4:
            far = "sky"
        level, tilt, offset = rng.uniform([0.3 * self.height, -0.08, 0], [0.6 * self.height, 0.08, 1])
        hills = 0.08 * (noise(0.06 * self.x + offset, 0 * self.x) - 0.5) * (near != "tiles")
        below = step(self.y - level - tilt * (self.x - self.width / 2) - hills, 1 / self.unit)
        self._paint_ground(far, slice(0, np.flatnonzero(below.min(axis=1) < 1)[-1] + 1), None)
        behind, behind_labels = self.pixels.copy(), self.labels.copy()
        self._paint_ground(near, slice(np.flatnonzero(below.max(axis=1))[0], None), level)
        self.pixels = behind + below * (self.pixels - behind)
        self.labels = np.where(halve(below) > 0.5, self.labels, behind_labels)

    def _paint_ground(self, name: str, rows: slice, horizon: float | None) -> None:
        rng, x, y = self.rng, self.x[rows], self.y[rows]
        glow = 1 + 0.2 * ((x - self.width / 2) * self.light[0] + (y - self.height / 2) * self.light[1])
        clear = np.ones_like(x)  # 1 near by, less in the haze
        turn, u = rng.uniform(0, TURN), rng.random(4)
        if horizon is not None:
            distance = 0.8 / (np.maximum(y - horizon, -0.05) + 0.25)
            x, y, clear = (x - self.width / 2) * distance, -1.3 * distance, np.minimum(1, 1.5 / distance)
        elif name != "sky":
            x, y = rotate(x, y, turn)
        height, mix = GROUNDS[name](x, y, u)
        bright = 1 + clear * (shade(height, self.unit, self.light) - 1)
        colours = two_colours(rng, self.hue + rng.uniform(-0.8, 0.8), rng.uniform(0.05, 0.16), 0.3)
        paint = blend(colours, 0.5 + clear * (mix - 0.5))
        self.pixels[:, rows] = glow * bright / bright.mean() * paint
        self.labels[:] = CLASSES.index(name)

    def paint_objects(self) -> None:
        """Two to six objects, every other one beside an earlier one; the lower in the picture is the nearer."""
        rng = self.rng
        placed: list[tuple[float, float, float]] = []
        for number in range(int(rng.integers(2, 7))):
            radius = rng.uniform(0.06, 0.225)
            for _ in range(20):
                x, y = rng.uniform(0.1, [self.width - 0.1, self.height - 0.1])
                if number % 2:
                    x, y, r = placed[rng.integers(len(placed))]
                    bearing = rng.uniform(0, TURN)
                    x, y = x + 0.8 * (radius + r) * np.cos(bearing), y + 0.8 * (radius + r) * np.sin(bearing)
                inside = 0.05 < x < self.width - 0.05 and 0.05 < y < self.height - 0.05
                if inside and all(np.hypot(x - a, y - b) > 0.7 * (radius + r) for a, b, r in placed):
                    placed.append((x, y, radius))
                    break
        for x, y, radius in sorted(placed, key=lambda place: place[1]):
            self._paint_object(x, y, radius)

    def _paint_object(self, x: float, y: float, radius: float) -> None:
        rng = self.rng
        name = str(rng.choice(list(OBJECTS)))
        form, pattern = OBJECTS[name]
        turn, squeeze, u = rng.uniform([0, 0.8, 0], [TURN, 1, 1])
        colours = two_colours(rng, self.hue + rng.uniform(1, TURN - 1), rng.uniform(0.1, 0.28), 0.35)
        # The box holds the object and its shadow, in whole pixels of the mask.
        ends = [
            (max(0, int((c - 1.7 * radius) * self.unit / 2)), int((c + 1.7 * radius) * self.unit / 2) + 1)
            for c in (y, x)
        ]
        box = tuple(slice(2 * first, 2 * last) for first, last in ends)
        pixels, labels = self.pixels[:, *box], self.labels[tuple(slice(*end) for end in ends)]

        def local(shift: float) -> tuple[Array, Array]:
            right, down = (self.x[box] - x) / radius, (self.y[box] - y) / radius
            a, b = rotate(right + shift * self.light[0], down + shift * self.light[1], turn)
            return a, b / squeeze

        shadow = step(-form(*local(0.45), u), 0.5) * (labels != CLASSES.index("sky")).repeat(2, 0).repeat(
            2, 1
        )
        pixels *= 1 - 0.5 * shadow
        a, b = local(0)
        distance = form(a, b, u)
        cover = step(-distance, 1 / (radius * self.unit))
        depth = np.clip(-distance, 0, 1)
        bright = 0.4 + 0.6 * shade(np.sqrt(depth * (2 - depth)), radius * self.unit, self.light)
        bright /= np.average(bright, weights=cover + 1e-6)
        pixels += cover * (bright * blend(colours, pattern(a, b, u)) - pixels)
        labels[halve(cover) > 0.5] = CLASSES.index(name)


def render_scene(
    seed: int, split: str, index: int, width: int = 160, height: int = 120
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Scene `index` of a split: its picture (H, W, 3) and its mask (H, W) of indices into `CLASSES`."""
    scene = Scene(np.random.default_rng([seed, SPLITS.index(split), index]), width, height)
    scene.paint_grounds()
    scene.paint_objects()
    picture = np.clip(255 * halve(scene.pixels) + 0.5, 0, 255)
    return picture.astype(np.uint8).transpose(1, 2, 0), scene.labels


def _write_scene(folder: Path, seed: int, split: str, index: int) -> None:
    picture, mask = render_scene(seed, split, index)
    Image.fromarray(picture).save(folder / split / "images" / f"{index:06d}.jpg", quality=92)
    Image.fromarray(mask).save(folder / split / "masks" / f"{index:06d}.png")


def _write_demo(folder: Path, facts: dict[str, int]) -> None:
    for split in SPLITS:
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
    kinds = ["ground"] * len(GROUNDS) + ["object"] * len(OBJECTS)
    lines = [f"{i}\t{kind}\t{name}\n" for i, (kind, name) in enumerate(zip(kinds, CLASSES))]
    (folder / "classes.txt").write_text("".join(lines))
    _noise_table()  # before the threads, or each would make its own
    with ThreadPoolExecutor() as pool:
        for split in SPLITS:
            list(
                pool.map(lambda index: _write_scene(folder, facts["seed"], split, index), range(facts[split]))
            )
    (folder / "scenes.json").write_text(json.dumps(facts) + "\n")


def make_demo(root: Path, seed: int, train: int = 1000, val: int = 200) -> Path:
    """Write the demo under `root` unless it is there; the folder with {train,val}/{images,masks} and classes.txt.

    The folder's name holds all that the scenes depend on, and the folder takes that name when it is complete:
    neither an interrupted run nor a second process at the same time can leave half a demo.
    """
    facts = {"version": VERSION, "seed": seed, "train": train, "val": val}
    folder = root / "v{version}_seed{seed}_{train}_{val}".format(**facts)
    if _is_complete(folder, facts):
        return folder
    part = root / f".{folder.name}.{uuid.uuid4().hex}"
    try:
        _write_demo(part, facts)
        part.rename(folder)
    except OSError as error:
        if not _is_complete(folder, facts):  # otherwise another process was first, with the same scenes
            raise UsageError(f"the demo cannot be written to {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _is_complete(folder: Path, facts: dict[str, int]) -> bool:
    try:
        return bool(json.loads((folder / "scenes.json").read_text()) == facts)
    except (OSError, ValueError):
        return False
