"""The demo's scenes: repeatable, honestly labeled, silent about the class in their colors; and their folder."""

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import scenes
from data.demo import CLASSES, GROUNDS, OBJECTS, make_demo, render_scene
from utils.errors import UsageError

MANY = 160


@pytest.fixture(scope="module")
def many() -> list[tuple[np.ndarray, np.ndarray]]:
    return [render_scene(0, "train", index) for index in range(MANY)]


def test_same_scene_same_pixels() -> None:
    first, again = render_scene(3, "val", 7), render_scene(3, "val", 7)
    assert all(np.array_equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("other", [(4, "val", 7), (3, "train", 7), (3, "val", 8)])
def test_other_seed_split_or_index_is_another_scene(other: tuple[int, str, int]) -> None:
    assert not np.array_equal(render_scene(3, "val", 7)[0], render_scene(*other)[0])
    assert not np.array_equal(render_scene(3, "val", 7)[1], render_scene(*other)[1])


@pytest.mark.parametrize(("width", "height"), [(160, 120), (64, 64), (97, 151), (400, 50), (8, 8)])
def test_any_size_renders(width: int, height: int) -> None:
    for index in range(6):
        picture, mask = render_scene(0, "train", index, width, height)
        assert picture.shape == (height, width, 3)
        assert mask.shape == (height, width)
        assert picture.dtype == mask.dtype == np.uint8
        assert mask.max() < len(CLASSES)


def test_a_larger_picture_shows_the_same_scene() -> None:
    for index in range(2):
        small, small_mask = render_scene(0, "train", index)
        large, large_mask = render_scene(0, "train", index, 640, 480)
        shrunk = large.reshape(120, 4, 160, 4, 3).mean(axis=(1, 3))
        assert np.abs(shrunk - small).mean() < 12
        assert (large_mask[2::4, 2::4] == small_mask).mean() > 0.97
        areas = [(mask >= len(GROUNDS)).sum() for mask in (small_mask, large_mask)]
        assert areas[1] / 16 == pytest.approx(areas[0], rel=0.01)  # labels neither grow nor shrink at the edge


def test_every_class_appears_and_no_other_label(many: list[tuple[np.ndarray, np.ndarray]]) -> None:
    assert set(np.unique([mask for _, mask in many[:60]])) == set(range(len(CLASSES)))


def test_no_ground_and_no_object_is_rare(many: list[tuple[np.ndarray, np.ndarray]]) -> None:
    area = np.bincount(np.concatenate([mask.ravel() for _, mask in many]), minlength=len(CLASSES))
    grounds, objects = area[: len(GROUNDS)], area[len(GROUNDS) :]
    assert grounds.min() > 0.5 * grounds.mean()
    assert objects.min() > 0.4 * objects.mean()
    assert 0.1 < objects.sum() / area.sum() < 0.3


def test_a_picture_has_two_labels_or_more(many: list[tuple[np.ndarray, np.ndarray]]) -> None:
    assert min(len(np.unique(mask)) for _, mask in many) >= 2
    with_two_grounds = np.mean([len(np.unique(mask[mask < len(GROUNDS)])) == 2 for _, mask in many])
    assert 0.4 < with_two_grounds < 0.9


def test_objects_hide_one_another(many: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """In most pictures some object borders on another one without ground between them."""

    def touching(a: np.ndarray, b: np.ndarray) -> bool:
        return bool(((a != b) & (a >= len(GROUNDS)) & (b >= len(GROUNDS))).any())

    share = np.mean([touching(mask[1:], mask[:-1]) or touching(mask[:, 1:], mask[:, :-1]) for _, mask in many])
    assert share > 0.5


@pytest.mark.parametrize("kinds", [range(len(GROUNDS)), range(len(GROUNDS), len(CLASSES))])
def test_color_does_not_tell_the_class(many: list[tuple[np.ndarray, np.ndarray]], kinds: range) -> None:
    """The nearest class mean in color guesses little better than chance."""
    areas = [(label, picture[mask == label]) for picture, mask in many for label in kinds]
    seen = [(label, pixels.mean(axis=0)) for label, pixels in areas if len(pixels) > 50]
    labels, colors = np.array([label for label, _ in seen]), np.array([color for _, color in seen])
    learn = np.arange(len(seen)) % 2 == 0
    means = np.array([colors[learn & (labels == kind)].mean(axis=0) for kind in kinds])
    guess = ((colors[~learn, None] - means) ** 2).sum(axis=-1).argmin(axis=1) + kinds[0]
    chance = 1 / len(kinds)
    spread = np.sqrt(chance * (1 - chance) / (~learn).sum())
    assert (guess == labels[~learn]).mean() < chance + 3.5 * spread


def test_the_mask_shows_where_objects_were_painted() -> None:
    """Outside their labels the objects may darken a pixel (a shadow), which keeps the ratios of its colors."""
    scene = scenes.Scene(np.random.default_rng(0), 160, 120)
    scene.paint_grounds()
    empty, ground = scene.pixels.copy(), scene.labels.copy()
    scene.paint_objects()
    is_object = scene.labels >= len(GROUNDS)
    assert np.array_equal(scene.labels[~is_object], ground[~is_object])
    ratio = scenes.halve(scene.pixels) / scenes.halve(empty)
    only_darker = np.ptp(ratio, axis=0) < 1e-9
    assert only_darker[~is_object].mean() > 0.95
    assert only_darker[is_object].mean() < 0.02


def test_class_names() -> None:
    assert len(CLASSES) == len(GROUNDS) + len(OBJECTS) == len(set(CLASSES))


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def test_the_demo_holds_the_scenes(tmp_path: Path) -> None:
    folder = make_demo(tmp_path / "new" / "demo", seed=1, train=3, val=2)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    for split, count in (("train", 3), ("val", 2)):
        names = [f"{index:06d}" for index in range(count)]
        assert sorted(path.name for path in (folder / split / "images").iterdir()) == [f"{n}.jpg" for n in names]
        assert sorted(path.name for path in (folder / split / "masks").iterdir()) == [f"{n}.png" for n in names]
        for index, name in enumerate(names):
            picture, mask = render_scene(1, split, index)
            stored = np.asarray(Image.open(folder / split / "images" / f"{name}.jpg"), np.float64)
            assert np.abs(stored - picture).mean() < 8
            assert np.array_equal(np.asarray(Image.open(folder / split / "masks" / f"{name}.png")), mask)
    rows = [line.split("\t") for line in (folder / "classes.txt").read_text().splitlines()]
    kinds = ["ground"] * len(GROUNDS) + ["object"] * len(OBJECTS)
    assert rows == [[str(label), *row] for label, row in enumerate(zip(kinds, CLASSES))]
    facts = json.loads((folder / "scenes.json").read_text())
    assert facts == {"version": scenes.VERSION, "seed": 1, "train": 3, "val": 2}


def test_a_second_call_writes_nothing(tmp_path: Path) -> None:
    folder = make_demo(tmp_path, seed=0, train=2, val=1)
    before = times(tmp_path)
    assert make_demo(tmp_path, seed=0, train=2, val=1) == folder
    assert times(tmp_path) == before


def test_other_demos_stand_beside_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [make_demo(tmp_path, *facts) for facts in ((0, 2, 1), (1, 2, 1), (0, 3, 1), (0, 2, 0))]
    monkeypatch.setattr(scenes, "VERSION", scenes.VERSION + 1)
    folders.append(make_demo(tmp_path, 0, 2, 1))
    assert len(set(folders)) == 5 == len(list(tmp_path.iterdir()))


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_attempt_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    write, calls = scenes._write_scene, iter(range(3))

    def stopped(*place: object) -> None:
        if next(calls, None) is None:
            raise fault
        write(*place)  # type: ignore[arg-type]

    monkeypatch.setattr(scenes, "_write_scene", stopped)
    with pytest.raises((KeyboardInterrupt, UsageError)):
        make_demo(tmp_path, 0, 4, 1)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert len(list(make_demo(tmp_path, 0, 4, 1).rglob("*.jpg"))) == 5


def test_a_killed_attempt_does_no_harm(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=make_demo, args=(tmp_path, 0, 5000, 0))
    process.start()
    while not list(tmp_path.rglob("*.png")) and process.is_alive():
        process.join(0.02)
    process.kill()
    process.join()
    assert [path.name.startswith(".") for path in tmp_path.iterdir()] == [True]
    folder = make_demo(tmp_path, 0, 3, 0)
    assert len(list(folder.rglob("*.jpg"))) == 3


def test_a_process_that_comes_second_keeps_the_first_ones_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = scenes._write_demo

    def overtaken(folder: Path, facts: dict[str, int]) -> None:
        write(folder, facts)
        monkeypatch.setattr(scenes, "_write_demo", write)
        make_demo(tmp_path, 0, 2, 1)
        (tmp_path / "marks").write_text(json.dumps(sorted(times(make_demo(tmp_path, 0, 2, 1)).values())))

    monkeypatch.setattr(scenes, "_write_demo", overtaken)
    folder = make_demo(tmp_path, 0, 2, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["marks", folder.name]
    assert json.loads((tmp_path / "marks").read_text()) == sorted(times(folder).values())


def test_two_processes_at_once(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=make_demo, args=(tmp_path, 0, 20, 5)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    (folder,) = tmp_path.iterdir()
    assert folder == make_demo(tmp_path, 0, 20, 5)
    assert len(list(folder.rglob("*.jpg"))) == len(list(folder.rglob("*.png"))) == 25


def test_what_the_user_can_cure_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="seed=-1"):
        make_demo(tmp_path, -1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="Not a directory"):
        make_demo(tmp_path / "file", 0, 1, 0)
    folder = make_demo(tmp_path, 0, 1, 0)
    os.remove(folder / "scenes.json")
    with pytest.raises(UsageError, match=folder.name):
        make_demo(tmp_path, 0, 1, 0)
    assert (folder / "train" / "images" / "000000.jpg").exists()
