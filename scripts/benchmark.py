"""What a run costs, part by part, on the machine at hand: `python scripts/benchmark.py loader --help`."""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageFilter
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import main_pretrain
from data.datasets import Sample
from data.loader import collate
from data.photometric import MEAN, STD, photometric
from data.prefetch import prefetch
from data.scenes import render_scene
from data.views import ViewRecipe, make_views, slotcon_views
from utils.batch import Batch
from utils.device import choose_device
from utils.finite import FiniteGuard
from utils.logging import memory_gib
from utils.meter import Meter
from utils.run import Run

REPEATS = 7
WARM_UP = 3
MIN_SCALE = 0.08


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    loader = commands.add_parser("loader", help="milliseconds an image of decoding, cutting and colouring views")
    loader.add_argument("--data-dir", type=Path, help="folder of JPEG files; left out, rendered stand-ins")
    loader.add_argument("--image-size", type=int, default=224, help="side of a view in pixels")
    loader.add_argument("--images", type=int, default=64, help="how many images")
    loader.add_argument("--json", type=Path, help="file to write the numbers to")
    loader.set_defaults(run=benchmark_loader)
    step = commands.add_parser("step", help="images/s and peak memory of the whole training step, fed from memory")
    step.add_argument("--methods", nargs="+", default=["slotcon"], help="methods, timed in turns; memory only for one")
    step.add_argument("--steps", type=int, default=20, help="how many steps are timed")
    step.add_argument("--json", type=Path, help="file to write the numbers to")
    step.add_argument("flags", nargs=argparse.REMAINDER, help="-- and flags of main_pretrain.py")
    step.set_defaults(run=benchmark_step)
    args = parser.parse_args(argv)
    args.run(args)


def benchmark_step(args: argparse.Namespace) -> None:
    """Colour, forward, backward, optimiser and teacher of the runs that methods and flags describe, in turns."""
    flags = [flag for flag in args.flags if flag != "--"]
    steps = {method: training_step(main_pretrain.parse_args(["--method", method, *flags])) for method in args.methods}
    rates: dict[str, list[float]] = {method: [] for method in steps}
    for number in range(WARM_UP + args.steps):
        for method, (run, step) in steps.items():
            start = time.perf_counter()
            step(number)
            rates[method].append(run.plan.effective_batch / (time.perf_counter() - start))
    device = next(iter(steps.values()))[0].device
    numbers: dict[str, Any] = {}
    for method, (run, _) in steps.items():
        timed = rates[method][WARM_UP:]
        rate = {"median": statistics.median(timed), "lowest": min(timed), "highest": max(timed)}
        numbers[method] = {"images_per_second": rate, "args": vars(run.args)}
        print(run.describe())
        spread = f"{rate['lowest']:.2f} to {rate['highest']:.2f}, {args.steps} steps"
        print(f"images/s          {rate['median']:.2f}   ({spread})")
        slower = [a / b for a, b in zip(rates[args.methods[0]][WARM_UP:], timed)]
        print(f"time of a step    {statistics.median(slower):.3f} x that of {args.methods[0]}\n")
    if len(steps) == 1:
        numbers["peak_memory_gib"] = memory_gib(device)
        print(f"peak memory       {numbers['peak_memory_gib']:.2f} GiB")
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=1))


def training_step(args: argparse.Namespace) -> tuple[Run, Callable[[int], None]]:
    """A run, and what does its optimiser step of a given number and waits for it; fed from memory."""
    device = choose_device(args)
    run = main_pretrain.build_run(args, device, images=1000 * args.batch_size * args.accum_steps)
    batch = scene_batch(args)
    batches = prefetch(itertools.repeat(batch.pin_memory() if device.type == "cuda" else batch), device)
    guard, meter = FiniteGuard(run.method, device), Meter(device, run.plan.images, run.plan.steps_per_epoch)

    def step(number: int) -> None:
        main_pretrain.optimise(run, run.method, batches, guard, meter, number)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run, step


def scene_batch(args: argparse.Namespace) -> Batch:
    """A batch as the workers send it, of views of a few scenes."""
    scenes = [Image.fromarray(render_scene(0, "train", number)[0]) for number in range(8)]
    recipes = slotcon_views(args.image_size, args.min_scale)
    numbers = range(args.batch_size)
    samples = [Sample(*make_views(scenes[n % 8], recipes, 0, 0, n), index=n, unreadable=()) for n in numbers]
    return collate(samples)


