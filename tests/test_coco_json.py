"""The COCO-style files of custom datasets: what is read from them, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.detection_data import HEIGHT, WIDTH, make_custom_data
from transfer.detection.coco_json import CocoData, read_classes, read_coco
from utils.errors import UsageError

Content = dict[str, Any]
RLE = {"size": [HEIGHT, WIDTH], "counts": [10, 20, HEIGHT * WIDTH - 30]}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("custom")
    make_custom_data(folder)
    return folder


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "data"))


def read(folder: Path, edit: Callable[[Content], Any] = lambda content: None, split: str = "train") -> CocoData:
    """Change the file of a split and read it; the validation data with the classes of the training data."""
    path = folder / f"{split}.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    classes = ["first", "second"] if split == "val" else None
    return read_coco(split, path, folder / split, classes)


def edit_annotation(number: int, **fields: Any) -> Callable[[Content], Any]:
    return lambda content: content["annotations"][number].update(fields)


def test_classes_are_numbered_from_one_in_the_order_of_their_ids(folder: Path) -> None:
    original = json.loads((folder / "train.json").read_text())
    data = read(folder)
    assert data.classes == ["first", "second"]
    assert data.content["categories"] == [{"id": 1, "name": "first"}, {"id": 2, "name": "second"}]
    assert data.content["images"] == original["images"]
    for annotation, before in zip(data.content["annotations"], original["annotations"], strict=True):
        assert annotation == before | {"category_id": {7: 1, 40: 2}[before["category_id"]]}
    assert (data.num_training_images, len(data.objects), data.without_mask, data.num_ignored) == (6, 22, [], 0)
    assert data.has_masks
    assert not data.has_encoded_masks


def test_optional_fields_are_completed(folder: Path) -> None:
    def remove_optional(content: Content) -> None:
        for annotation in content["annotations"]:
            del annotation["id"], annotation["area"], annotation["iscrowd"], annotation["segmentation"]
        for image in content["images"]:
            del image["width"], image["height"]

    complete, data = read(folder), read(folder, remove_optional)
    assert data.content["images"] == complete.content["images"]
    assert data.without_mask == list(range(22))
    assert not data.has_masks
    for annotation, expected in zip(data.content["annotations"], complete.content["annotations"], strict=True):
        assert annotation == {key: value for key, value in expected.items() if key != "segmentation"}


@pytest.mark.parametrize("box", [[5, 5, 0, 10], [5, 5, 10, -1], [WIDTH, 5, 10, 10], [5, -10, 10, 10]])
def test_annotations_without_area_in_their_image_are_left_out(folder: Path, box: list[int]) -> None:
    data = read(folder, edit_annotation(0, bbox=box))
    assert data.num_ignored == 1
    assert [annotation["id"] for annotation in data.content["annotations"]] == list(range(2, 23))


def test_crowds_are_not_objects_to_learn(folder: Path) -> None:
    def mark(content: Content) -> None:
        for annotation in content["annotations"]:
            annotation.update({"iscrowd": 1} if annotation["image_id"] == 1 else {})
        content["annotations"][0]["ignore"] = 1
        content["annotations"][0]["segmentation"] = RLE

    data = read(folder, mark)
    assert len(data.content["annotations"]) == 22
    assert len(data.objects) == 19
    assert data.num_training_images == 5
    assert not data.has_encoded_masks


def test_masks_are_polygons_or_run_length_codes(folder: Path) -> None:
    def add_masks(content: Content) -> None:
        masks = [RLE, RLE | {"counts": "abc"}, [[1, 2, 3, 4], [1, 1, 9, 1, 9, 9]], [[1, 2, 3, 4]], []]
        for annotation, mask in zip(content["annotations"], masks, strict=False):
            annotation["segmentation"] = mask

    data = read(folder, add_masks)
    masks = [annotation.get("segmentation") for annotation in data.content["annotations"]]
    assert masks[:4] == [RLE, RLE | {"counts": "abc"}, [[1, 1, 9, 1, 9, 9]], None]
    assert data.without_mask == [4]
    assert data.num_ignored == 1  # the polygon of two points
    assert data.has_encoded_masks


def test_crowds_without_a_mask_are_counted(folder: Path) -> None:
    def remove_mask(content: Content) -> None:
        content["annotations"][0].update(iscrowd=1, segmentation=[])

    assert len(read(folder, remove_mask).without_mask) == 1


def test_classes_are_read_without_images_and_annotations(folder: Path) -> None:
    path = folder / "train.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({"categories": content["categories"]}))
    assert read_classes(path) == ["first", "second"]
    path.write_text(json.dumps({"categories": content["categories"] * 2}))
    with pytest.raises(UsageError, match=r"--train-json .*: 2 of the categories have the id 40"):
        read_classes(path)


def test_validation_classes_are_matched_by_name(folder: Path) -> None:
    def keep_second(content: Content) -> None:
        content["categories"] = [{"id": 3, "name": "second"}]
        content["annotations"] = [item | {"category_id": 3} for item in content["annotations"]]

    data = read(folder, keep_second, "val")
    assert data.classes == ["first", "second"]
    assert [category["name"] for category in data.content["categories"]] == data.classes
    assert {annotation["category_id"] for annotation in data.content["annotations"]} == {2}


def test_sizes_are_those_of_images_after_their_rotation(folder: Path) -> None:
    path = folder / "train" / "000000000000.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(path) as image:
        image.save(path, exif=exif)
    with pytest.raises(UsageError, match=f"000000000000.jpg is {HEIGHT} x {WIDTH}, and by the JSON {WIDTH} x {HEIGHT}"):
        read(folder)

    def turn(content: Content) -> None:
        content["images"][0] |= {"width": HEIGHT, "height": WIDTH}
        content["annotations"] = content["annotations"][5:]

    assert read(folder, turn).content["images"][0]["width"] == HEIGHT


REFUSED: dict[str, tuple[Callable[[Content], Any], str]] = {
    "no_images": (lambda content: content.pop("images"), "not COCO-style, because it has no list 'images'"),
    "no_categories": (lambda content: content.pop("categories"), "it has no list 'categories'"),
    "empty": (lambda content: content["annotations"].clear(), "the list 'annotations' is empty"),
    "no_file_name": (lambda content: content["images"][2].pop("file_name"), "images[2].file_name is not a string"),
    "text_as_id": (lambda content: content["images"][0].update(id="0"), "images[0].id is not a whole number"),
    "no_box": (lambda content: content["annotations"][3].pop("bbox"), "annotations[3].bbox is not a list"),
    "short_box": (edit_annotation(3, bbox=[1, 2, 3]), "annotation 4: its bbox [1, 2, 3] is not [x, y, width, height]"),
    "nan": (edit_annotation(3, bbox=[1, 2, 3, float("nan")]), "annotation 4: its bbox"),
    "area": (edit_annotation(3, area="big"), "annotation 4: its area 'big' is not a number"),
    "iscrowd": (edit_annotation(3, iscrowd="0"), "annotation 4: its iscrowd '0' is not 0 or 1"),
    "ignore": (edit_annotation(3, ignore=None), "annotation 4: its ignore None is not 0 or 1"),
    "image_id": (edit_annotation(3, image_id=99), "1 of 22 annotations refer to images that are not in the file"),
    "category_id": (edit_annotation(3, category_id=1), "refer to categories that are not in the file; the first has"),
    "duplicate_image": (lambda content: content["images"][1].update(id=0), "2 of the images have the id 0"),
    "duplicate_name": (
        lambda content: content["categories"][1].update(name="second"),
        "2 of the categories have the name 'second'",
    ),
    "size_of_mask": (
        edit_annotation(0, segmentation=RLE | {"size": [1, 2]}),
        "is not a run-length code of size [96, 1",
    ),
    "counts": (edit_annotation(0, segmentation=RLE | {"counts": [1, 2]}), "do not add up to 192 x 96 pixels"),
    "mask": (edit_annotation(0, segmentation="abc"), "annotation 1: its segmentation is neither"),
    "missing_images": (
        lambda content: [image.update(file_name=f"no_{image['id']}.jpg") for image in content["images"][1:]],
        "5 of 6 images are missing, the first is no_1.jpg",
    ),
    "only_crowds": (
        lambda content: [annotation.update(iscrowd=1) for annotation in content["annotations"]],
        "no object in it, only crowds or boxes without area",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsuitable_annotations_are_refused(folder: Path, name: str) -> None:
    edit, message = REFUSED[name]
    with pytest.raises(UsageError) as error:
        read(folder, edit)
    assert message in str(error.value)
    assert str(error.value).startswith(f"--train-{'images' if name == 'missing_images' else 'json'} {folder}")
    assert "\n" not in str(error.value)


def test_unsuitable_files_are_refused(folder: Path) -> None:
    path = folder / "train.json"
    with pytest.raises(UsageError, match=r"--val-json .*: category 'second' is not in --train-json"):
        read_coco("val", folder / "val.json", folder / "val", ["first"])
    with pytest.raises(UsageError, match=r"missing.json: no such file"):
        read_coco("train", folder / "missing.json", folder / "train")
    with pytest.raises(UsageError, match=r"is a folder, not a file"):
        read_coco("train", folder, folder / "train")
    with pytest.raises(UsageError, match=r"--train-images .*: no such folder"):
        read_coco("train", path, folder / "missing")
    with pytest.raises(UsageError, match=r"--train-images .*: is a file; name a folder"):
        read_coco("train", path, path)
    (folder / "train" / "000000000003.jpg").write_bytes(b"text")
    with pytest.raises(UsageError, match=r"000000000003.jpg is not an image that can be read"):
        read_coco("train", path, folder / "train")
    for text in ("[]", "{", "\xff"):
        path.write_text(text, encoding="latin1")
        with pytest.raises(UsageError, match=r"not COCO-style|invalid JSON"):
            read_coco("train", path, folder / "train")
