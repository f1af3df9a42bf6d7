"""data/decode.py: views cut from JPEG files on the device against those of the workers; without a GPU, on the CPU."""

import io
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main_pretrain
from data.datasets import MultiViewDataset, build_dataset
from data.decode import CHUNK, MAX_REDUCTION, decode_views, read_encoded
from data.loader import EpochSampler, build_loader, collate
from tests.helpers import make_image, run_expecting_usage_error
from utils.batch import Batch
from utils.config import make_plan
from utils.view_recipes import two_view_recipes

RECIPES = two_view_recipes(64, 0.08)
ROTATED = (replace(RECIPES[0], rotate=True, interpolation="bilinear"), RECIPES[1])
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SAVE: dict[str, Callable[[Path], object]] = {
    "rgb.jpg": lambda path: make_image(160, 120).save(path, quality=90),
    "full_color.jpg": lambda path: make_image(160, 120, 1).save(path, quality=90, subsampling=0),
    "progressive.jpg": lambda path: make_image(160, 120, 2).save(path, progressive=True),
    "gray.jpg": lambda path: make_image(160, 120, 3).convert("L").save(path),
    "odd.jpg": lambda path: make_image(157, 43, 4).save(path, quality=95),
    "tall.jpg": lambda path: make_image(31, 399, 5).save(path),
    "dot.jpg": lambda path: make_image(1, 1, 6).save(path),
    "trailing.jpg": lambda path: path.write_bytes(encode(make_image(90, 70, 7)) + b"\0 more" * 50),
    "stored_as_rgb.jpg": lambda path: make_image(160, 120, 8).save(path, keep_rgb=True),
    "cmyk.jpg": lambda path: make_image(160, 120, 9).convert("CMYK").save(path),
    "rgb.png": lambda path: make_image(160, 120, 10).save(path),
    "palette.png": lambda path: make_image(160, 120, 11).quantize(64).save(path),
    "sixteen_bit.png": lambda path: Image.fromarray(np.arange(9600, dtype=np.uint16).reshape(80, 120) * 6).save(path),
    "a_png.jpg": lambda path: make_image(160, 120, 12).save(path, format="png"),
}
SENT_AS_PIXELS = {"stored_as_rgb.jpg", "cmyk.jpg", "rgb.png", "palette.png", "sixteen_bit.png", "a_png.jpg"}


