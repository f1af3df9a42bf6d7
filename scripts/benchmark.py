"""What a run costs, part by part, on the machine at hand: `python scripts/benchmark.py loader --help`."""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image, ImageFilter
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.photometric import MEAN, STD, photometric
from data.scenes import render_scene
from data.views import ViewRecipe, make_views, slotcon_views

REPEATS = 7
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
    args = parser.parse_args(argv)
    args.run(args)


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
    numbers = {
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
