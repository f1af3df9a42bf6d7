"""Views cut from decoded JPEGs on the device, against those of the workers; by libjpeg where there is no GPU."""

import io
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import main_pretrain
from data.datasets import SceneDataset, build_dataset
from data.decode import CHUNK, COARSEST, decode_views, read_source
from data.loader import EpochSampler, build_loader, collate
from data.views import slotcon_views
from tests.test_views import picture
from utils import resume
from utils.batch import Batch
from utils.errors import UsageError
from utils.config import make_plan

RECIPES = slotcon_views(64, 0.08)
FACTS = ("crops", "flips", "turns", "index", "color")

SAVED: dict[str, Callable[[Path], object]] = {
    "rgb.jpg": lambda path: picture(160, 120).save(path, quality=90),
    "full_color.jpg": lambda path: picture(160, 120, 1).save(path, quality=90, subsampling=0),
    "progressive.jpg": lambda path: picture(160, 120, 2).save(path, progressive=True),
    "gray.jpg": lambda path: picture(160, 120, 3).convert("L").save(path),
    "odd.jpg": lambda path: picture(157, 43, 4).save(path, quality=95),
    "tall.jpg": lambda path: picture(31, 399, 5).save(path),
    "dot.jpg": lambda path: picture(1, 1, 6).save(path),
    "trailing.jpg": lambda path: path.write_bytes(jpeg(picture(90, 70, 7)) + b"\0 more" * 50),
    "stored_as_rgb.jpg": lambda path: picture(160, 120, 8).save(path, keep_rgb=True),
    "cmyk.jpg": lambda path: picture(160, 120, 9).convert("CMYK").save(path),
    "rgb.png": lambda path: picture(160, 120, 10).save(path),
    "palette.png": lambda path: picture(160, 120, 11).quantize(64).save(path),
    "sixteen_bit.png": lambda path: Image.fromarray(np.arange(9600, dtype=np.uint16).reshape(80, 120) * 6).save(path),
    "a_png.jpg": lambda path: picture(160, 120, 12).save(path, format="png"),
}
AS_PIXELS = {"stored_as_rgb.jpg", "cmyk.jpg", "rgb.png", "palette.png", "sixteen_bit.png", "a_png.jpg"}


