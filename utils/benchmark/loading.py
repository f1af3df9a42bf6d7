"""From photographs to colored views: what each part costs a core, and what the workers yield together."""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image

from data.datasets import SceneDataset
from data.loader import EpochSampler, build_loader
from data.color import apply_color, photometric
from data.loader import prefetch
from data.views import make_views
from utils.config import at_least
from utils.batch import Batch
from utils.benchmark.configurations import BATCHES, Configuration
from utils.benchmark.photographs import folder_dataset, paths, photographs
from utils.benchmark.pillow import pillow_transforms
from utils.benchmark.stepping import memory_batch, wait_for
from utils.benchmark.table import Row, Spread, Table
from utils.device import choose_device, loader_workers
from utils.errors import UsageError
from utils.config import make_plan

ROUNDS = 7
COLUMNS = {
    "part": "part",
    "switches": "switches",
    "batch_size": "batch",
    "workers": "workers",
    "milliseconds_per_image": "ms an image",
    "images_per_second": "images/s",
    "times_worker": "times the worker's",
}
NOTES = (
    "up to the color on the CPU: processor time of one core, which other programs disturb little; then: wall time",
    "worker: reads, decodes (unless --decode gpu), cuts two views; Pillow: the same views and their color, by "
    "torchvision's transforms",
    "all methods share these views",
)


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """The loader's own flags."""
    count = at_least(0)
    group.add_argument(
        "--workers", nargs="+", type=count, metavar="N", help="of the DataLoader; default: 0 and the flags' number"
    )
    group.add_argument(
        "--images", type=at_least(1), default=64, metavar="N", help="how many images the parts are measured on"
    )


def benchmark_loader(options: argparse.Namespace, found: Sequence[Configuration]) -> Table:
    """For each configuration the parts on one core, which know no batches, and the `DataLoader` by workers."""
    images = options.data_dir or "rendered stand-ins"
    title = f"Views of {images}: median, lowest..highest of {ROUNDS} rounds"
    table = Table(title, COLUMNS, notes=list(NOTES))
    with photographs(found[0].args, options.data_dir, options.images) as root:
        for switches in dict.fromkeys(each.switches for each in found):
            group = [each.args for each in found if each.switches == switches]
            print(f"views {switches}".rstrip(), file=sys.stderr, flush=True)
            rows = _on_one_core(group[0], options, root)
            for args in group:
                rows += _by_workers(args, options, root)
            table.rows += [{"switches": switches, **row} for row in rows]
    return table


def _on_one_core(args: argparse.Namespace, options: argparse.Namespace, root: Path) -> list[Row]:
    """Both views of each image by the worker, by Pillow's transforms, and the color on its own."""
    dataset = folder_dataset(args, root)
    files = paths(dataset, options.images)
    by_pillow = [pillow_transforms(recipe) for recipe in dataset.recipes]
    drawn = [make_views(_decode(file), dataset.recipes, 0, 0, index) for index, file in enumerate(files)]
    views = [torch.stack(view) for view in zip(*(sample.views for sample in drawn))]
    color = torch.stack([sample.color for sample in drawn], dim=1)
    parts: dict[str, Callable[[], object]] = {
        "worker": lambda: [dataset[index] for index in range(len(files))],
        "decoding alone": lambda: [_decode(file) for file in files],
        "Pillow transforms": lambda: [
            [view(image) for view in by_pillow] for image in (_decode(file).convert("RGB") for file in files)
        ],
        "color on the CPU": lambda: [photometric(*view) for view in zip(views, color)],
    }
    with _one_thread():
        seconds = _processor_time(parts)
    rows: list[Row] = []
    for name, values in seconds.items():
        ratio = Spread.of([value / worker for value, worker in zip(values, seconds["worker"])])
        rows.append({"part": name} | _rates(values, len(files)) | {"times_worker": ratio})
    return rows


def _processor_time(parts: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each part in each round, after a first one that does not count; the parts in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(1 + ROUNDS):
        for name, part in parts.items():
            began = time.process_time()
            part()
            seconds[name].append(time.process_time() - began)
    return {name: values[1:] for name, values in seconds.items()}


def _by_workers(args: argparse.Namespace, options: argparse.Namespace, root: Path) -> list[Row]:
    """The `DataLoader` as a run has it, without and with what `prefetch` does to its batches."""
    device, size = choose_device(args), args.batch_size
    dataset = folder_dataset(args, root, BATCHES * size * args.accum_steps)
    rows: list[Row] = []
    if device.type == "cuda":
        batch = memory_batch(args).to(device)
        seconds = _rounds(iter(lambda: apply_color(batch), None), 1, device)
        rows.append({"part": "color on the GPU", "batch_size": size} | _rates(seconds, size))
    for workers in options.workers or sorted({0, loader_workers(args.num_workers)}):
        for part in ("DataLoader", "DataLoader, prefetch"):
            batches: Iterable[Batch] = _loader(args, dataset, workers, device)
            if part != "DataLoader":
                batches = prefetch(batches, device, dataset.recipes)
            at_once = max(1, workers)  # workers that started together end together
            seconds = _rounds(iter(batches), at_once, device)
            row: Row = {"part": part, "batch_size": size, "workers": workers}
            rows.append(row | _rates(seconds, at_once * size))
    return rows


def _loader(args: argparse.Namespace, dataset: SceneDataset, workers: int, device: torch.device) -> Iterable[Batch]:
    plan = make_plan(args, len(dataset), world_size=1)
    return build_loader(dataset, EpochSampler(plan, 0, args.seed), workers, pin_memory=device.type == "cuda")


def _rounds(batches: Iterator[Batch], at_once: int, device: torch.device) -> list[float]:
    """Seconds of a round of so many batches, after a first one that does not count."""
    seconds = []
    for _ in range(1 + ROUNDS):
        began = time.perf_counter()
        for _ in range(at_once):
            next(batches)
        wait_for(device)
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def _rates(seconds: Sequence[float], images: int) -> Row:
    spread = Spread.of(seconds)
    return {"milliseconds_per_image": spread.times(1000 / images), "images_per_second": spread.under(images)}


def _decode(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            image.load()
    except OSError as error:
        raise UsageError(f"--data-dir: {file} cannot be read ({error})") from None
    return image


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
