"""Averages between two reports, kept on the device and read once."""

import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from utils import distributed
from utils.batch import Batch
from utils.errors import UsageError
from models.slot_health import SlotHealth

_STREAK = 10  # non-finite steps in a row that stop a run
_UNREADABLE = 0.01  # share of the images that may be unreadable


class Meter:
    """Sums a method's outputs, watches the data, and reads the device once a report."""

    def __init__(self, device: torch.device, images: int, steps_per_epoch: int):
        self.device, self.images = device, images
        self.health = SlotHealth(steps_per_epoch)
        self.unreadable: list[str] = []
        """All files known to be unreadable, on any rank."""
        self._new: set[str] = set()
        self._streak = 0
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counted = torch.zeros((), device=self.device)
        self._bad: list[Tensor] = []
        self._steps, self._waited, self._seen = 0, 0.0, 0
        self._since = time.monotonic()

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches; how long they let one wait counts as waiting for data."""
        remaining = iter(batches)
        while True:
            began = time.monotonic()
            batch = next(remaining, None)
            self._waited += time.monotonic() - began
            if batch is None:
                return
            yield batch

    def saw(self, batch: Batch) -> None:
        """A batch that is worked on."""
        self._seen += len(batch.index)
        self._new.update(set(batch.unreadable) - set(self.unreadable))

    @torch.no_grad()
    def add(self, outputs: list[dict[str, Tensor]], gradient_norm: Tensor, go: Tensor, bad: Tensor) -> None:
        """One optimizer step: the outputs of its batches, its gradient's norm, and what `FiniteGuard` says of it."""
        if "slot_positions" in outputs[0]:
            self.health.add(torch.stack([output.pop("slot_positions") for output in outputs]).sum(dim=0))
        for name in outputs[0]:
            self._sum(name, torch.stack([output[name].detach().float() for output in outputs]).mean(), go)
        self._sum("gradient_norm", gradient_norm, go)
        self._counted = self._counted + go
        self._bad += [bad, go[None]]
        self._steps += 1

    def _sum(self, name: str, value: Tensor, go: Tensor) -> None:
        kept = torch.where(go > 0, value, 0)
        self._sums[name] = self._sums[name] + kept if name in self._sums else kept

    def read(self, step: int) -> tuple[dict[str, float], list[str]]:
        """Averages over ranks since the last call, after `step` optimizer steps, and what a user has to know.

        Raises:
            UsageError: too many non-finite steps in a row, or too many unreadable images.
        """
        names = list(self._sums)
        host = torch.tensor([self._seen, self._waited, len(self._new)], dtype=torch.float32)
        local = torch.cat([torch.stack(list(self._sums.values())), host.to(self.device, non_blocking=True)])
        total = distributed.all_reduce_sum(local)
        slots = self.health.read()
        values = torch.cat([total, self._counted[None], *self._bad]).tolist()
        elapsed, ranks = time.monotonic() - self._since, distributed.world_size()

        sums, (seen, waited, new, counted) = values[: len(names)], values[len(names) : len(names) + 4]
        flags = values[len(names) + 4 :]
        notes = self._non_finite(flags, step - self._steps, ranks) + (self._exchange_unreadable() if new else [])
        metrics = {name: value / ranks / counted if counted else float("nan") for name, value in zip(names, sums)}
        if len(slots):
            metrics |= dict(zip(("prototypes_used", "largest_slot"), slots.tolist()))
            notes += self.health.warnings(metrics)
        metrics |= {"images_per_second": seen / elapsed, "data_wait": waited / ranks / elapsed}
        metrics |= {"skipped_steps": self._steps - counted, "unreadable_images": len(self.unreadable)}
        self._reset()
        return metrics, notes

    def _non_finite(self, flags: list[float], first: int, ranks: int) -> list[str]:
        notes = []
        for number in range(self._steps):
            *bad, go = flags[number * (ranks + 1) :][: ranks + 1]
            self._streak = 0 if go else self._streak + 1
            if go:
                continue
            ranks_with = ", ".join(str(rank) for rank in range(ranks) if bad[rank])
            what = f"the loss on rank {ranks_with}" if ranks_with else "the gradient"
            notes.append(f"step {first + number}: {what} was not finite; step left out")
            if self._streak == _STREAK:
                raise UsageError(
                    f"step {first + number}: {what} was not finite, the last of {_STREAK} such steps in a row; "
                    "go on from the last checkpoint with a lower --base-lr or another --amp"
                )
        return notes

    def _exchange_unreadable(self) -> list[str]:
        new = sorted({name for names in distributed.all_gather_object(sorted(self._new)) for name in names})
        self.unreadable += new
        self._new.clear()
        if len(self.unreadable) > _UNREADABLE * self.images:
            raise UsageError(
                f"--data-dir: {len(self.unreadable)} of {self.images} images cannot be read, more than 1 %; "
                f"mend or remove {', '.join(self.unreadable)}"
            )
        return [f"cannot be read, another image takes its place: {name}" for name in new]
