"""A run whose optimizer steps are taken and timed in blocks; the plain run that it is compared with."""

import argparse
import itertools
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from PIL import Image

import main_pretrain
from data.datasets import Sample
from data.loader import collate
from data.loader import prefetch
from data.demo import render_scene
from data.views import ViewRecipe, make_views, slotcon_views
from utils.batch import Batch
from utils.benchmark.configurations import BATCHES
from utils.device import choose_device
from utils.finite import FiniteGuard
from utils.meter import Meter

_SCENES = 8


class Block(NamedTuple):
    """What a block of steps took."""

    seconds: float
    """Of one step, on average."""
    data_wait: float
    """Share of the time that the host waited for data, as a run's log has it."""


class Stepper:
    """A run as `main_pretrain.train` has it, whose steps are taken when asked for; fed from memory at first."""

    def __init__(self, args: argparse.Namespace, batch: Batch, images: int | None = None):
        """Of so many images; left out, as many as give an epoch `BATCHES` batches."""
        self.device = choose_device(args)
        images = BATCHES * args.batch_size * args.accum_steps if images is None else images
        self.run = main_pretrain.build_run(args, self.device, images)
        self._guard = FiniteGuard(self.run.method, self.device)
        self._meter = Meter(self.device, images, self.run.plan.steps_per_epoch)
        self.taken = 0
        """Steps so far."""
        self.feed_from_memory(batch)

    def feed_from_memory(self, batch: Batch) -> None:
        """This batch from now on, copied and colored anew for each step."""
        self.feed(itertools.repeat(batch.pin_memory() if self.device.type == "cuda" else batch))

    def feed(self, batches: Iterable[Batch], recipes: Sequence[ViewRecipe] = ()) -> None:
        """These batches from now on, as the workers send them; views of these recipes are cut from their sources."""
        self._batches = prefetch(self._meter.timed(batches), self.device, recipes)

    def take(self, steps: int) -> Block:
        """So many steps back to back; the host waits for the device before the first and after the last alone."""
        wait_for(self.device)
        began = time.perf_counter()
        for _ in range(steps):
            main_pretrain.optimize(self.run, self.run.method, self._batches, self._guard, self._meter, self.taken)
            self.taken += 1
        wait_for(self.device)
        seconds = time.perf_counter() - began
        metrics, _notes = self._meter.read(self.taken)
        return Block(seconds / steps, metrics["data_wait"])


def reference_stepper(args: argparse.Namespace, batch: Batch) -> Stepper:
    """The same run the plain way: eager, all activations kept, maps in the layout NCHW."""
    plain = {"compile": False, "cuda_graphs": False, "activation_budget": 1.0}
    stepper = Stepper(argparse.Namespace(**{**vars(args), **plain}), batch)
    stepper.run.method.to(memory_format=torch.contiguous_format)
    return stepper


def memory_batch(args: argparse.Namespace) -> Batch:
    """A batch as the workers send it, of views of a few scenes."""
    scenes = [Image.fromarray(render_scene(0, "train", number)[0]) for number in range(_SCENES)]
    recipes = slotcon_views(args.image_size, args.min_scale)
    numbers = range(args.batch_size)
    samples = [Sample(*make_views(scenes[n % _SCENES], recipes, 0, 0, n), index=n, unreadable=()) for n in numbers]
    return collate(samples)


def wait_for(device: torch.device) -> None:
    """Until all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
