"""Batches of a run: which images each rank sees at each step, loaded by workers and prefetched to the device."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from data.color import apply_color
from data.datasets import MultiViewDataset, Sample, build_dataset
from data.decode import decode_views, pack
from utils import distributed
from utils.batch import Batch, stack_records
from utils.config import TrainingPlan
from utils.view_recipes import ViewRecipe

__all__ = ["Batch", "EpochSampler", "build_dataset", "build_loader", "collate", "prefetch"]


class EpochSampler(Sampler[list[int]]):
    """Yield the share of this rank of every batch of a run, from any step on.

    Each epoch is a permutation of the images drawn from (seed, epoch); the images of an incomplete last batch are
    dropped. The batches do not depend on the number of ranks, workers or restarts.
    """

    def __init__(self, plan: TrainingPlan, start_step: int, seed: int):
        """Start at optimizer step `start_step` and stop at the end of the plan."""
        self.num_images, self.batch_size, self.seed = plan.num_images, plan.batch_size, seed
        self.batches_per_epoch = plan.steps_per_epoch * plan.accum_steps
        self.start, self.stop = start_step * plan.accum_steps, plan.total_steps * plan.accum_steps

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch_size // distributed.world_size()
        offset = share * distributed.rank()
        order, order_epoch = np.empty(0, dtype=np.int64), -1
        for number in range(self.start, self.stop):
            epoch, batch = divmod(number, self.batches_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = np.random.default_rng([self.seed, epoch]).permutation(self.num_images), epoch
            first = batch * self.batch_size + offset
            yield (order[first : first + share] + epoch * self.num_images).tolist()


def collate(samples: list[Sample]) -> Batch:
    """Stack the samples of B images into a batch on the CPU; views are uint8, or not yet decoded."""
    encoded = [sample.encoded for sample in samples if sample.encoded is not None]
    return Batch(
        **stack_records(samples),
        unreadable=tuple(name for sample in samples for name in sample.unreadable),
        encoded=pack(encoded) if encoded else None,
    )


def build_loader(dataset: MultiViewDataset, sampler: EpochSampler, num_workers: int, pin_memory: bool) -> DataLoader:
    """Build a loader of `Batch`, whose workers live for the whole run."""
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
    )


def prefetch(batches: Iterable[Batch], device: torch.device, recipes: Sequence[ViewRecipe] = ()) -> Iterator[Batch]:
    """Copy batches from the workers to `device`, and color their views there.

    On a GPU the next batch is prepared on a side stream while the current one is used; the host waits for neither,
    except for a decoder on the GPU.

    Args:
        batches: with uint8 views, or with encoded images for `data.decode`.
        device: the device of the method.
        recipes: the recipes of the views that are decoded on the device.
    """
    if device.type == "cpu":
        for batch in batches:
            yield apply_color(decode_views(batch, recipes, device))
        return
    prepared = _prepare_on_side_stream(batches, device, recipes)
    next_batch = next(prepared, None)
    while next_batch is not None:
        batch, ready = next_batch
        next_batch = next(prepared, None)
        stream = torch.cuda.current_stream(device)
        stream.wait_event(ready)
        batch.record_stream(stream)
        yield batch


def _prepare_on_side_stream(
    batches: Iterable[Batch], device: torch.device, recipes: Sequence[ViewRecipe]
) -> Iterator[tuple[Batch, torch.cuda.Event]]:
    stream = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(stream):
            batch = apply_color(decode_views(batch, recipes, device).to(device))
            ready = stream.record_event()
        yield batch, ready
