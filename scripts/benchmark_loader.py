"""Benchmark of loading and augmenting images: each part of the work, and the `DataLoader` with its workers."""

import argparse
import os
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.benchmark import Timer, timer
from torch.utils.data import DataLoader
from torchvision import transforms as T

from data.color import apply_color
from data.datasets import MultiViewDataset, build_dataset
from data.demo import render_scene
from data.loader import EpochSampler, build_loader, collate, prefetch
from models import METHODS
from scripts.benchmark_table import Row, quartiles
from utils import distributed
from utils.batch import MEAN, STD, Batch
from utils.config import make_plan
from utils.device import choose_device, loader_workers
from utils.view_recipes import ViewRecipe

EPOCH_BATCHES = 1000  # in an epoch of a measured run, so that its schedules are those of a long run
MIN_SECONDS = 2.0  # over which each row is measured


def folder_dataset(args: argparse.Namespace, folder: Path, num_images: int = 1) -> MultiViewDataset:
    """Return the run's dataset over all images in `folder`, repeated until they are at least `num_images`."""
    location = {"dataset": "folder", "data_dir": str(folder)}
    dataset = build_dataset(argparse.Namespace(**vars(args) | location), METHODS[args.method].view_recipes(args))
    dataset.files = np.tile(dataset.files, -(-num_images // len(dataset)))
    return dataset


def data_loader(args: argparse.Namespace, folder: Path, workers: int) -> DataLoader:
    """Return the run's loader over the images in `folder`."""
    dataset = folder_dataset(args, folder, EPOCH_BATCHES * args.batch_size * args.accum_steps)
    plan = make_plan(args, len(dataset), distributed.world_size())
    return build_loader(dataset, EpochSampler(plan, 0, args.seed), workers, pin_memory=args.device == "cuda")


def rendered_batch(args: argparse.Namespace, size: int | None = None) -> Batch:
    """Return `size` rendered scenes (default: this rank's share of a batch) as workers send them, decoded."""
    size = size or args.batch_size // distributed.world_size()
    with TemporaryDirectory() as folder:
        for number in range(8):
            Image.fromarray(render_scene(0, "train", number)[0]).save(Path(folder, f"{number}.jpg"))
        dataset = folder_dataset(argparse.Namespace(**vars(args) | {"decode": "cpu"}), Path(folder), size)
        return collate([dataset[index] for index in range(size)])


def benchmark_loader(args: argparse.Namespace, options: argparse.Namespace, name: str) -> list[Row]:
    """Return rows for the parts of the work, in processor time on the CPU, and for the loader by its workers."""
    device, count = choose_device(args), options.images
    dataset, batch = folder_dataset(args, options.data_dir, count), rendered_batch(args, count).to(device)
    paths = [dataset.root / os.fsdecode(file) for file in dataset.files[:count]]
    parts = {
        "worker (decode, crop, resize)": lambda: [dataset[index] for index in range(count)],
        "decode": lambda: [Image.open(path).convert("RGB") for path in paths],
        "torchvision on Pillow images": lambda: [pillow_views(path, dataset.view_recipes) for path in paths],
        f"color augmentation on {device.type}": lambda: apply_color(batch),
    }
    clocks = dict.fromkeys(parts, time.process_time) | {"color augmentation on cuda": timer}
    rows = [{"part": name} | measure("part()", count, clocks[name], part=part) for name, part in parts.items()]
    for workers in options.workers or sorted({0, loader_workers(args.num_workers)}):
        data = prefetch(data_loader(args, options.data_dir, workers), device, dataset.view_recipes)
        batches_per_measurement = max(1, workers)  # the workers start together and deliver about together
        images = batches_per_measurement * args.batch_size
        cells = measure("for _ in range(n): next(data)", images, timer, n=batches_per_measurement, data=data)
        rows.append({"part": "loader and color augmentation", "workers": workers} | cells)
    return rows


def measure(statement: str, images: int, clock: Callable[[], float], **names: object) -> Row:
    """Return the time and the speed of a statement over `names` that processes `images` images."""
    threads = 1 if clock is time.process_time else torch.get_num_threads()
    statement_timer = Timer(statement, timer=clock, globals=names, num_threads=threads)
    seconds = np.array(statement_timer.blocked_autorange(min_run_time=MIN_SECONDS).times)
    return {"ms/image": quartiles(1000 * seconds / images), "images/s": quartiles(images / seconds)}


def pillow_views(path: Path, recipes: Sequence[ViewRecipe]) -> list[Tensor]:
    """Return the normalized views (3, S, S) of an image, by the transforms of the released SlotCon."""
    image, views = Image.open(path).convert("RGB"), []
    for recipe in recipes:
        color = recipe.color
        crop = T.RandomResizedCrop(recipe.size, recipe.scale, recipe.ratio, T.InterpolationMode.BICUBIC)
        jitter = T.RandomApply([T.ColorJitter(*color.jitter)], color.jitter_p)
        blur = partial(Image.Image.filter, filter=ImageFilter.GaussianBlur(random.uniform(*color.blur_sigma)))
        color_changes = [jitter, T.RandomGrayscale(color.gray_p), T.RandomApply([blur], color.blur_p)]
        finish = [T.RandomSolarize(128, color.solarize_p), T.ToTensor(), T.Normalize(MEAN, STD)]
        views.append(T.Compose([crop, T.RandomHorizontalFlip(recipe.flip_p), *color_changes, *finish])(image))
    return views
