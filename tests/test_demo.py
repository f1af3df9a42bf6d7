"""data/demo.py: scenes that repeat themselves, with correct masks and uninformative colors; and their folder."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import demo
from data.demo import CLASSES, GROUNDS, OBJECTS, make_demo, render_scene
from utils.errors import UsageError

Scenes = list[tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return [render_scene(0, "train", index, 80, 60) for index in range(160)]


def test_a_scene_depends_on_seed_split_and_index_only() -> None:
    image, mask = render_scene(3, "val", 7, 80, 60)
    np.random.seed(0)
    assert np.array_equal(render_scene(3, "val", 7, 80, 60)[0], image)
    for other in ((4, "val", 7), (3, "train", 7), (3, "val", 8)):
        other_image, other_mask = render_scene(*other, 80, 60)
        assert not np.array_equal(other_image, image)
        assert not np.array_equal(other_mask, mask)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (97, 151), (400, 50), (8, 8)])
def test_scenes_of_any_size_are_rendered(width: int, height: int) -> None:
    image, mask = render_scene(0, "train", 2, width, height)
    assert (image.shape, mask.shape) == ((height, width, 3), (height, width))
    assert image.dtype == mask.dtype == np.uint8
    assert mask.max() < len(CLASSES)


def test_a_larger_image_shows_the_same_scene() -> None:
    small, small_mask = render_scene(0, "train", 0)
    large, large_mask = render_scene(0, "train", 0, 640, 480)
    assert np.abs(large.reshape(120, 4, 160, 4, 3).mean(axis=(1, 3)) - small).mean() < 12
    assert (large_mask[2::4, 2::4] == small_mask).mean() > 0.97
    areas = [(mask >= len(GROUNDS)).sum() for mask in (small_mask, large_mask)]
    assert areas[1] / 16 == pytest.approx(areas[0], rel=0.01)  # labels neither grow nor shrink at their edges


def test_no_class_is_rare(scenes: Scenes) -> None:
    area = np.bincount(np.concatenate([mask.ravel() for _, mask in scenes]), minlength=len(CLASSES))
    assert len(area) == len(CLASSES) == len(set(CLASSES))
    grounds, objects = area[: len(GROUNDS)], area[len(GROUNDS) :]
    assert grounds.min() > 0.5 * grounds.mean()
    assert objects.min() > 0.4 * objects.mean()
    assert 0.1 < objects.sum() / area.sum() < 0.3
    assert min(len(np.unique(mask)) for _, mask in scenes) >= 2


@pytest.mark.parametrize("labels", [range(len(GROUNDS)), range(len(GROUNDS), len(CLASSES))], ids=["ground", "object"])
def test_color_does_not_reveal_the_class(scenes: Scenes, labels: range) -> None:
    """The nearest class mean in color is hardly more accurate than a guess."""
    regions = [(label, image[mask == label]) for image, mask in scenes for label in labels]
    samples = [(label, pixels.mean(axis=0)) for label, pixels in regions if len(pixels) > 12]
    y, x = np.array([label for label, _ in samples]), np.array([color for _, color in samples])
    train = np.arange(len(y)) % 2 == 0
    means = np.array([x[train & (y == label)].mean(axis=0) for label in labels])
    predictions = ((x[~train, None] - means) ** 2).sum(axis=-1).argmin(axis=1) + labels[0]
    p = 1 / len(labels)
    assert (predictions == y[~train]).mean() < p + 3.5 * np.sqrt(p * (1 - p) / (~train).sum())


def test_masks_cover_the_painted_objects() -> None:
    """Outside of its label an object casts at most a shadow, which keeps the ratios of a pixel's colors."""
    scene = demo.Scene(np.random.default_rng(0), 160, 120)
    scene.paint_grounds()
    ground_pixels, ground_labels = scene.pixels.copy(), scene.labels.copy()
    scene.paint_objects()
    is_object = scene.labels >= len(GROUNDS)
    assert np.array_equal(scene.labels[~is_object], ground_labels[~is_object])
    is_shadow = np.ptp(demo.halve(scene.pixels) / demo.halve(ground_pixels), axis=0) < 1e-9
    assert is_shadow[~is_object].mean() > 0.95
    assert is_shadow[is_object].mean() < 0.02


def modification_times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def test_the_demo_folder_holds_the_scenes_and_is_written_once(tmp_path: Path) -> None:
    folder = make_demo(tmp_path / "new", seed=1, train=3, val=2)
    for split, count in (("train", 3), ("val", 2)):
        assert len(list((folder / split).rglob("*.jpg"))) == len(list((folder / split).rglob("*.png"))) == count
        image, mask = render_scene(1, split, count - 1)
        name = f"{count - 1:06d}"
        stored = np.asarray(Image.open(folder / split / "images" / f"{name}.jpg"), np.float64)
        assert np.abs(stored - image).mean() < 8
        assert np.array_equal(np.asarray(Image.open(folder / split / "masks" / f"{name}.png")), mask)
    rows = [line.split("\t") for line in (folder / "classes.txt").read_text().splitlines()]
    kinds = ["ground"] * len(GROUNDS) + ["object"] * len(OBJECTS)
    assert rows == [[str(label), *row] for label, row in enumerate(zip(kinds, CLASSES))]
    before = modification_times(tmp_path)
    assert make_demo(tmp_path / "new", seed=1, train=3, val=2) == folder
    assert modification_times(tmp_path) == before


def test_other_demos_have_other_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {make_demo(tmp_path, *arguments) for arguments in ((0, 1, 1), (1, 1, 1), (0, 2, 1), (0, 1, 0))}
    monkeypatch.setattr(demo, "VERSION", demo.VERSION + 1)
    folders.add(make_demo(tmp_path, 0, 1, 1))
    assert len(folders) == 5 == len(list(tmp_path.iterdir()))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_demo_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    calls = iter(range(3))

    def interrupt(*scene: int) -> tuple[np.ndarray, np.ndarray]:
        if next(calls, None) is None:
            raise error
        return render_scene(*scene)

    monkeypatch.setattr(demo, "render_scene", interrupt)
    with pytest.raises((KeyboardInterrupt, UsageError)):
        make_demo(tmp_path, 0, 4, 1)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    assert len(list(make_demo(tmp_path, 0, 4, 1).rglob("*.jpg"))) == 5


def test_concurrent_writer_keeps_the_existing_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before: dict[Path, int] = {}

    def render_late(*scene: int) -> tuple[np.ndarray, np.ndarray]:
        monkeypatch.undo()
        before.update(modification_times(make_demo(tmp_path, 0, 2, 1)))
        return render_scene(*scene)

    monkeypatch.setattr(demo, "render_scene", render_late)
    folder = make_demo(tmp_path, 0, 2, 1)
    assert list(tmp_path.iterdir()) == [folder]
    assert modification_times(folder) == before


def test_demos_that_cannot_be_written_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="seed=-1"):
        make_demo(tmp_path, -1)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="Not a directory"):
        make_demo(tmp_path / "file", 0, 1, 0)
    folder = make_demo(tmp_path, 0, 1, 0)
    (folder / "scenes.json").write_text(json.dumps({}))  # not a demo of ours
    with pytest.raises(UsageError, match=folder.name):
        make_demo(tmp_path, 0, 1, 0)
    assert (folder / "train" / "images" / "000000.jpg").exists()