def jpeg(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an image of every kind."""
    folder = tmp_path_factory.mktemp("kinds")
    for name, save in SAVED.items():
        save(folder / name)
    return folder


def both(folder: Path, files: list[str], device: str = "cpu", epoch: int = 0) -> tuple[Batch, Batch]:
    """The batch of these files with the workers' views, and with those cut on the device."""
    datasets = [SceneDataset(folder, files, RECIPES, seed=0, send_sources=send) for send in (False, True)]
    numbers = range(epoch * len(files), (epoch + 1) * len(files))
    by_worker, undecoded = (collate([dataset[number] for number in numbers]) for dataset in datasets)
    assert undecoded.views == []
    assert undecoded.sources is not None
    by_device = decode_views(undecoded, RECIPES, device)
    assert by_device.sources is None
    return by_worker, by_device


def assert_same_facts(a: Batch, b: Batch) -> None:
    for name in FACTS:
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype
        assert torch.equal(x, y), name


def differences(a: Batch, b: Batch) -> np.ndarray:
    """Absolute, of all values of all views, in levels."""
    for view, other in zip(a.views, b.views, strict=True):
        assert (view.shape, view.dtype, other.dtype) == (other.shape, torch.uint8, torch.uint8)
    return torch.cat(
        [(view.int() - other.cpu().int()).abs().flatten() for view, other in zip(a.views, b.views)]
    ).numpy()


def assert_close(a: Batch, b: Batch, mean: float, most: float) -> None:
    """In levels: the mean difference, and what 99.9 % of all values do not exceed."""
    difference = differences(a, b)
    assert difference.mean() <= mean
    assert np.quantile(difference, 0.999) <= most


# --- the same views


@pytest.mark.parametrize("name", SAVED)
def test_the_views_are_the_workers(name: str, kinds: Path) -> None:
    """Decoders are the same here; the filter rounds once, not twice: measured, at most 0.20 levels and 1."""
    for epoch in range(4):
        by_worker, by_device = both(kinds, [name], epoch=epoch)
        assert_same_facts(by_worker, by_device)
        assert_close(by_worker, by_device, mean=0.25, most=1)


def test_crops_of_huge_images_are_close(tmp_path: Path) -> None:
    """Whose pixels are averaged first, where CUDA's filter would not reach: measured, 0.2 levels and 2."""
    picture(2600, 2100).save(tmp_path / "huge.jpg", quality=90)
    pairs = [both(tmp_path, ["huge.jpg"], epoch=epoch) for epoch in range(3)]
    widths = torch.cat([a.crops[..., 2] - a.crops[..., 0] for a, _ in pairs])
    assert widths.max() > COARSEST * RECIPES[0].size
    for by_worker, by_device in pairs:
        assert_same_facts(by_worker, by_device)
        assert_close(by_worker, by_device, mean=0.4, most=3)


def test_a_batch_of_all_kinds_keeps_its_order(kinds: Path) -> None:
    names = [*SAVED] * (CHUNK // len(SAVED) + 2)  # more than are resampled at a time
    by_worker, by_device = both(kinds, names)
    assert by_device.index.tolist() == list(range(len(names)))
    assert_same_facts(by_worker, by_device)
    assert_close(by_worker, by_device, mean=0.2, most=1)


def test_the_views_of_photographs_are_the_workers(photographs: Path) -> None:
    """Measured: 0.10 levels in the mean, 0.02 % of the values by more than one."""
    files = sorted(path.name for path in (photographs / "train2017").glob("*.jpg"))[:24]
    by_worker, by_device = both(photographs / "train2017", files)
    assert_same_facts(by_worker, by_device)
    assert_close(by_worker, by_device, mean=0.2, most=1)
    assert (differences(by_worker, by_device) > 1).mean() < 0.002


def test_a_batch_that_has_its_views_is_left_alone(kinds: Path) -> None:
    batch, _ = both(kinds, ["rgb.jpg"])
    assert decode_views(batch, RECIPES, "cpu") is batch


# --- what is sent


@pytest.mark.parametrize("name", SAVED)
def test_a_jpeg_is_sent_as_it_is_and_the_rest_as_pixels(name: str, kinds: Path) -> None:
    source = read_source(kinds / name)
    with Image.open(kinds / name) as image:
        assert source.size == image.size
    assert source.name == str(kinds / name)
    if name in AS_PIXELS:
        assert source.data.shape == (3, source.size[1], source.size[0])
    else:
        assert source.data.numpy().tobytes() == (kinds / name).read_bytes()


def test_workers_send_one_tensor_of_bytes(tiny: Callable[..., list[str]]) -> None:
    batches = []
    for decode, workers in (("cpu", 0), ("gpu", 2)):
        args = main_pretrain.parse_args(tiny("--decode", decode))
        dataset = build_dataset(args)
        sampler = EpochSampler(make_plan(args, len(dataset), 1), 0, args.seed)
        batches.append(list(build_loader(dataset, sampler, workers, pin_memory=False)))
    for by_worker, sent in zip(*batches, strict=True):
        assert_same_facts(by_worker, sent)
        assert sent.sources.data.dim() == 1
        assert_close(by_worker, decode_views(sent, dataset.recipes, "cpu"), mean=0.25, most=2)


def test_sources_stay_on_the_host(kinds: Path) -> None:
    dataset = SceneDataset(kinds, [*SAVED], RECIPES, 0, send_sources=True)
    batch = collate([dataset[number] for number in range(3)])
    moved = batch.to("meta")
    assert moved.crops.device.type == "meta"
    assert moved.sources is batch.sources


# --- damage


def with_thumbnail() -> bytes:
    """A JPEG whose header holds a whole one."""
    return jpeg(picture(160, 120), exif=b"Exif\0\0" + jpeg(picture(40, 30)))


def broken_tables() -> bytes:
    """A JPEG of sound outline that no decoder reads."""
    data = bytearray(jpeg(picture(160, 120)))
    tables = data.find(b"\xff\xc4") + 5
    data[tables : tables + 10] = b"\xff" * 10
    return bytes(data)


DAMAGED = {
    "empty": b"",
    "no_image": b"not found\n" * 99,
    "header_only": jpeg(picture(160, 120))[:300],
    "half": jpeg(picture(160, 120))[:3000],
    "no_end": jpeg(picture(160, 120))[:-2],
    "half_with_thumbnail": with_thumbnail()[:-900],
    "half_a_cmyk": jpeg(picture(160, 120).convert("CMYK"))[:3000],
}


def test_a_thumbnail_has_an_end_of_its_own() -> None:
    assert b"\xff\xd9" in DAMAGED["half_with_thumbnail"]


@pytest.mark.parametrize("damage", DAMAGED)
def test_the_next_image_takes_the_place_of_a_damaged_file(damage: str, kinds: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(DAMAGED[damage])
    (tmp_path / "b.jpg").write_bytes(jpeg(picture(160, 120)))
    by_worker, by_device = both(tmp_path, ["a.jpg", "b.jpg"])
    assert by_device.unreadable == by_worker.unreadable == (str(tmp_path / "a.jpg"),)
    assert by_device.index.tolist() == [1, 1]
    assert_same_facts(by_worker, by_device)
    assert_close(by_worker, by_device, mean=0.25, most=1)


def test_without_any_readable_file_images_are_black(tmp_path: Path) -> None:
    names = [f"{number}.jpg" for number in range(3)]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    by_worker, by_device = both(tmp_path, names)
    assert by_device.unreadable == by_worker.unreadable
    assert_same_facts(by_worker, by_device)
    assert not torch.stack(by_device.views).any()


def test_damage_inside_is_found_by_the_decoder_and_the_rest_of_the_batch_kept(kinds: Path, tmp_path: Path) -> None:
    names = ["rgb.jpg", "rgb.png", "gray.jpg", "odd.jpg"]
    for name in names:
        (tmp_path / name).write_bytes((kinds / name).read_bytes())
    whole, _ = both(tmp_path, names)
    (tmp_path / "gray.jpg").write_bytes(broken_tables())
    with pytest.warns(UserWarning, match="--decode gpu: a batch is decoded on the host"):
        _, by_device = both(tmp_path, names)
    assert by_device.unreadable == (str(tmp_path / "gray.jpg"),)
    assert not any(view[2].any() for view in by_device.views)
    assert_same_facts(whole, by_device)
    kept = [0, 1, 3]
    assert_close(only(whole, kept), only(by_device, kept), mean=0.2, most=1)


def only(batch: Batch, rows: list[int]) -> Batch:
    return replace(batch, views=[view[rows] for view in batch.views])


def test_garbage_that_pillow_shows_is_kept(tmp_path: Path) -> None:
    """Half of the data with an end behind it: libjpeg warns, and nobody calls the file unreadable."""
    (tmp_path / "a.jpg").write_bytes(DAMAGED["half"] + b"\xff\xd9")
    by_worker, by_device = both(tmp_path, ["a.jpg"])
    assert by_worker.unreadable == by_device.unreadable == ()
    assert_close(by_worker, by_device, mean=0.25, most=1)


# --- the flag


def test_decoding_on_a_gpu_wants_a_run_on_a_gpu(
    tiny: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main_pretrain.main(tiny("--decode", "gpu", "--device", "cpu"))
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "--decode gpu: " in said
    assert "--decode cpu" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_change_of_the_decoder_changes_the_result() -> None:
    with pytest.raises(UsageError, match="--decode cpu -> gpu"):
        resume.check_changes({"decode": "cpu"}, {"decode": "gpu"}, allow=False)


# --- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_host_waits_at_most_once_outside_the_decoder(kinds: Path) -> None:
    """For the stream's own earlier work, before nvJPEG may write into memory that it has freed; what nvJPEG waits
    for inside torchvision is not seen here. Pixels are the workers': full color within two roundings, subsampled
    color within what repeating it does (1.2 levels in the mean and 19 where Pillow's pixels imitate that)."""
    full_color = ["full_color.jpg", "gray.jpg", *sorted(AS_PIXELS)]
    for names, mean, most in ((full_color, 1.0, 4), ([*SAVED], 4.0, 48)):
        both(kinds, names, "cuda")  # cuDNN and nvJPEG set themselves up
        dataset = SceneDataset(kinds, names, RECIPES, 0, send_sources=True)
        undecoded = collate([dataset[number] for number in range(len(names))]).pin_memory()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                by_device = decode_views(undecoded, RECIPES, "cuda")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits = [str(warning.message) for warning in said if "synchroniz" in str(warning.message)]
        assert len(waits) <= 1, waits
        by_worker, _ = both(kinds, names)
        assert_same_facts(by_worker, by_device)
        assert all(view.is_cuda for view in by_device.views)
        assert_close(by_worker, by_device, mean, most)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_queued_work_keeps_the_memory_it_reads(kinds: Path) -> None:
    """Memory freed while queued kernels still read it is given to the decoder, which must not write it early."""
    names = ["full_color.jpg"] * 8
    both(kinds, names, "cuda")
    dataset = SceneDataset(kinds, names, RECIPES, 0, send_sources=True)
    undecoded = collate([dataset[number] for number in range(len(names))])
    matrix = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        blocks = [torch.ones(3, 120, 160, dtype=torch.uint8, device="cuda") for _ in names]
        torch.cuda.synchronize()
        for _ in range(20):
            matrix = torch.nn.functional.normalize(matrix @ matrix)
        sums: list[Tensor] = [block.sum() for block in blocks]
        del blocks
        decode_views(undecoded, RECIPES, "cuda")
        assert [int(total) for total in sums] == [3 * 120 * 160] * len(names)