def encode(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an image of every kind."""
    folder = tmp_path_factory.mktemp("kinds")
    for name, save in SAVE.items():
        save(folder / name)
    return folder


def load_encoded(folder: Path, files: list[str], epoch: int = 0) -> Batch:
    dataset = MultiViewDataset(folder, files, ROTATED, seed=0, send_encoded=True)
    return collate([dataset[number + epoch * len(files)] for number in range(len(files))])


def load_both(folder: Path, files: list[str], device: str = "cpu", epoch: int = 0) -> tuple[Batch, Batch]:
    """Load a batch with the views of the workers, and with views cut on the device."""
    dataset = MultiViewDataset(folder, files, ROTATED, seed=0)
    by_worker = collate([dataset[number + epoch * len(files)] for number in range(len(files))])
    by_device = decode_views(load_encoded(folder, files, epoch), ROTATED, device)
    return by_worker, by_device


def assert_close(a: Batch, b: Batch, mean: float, largest: float) -> None:
    """Compare two batches; `largest` bounds 99.9 % of the differences in levels."""
    for name in ("crops", "flips", "rotations", "index", "color"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.unreadable == b.unreadable
    assert b.encoded is None
    pairs = list(zip(a.views, b.views, strict=True))
    assert all(x.shape == y.shape and x.dtype == y.dtype == torch.uint8 for x, y in pairs)
    difference = torch.cat([(x.int() - y.cpu().int()).abs().flatten() for x, y in pairs]).numpy()
    assert difference.mean() <= mean
    assert np.quantile(difference, 0.999) <= largest


# Both cut the same decoded pixels, but the workers round after each pass of the filter and the device once: 15 % of the
# values differ, by one level.


@pytest.mark.parametrize("name", SAVE)
def test_views_of_every_kind_of_image_equal_the_workers(name: str, folder: Path) -> None:
    for epoch in range(3):
        assert_close(*load_both(folder, [name], epoch=epoch), mean=0.25, largest=1)
    encoded = read_encoded(folder / name)
    with Image.open(folder / name) as image:
        assert encoded.size == image.size
    if name in SENT_AS_PIXELS:
        assert encoded.data.shape == (3, encoded.size[1], encoded.size[0])
    else:
        assert encoded.data.numpy().tobytes() == (folder / name).read_bytes()


def test_crops_of_huge_images_are_averaged_first(tmp_path: Path) -> None:
    make_image(1400, 1200).save(tmp_path / "huge.jpg", quality=90)
    pairs = [load_both(tmp_path, ["huge.jpg"], epoch=epoch) for epoch in range(3)]
    widths = torch.cat([batch.crops[..., 2] - batch.crops[..., 0] for batch, _ in pairs])
    assert widths.max() > MAX_REDUCTION * RECIPES[0].size
    for pair in pairs:
        assert_close(*pair, mean=0.5, largest=6)


def test_a_batch_larger_than_a_chunk_keeps_its_order(folder: Path) -> None:
    names = [*SAVE] * (CHUNK // len(SAVE) + 1)
    by_worker, by_device = load_both(folder, names)
    assert len(names) > CHUNK
    assert_close(by_worker, by_device, mean=0.25, largest=1)
    assert decode_views(by_worker, ROTATED, "cpu") is by_worker


def test_workers_send_one_tensor_of_bytes_that_stays_on_the_host(tiny: Callable[..., list[str]]) -> None:
    batches = []
    for decode, workers in (("cpu", 0), ("gpu", 2)):
        args = main_pretrain.parse_args(tiny("--decode", decode, "--epochs", "1"))
        dataset = build_dataset(args)
        sampler = EpochSampler(make_plan(args, len(dataset), 1), 0, args.seed)
        batches.append(list(build_loader(dataset, sampler, workers, pin_memory=False)))
    for by_worker, sent in zip(*batches, strict=True):
        assert sent.encoded.data.dim() == 1
        assert sent.to("meta").encoded is sent.encoded
        assert_close(by_worker, decode_views(sent, dataset.view_recipes, "cpu"), mean=0.25, largest=2)


def test_decoding_on_a_gpu_needs_a_run_on_a_gpu(
    tiny: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    line = run_expecting_usage_error(main_pretrain.main, tiny("--decode", "gpu"), capsys)
    assert "--decode gpu: " in line
    assert "--decode cpu" in line


# Damaged files

DAMAGED = {
    "empty": b"",
    "no_image": b"not found\n" * 99,
    "header_only": encode(make_image(160, 120))[:300],
    "half": encode(make_image(160, 120))[:3000],
    "no_end": encode(make_image(160, 120))[:-2],
    # The header holds a complete JPEG file, with an end marker of its own.
    "half_with_thumbnail": encode(make_image(160, 120), exif=b"Exif\0\0" + encode(make_image(40, 30)))[:-900],
    "half_a_cmyk": encode(make_image(160, 120).convert("CMYK"))[:3000],
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_the_next_image_replaces_a_damaged_file(damage: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(DAMAGED[damage])
    (tmp_path / "b.jpg").write_bytes(encode(make_image(160, 120)))
    by_worker, by_device = load_both(tmp_path, ["a.jpg", "b.jpg"])
    assert by_worker.unreadable == (str(tmp_path / "a.jpg"),)
    assert by_worker.index.tolist() == [1, 1]
    assert_close(by_worker, by_device, mean=0.25, largest=1)


def test_without_a_readable_file_images_are_black(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(b"")
    by_worker, by_device = load_both(tmp_path, ["0.jpg", "1.jpg", "2.jpg"])
    assert_close(by_worker, by_device, mean=0, largest=0)
    assert not torch.stack(by_device.views).any()


def test_damage_that_only_the_decoder_finds_leaves_the_rest_of_the_batch(folder: Path, tmp_path: Path) -> None:
    names = ["rgb.jpg", "rgb.png", "gray.jpg", "odd.jpg"]
    for name in names:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    intact, _ = load_both(tmp_path, names)
    data = bytearray(encode(make_image(160, 120)))
    tables = data.find(b"\xff\xc4") + 5
    data[tables : tables + 10] = b"\xff" * 10
    (tmp_path / "gray.jpg").write_bytes(data)
    with pytest.warns(UserWarning, match="--decode gpu: decoding a batch on the host"):
        by_device = decode_views(load_encoded(tmp_path, names), ROTATED, "cpu")
    assert by_device.unreadable == (str(tmp_path / "gray.jpg"),)
    assert not any(view[2].any() for view in by_device.views)
    for view in intact.views:
        view[2] = 0
    assert_close(replace(intact, unreadable=by_device.unreadable), by_device, mean=0.25, largest=1)


# On a GPU


@on_gpu
def test_decoding_on_a_gpu_waits_at_most_once(folder: Path) -> None:
    """The host waits for the earlier work of the stream, before nvJPEG may write into memory that it has freed.

    Full color is that of the workers within two roundings; subsampled color differs as repeating it does.
    """
    full_color = ["full_color.jpg", "gray.jpg", *sorted(SENT_AS_PIXELS)]
    for names, mean, largest in ((full_color, 1.0, 4), ([*SAVE], 4.0, 48)):
        load_both(folder, names, "cuda")  # initializes cuDNN and nvJPEG
        encoded = load_encoded(folder, names).pin_memory()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                by_device = decode_views(encoded, ROTATED, "cuda")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert sum("synchroniz" in str(warning.message) for warning in caught) <= 1
        assert all(view.is_cuda for view in by_device.views)
        assert_close(load_both(folder, names)[0], by_device, mean, largest)


@on_gpu
def test_decoder_does_not_write_into_memory_that_queued_work_reads(folder: Path) -> None:
    names = ["full_color.jpg"] * 8
    load_both(folder, names, "cuda")
    encoded, matrix = load_encoded(folder, names), torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        blocks = [torch.ones(3, 120, 160, dtype=torch.uint8, device="cuda") for _ in names]
        torch.cuda.synchronize()
        for _ in range(20):
            matrix = torch.nn.functional.normalize(matrix @ matrix)
        sums = [block.sum() for block in blocks]
        del blocks
        decode_views(encoded, ROTATED, "cuda")
        assert [int(total) for total in sums] == [3 * 120 * 160] * len(names)