def benchmark_loader(args: argparse.Namespace) -> None:
    """Both views of each image by the worker, by Pillow's transforms, and the colour on its own."""
    torch.set_num_threads(1)
    recipes = slotcon_views(args.image_size, MIN_SCALE)
    by_pillow = [pillow_transforms(recipe) for recipe in recipes]
    with photographs(args.data_dir, args.images) as files:
        drawn = [make_views(decode(file), recipes, 0, 0, index) for index, file in enumerate(files)]
        views = [torch.stack(view) for view in zip(*(sample.views for sample in drawn))]
        colour = torch.stack([sample.colour for sample in drawn], dim=1)
        parts: dict[str, Callable[[], object]] = {
            "worker": lambda: [make_views(decode(file), recipes, 0, 1, index) for index, file in enumerate(files)],
            "decoding, a part of worker": lambda: [decode(file) for file in files],
            "Pillow transforms": lambda: [
                [view(image) for view in by_pillow] for image in (decode(file).convert("RGB") for file in files)
            ],
            "colour, CPU": lambda: [photometric(*view) for view in zip(views, colour)],
        }
        if torch.cuda.is_available():
            on_device = [view.cuda() for view in views]
            parts["colour, CUDA"] = lambda: [photometric(*view) for view in zip(on_device, colour)]
        seconds = time_interleaved(parts)
    rows = {name: [1000 * value / len(files) for value in values] for name, values in seconds.items()}
    report(rows, len(files), args)


def report(rows: dict[str, list[float]], images: int, args: argparse.Namespace) -> None:
    """Print the median and the range of each row, milliseconds an image, and write them to args.json."""
    print(f"{images} images, two views of {args.image_size} px, one core: milliseconds an image")
    numbers: dict[str, Any] = {
        name: {"median": statistics.median(row), "lowest": min(row), "highest": max(row)} for name, row in rows.items()
    }
    for name, row in numbers.items():
        print(f"{name:28}{row['median']:8.2f}   ({row['lowest']:.2f} to {row['highest']:.2f})")
    ratio = numbers["Pillow transforms"]["median"] / numbers["worker"]["median"]
    print(f"Pillow transforms / worker  {ratio:8.2f}")
    if args.json:
        args.json.write_text(json.dumps({"milliseconds": numbers, "ratio": ratio, "images": images}, indent=1))


def time_interleaved(parts: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each part, REPEATS times after a first round that does not count.

    Processor time, which other programs on the machine disturb little; wall time where a part runs on CUDA.
    """
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(1 + REPEATS):
        for name, part in parts.items():
            on_device = name.endswith("CUDA")
            clock = time.perf_counter if on_device else time.process_time
            start = clock()
            part()
            if on_device:
                torch.cuda.synchronize()
            seconds[name].append(clock() - start)
    return {name: values[1:] for name, values in seconds.items()}


@contextmanager
def photographs(folder: Path | None, count: int) -> Iterator[list[Path]]:
    """JPEG files of `folder`, at any depth; without a folder, stand-ins of a common photograph's size."""
    if folder is not None:
        files = sorted(folder.rglob("*.jpg"))[:count]
        if not files:
            raise SystemExit(f"--data-dir {folder}: no .jpg files in it")
        yield files
        return
    with tempfile.TemporaryDirectory() as temporary:
        files = [Path(temporary, f"{number}.jpg") for number in range(count)]
        for number, file in enumerate(files):
            picture, _mask = render_scene(0, "train", number, 640, 480)
            Image.fromarray(picture).save(file, quality=90)
        yield files


def decode(file: Path) -> Image.Image:
    with Image.open(file) as image:
        image.load()
        return image


def pillow_transforms(recipe: ViewRecipe) -> transforms.Compose:
    """The same view by torchvision's transforms of Pillow images."""
    colour = recipe.colour
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(recipe.size, recipe.scale, recipe.ratio, transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(recipe.flip_p),
            transforms.RandomApply([transforms.ColorJitter(*colour.jitter)], colour.jitter_p),
            transforms.RandomGrayscale(colour.grey_p),
            transforms.RandomApply([PillowBlur(colour.blur_sigma)], colour.blur_p),
            transforms.RandomSolarize(128, colour.solarise_p),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


class PillowBlur(torch.nn.Module):
    def __init__(self, sigma: tuple[float, float]) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, image: Image.Image) -> Image.Image:
        sigma = torch.empty(1).uniform_(*self.sigma).item()
        return image.filter(ImageFilter.GaussianBlur(sigma))


if __name__ == "__main__":
    main()
