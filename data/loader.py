"""Batches: which images each rank sees at each step, by workers, from any step on."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from data.datasets import Sample, SceneDataset, build_dataset
from data.decode import pack
from utils import distributed
from utils.batch import Batch
from utils.config import Plan

__all__ = ["Batch", "EpochSampler", "build_dataset", "build_loader", "collate"]


class EpochSampler(Sampler[list[int]]):
    """This rank's share of every batch of a run, from any step on.

    Each epoch is a permutation of the images drawn from (seed, epoch); images that fill no whole batch wait for
    another epoch. The batches do not depend on the number of ranks, workers or restarts.
    """

    def __init__(self, plan: Plan, start: int, seed: int):
        """From optimizer step `start` to the end of the plan."""
        self.images, self.batch_size, self.seed = plan.images, plan.batch_size, seed
        self.batches_per_epoch = plan.steps_per_epoch * plan.accum_steps
        self.start, self.stop = start * plan.accum_steps, plan.total_steps * plan.accum_steps

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch_size // distributed.world_size()
        offset = share * distributed.rank()
        order, order_epoch = np.empty(0, dtype=np.int64), -1
        for number in range(self.start, self.stop):
            epoch, batch = divmod(number, self.batches_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = np.random.default_rng([self.seed, epoch]).permutation(self.images), epoch
            first = batch * self.batch_size + offset
            yield (order[first : first + share] + epoch * self.images).tolist()


def collate(samples: list[Sample]) -> Batch:
    """Samples of B images -> a batch on the CPU, views uint8 or not yet cut, color not yet applied."""
    sources = [sample.source for sample in samples if sample.source is not None]
    return Batch(
        views=[torch.stack(view) for view in zip(*(sample.views for sample in samples))],
        crops=torch.stack([sample.crops for sample in samples]),
        flips=torch.stack([sample.flips for sample in samples]),
        turns=torch.stack([sample.turns for sample in samples]),
        index=torch.tensor([sample.index for sample in samples]),
        color=torch.stack([sample.color for sample in samples]),
        unreadable=tuple(name for sample in samples for name in sample.unreadable),
        sources=pack(sources) if sources else None,
    )


def build_loader(dataset: SceneDataset, sampler: EpochSampler, num_workers: int, pin_memory: bool) -> DataLoader:
    """A loader of `Batch`; the workers run on over the ends of epochs."""
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
    )
