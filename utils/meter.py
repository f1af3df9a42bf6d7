"""Averages between two reports, accumulated on the device and read once per report."""

import time
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from utils import distributed
from utils.batch import Batch
from utils.errors import UsageError

_MAX_BAD_STEPS = 10
"""Consecutive steps without a finite loss after which a run stops."""
_MAX_UNREADABLE_SHARE = 0.01
"""Share of unreadable images above which a run stops."""


class Monitor(Protocol):
    """Statistics of the outputs of a method that are not averages."""

    def update(self, outputs: list[dict[str, Tensor]]) -> None:
        """Take the outputs of the batches of one optimizer step, and remove what must not be averaged."""

    def compute(self) -> dict[str, Tensor]:
        """Return scalars to log, over all ranks."""

    def warnings(self, metrics: dict[str, float]) -> list[str]:
        """Return warnings for the user, given the metrics of a report."""


class Meter:
    """Average the outputs of a method and the timing of the loader between reports."""

    def __init__(self, device: torch.device, num_images: int, monitor: Monitor | None = None):
        self.device, self.num_images, self.monitor = device, num_images, monitor
        self.unreadable: list[str] = []
        """All files known to be unreadable, of any rank."""
        self._new_unreadable: set[str] = set()
        self._bad_steps = 0
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._flags: list[Tensor] = []
        self._steps, self._wait_seconds, self._images = 0, 0.0, 0
        self._start = time.monotonic()

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches, and measure the time spent waiting for them."""
        iterator = iter(batches)
        while True:
            start = time.monotonic()
            batch = next(iterator, None)
            self._wait_seconds += time.monotonic() - start
            if batch is None:
                return
            yield batch

    def record_batch(self, batch: Batch) -> None:
        """Count the images and the unreadable files of a batch."""
        self._images += len(batch.index)
        self._new_unreadable.update(set(batch.unreadable) - set(self.unreadable))

    @torch.no_grad()
    def record_step(
        self, outputs: list[dict[str, Tensor]], gradient_norm: Tensor, step_ok: Tensor, bad_ranks: Tensor
    ) -> None:
        """Accumulate an optimizer step: the outputs of its batches, and what `FiniteGuard.end_step` returned."""
        if self.monitor is not None:
            self.monitor.update(outputs)
        for name in outputs[0]:
            self._accumulate(name, torch.stack([output[name].detach().float() for output in outputs]).mean(), step_ok)
        # A gradient scaler skips steps whose gradients overflow.
        updated = step_ok * gradient_norm.isfinite()
        self._accumulate("optim/gradient_norm", gradient_norm, updated)
        self._flags += [bad_ranks, step_ok[None]]
        self._steps += 1

    def _accumulate(self, name: str, value: Tensor, step_ok: Tensor) -> None:
        """Add a value to its average where `step_ok` is 1; a method may leave out some of its outputs in some steps."""
        value = torch.where(step_ok > 0, value, 0)
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts[name] + step_ok if name in self._counts else step_ok

    def read(self, step: int) -> tuple[dict[str, float], list[str]]:
        """Read the averages over ranks since the last call, after `step` optimizer steps.

        Returns:
            The metrics by name, and messages for the user.

        Raises:
            UsageError: too many consecutive steps were not finite, or too many images are unreadable.
        """
        names, n = list(self._sums), len(self._sums)
        host = torch.tensor([self._images, self._wait_seconds, len(self._new_unreadable)], dtype=torch.float32)
        local = torch.cat([torch.stack(list(self._sums.values())), host.to(self.device, non_blocking=True)])
        total = distributed.all_reduce_sum(local)
        monitored = self.monitor.compute() if self.monitor is not None else {}
        values = torch.cat([total, torch.stack(list(self._counts.values())), *self._flags]).tolist()
        elapsed, ranks = time.monotonic() - self._start, distributed.world_size()

        sums, (images, wait_seconds, new_unreadable), values = values[:n], values[n : n + 3], values[n + 3 :]
        counts, flags = dict(zip(names, values[:n])), values[n:]
        messages = self._report_bad_steps(flags, step - self._steps, ranks)
        messages += self._exchange_unreadable() if new_unreadable else []
        metrics = {
            name: value / ranks / counts[name] if counts[name] else float("nan") for name, value in zip(names, sums)
        }
        if self.monitor is not None and monitored:
            metrics |= dict(zip(monitored, torch.stack(list(monitored.values())).tolist()))
            messages += self.monitor.warnings(metrics)
        metrics |= {
            "optim/skipped_steps": self._steps - counts["optim/gradient_norm"],
            "speed/images_per_second": images / elapsed,
            "speed/data_wait": wait_seconds / ranks / elapsed,
            "data/unreadable_images": len(self.unreadable),
        }
        self._reset()
        return metrics, messages

    def _report_bad_steps(self, flags: list[float], first_step: int, ranks: int) -> list[str]:
        messages = []
        for number in range(self._steps):
            *bad_ranks, step_ok = flags[number * (ranks + 1) :][: ranks + 1]
            self._bad_steps = 0 if step_ok else self._bad_steps + 1
            if step_ok:
                continue
            names = ", ".join(str(rank) for rank in range(ranks) if bad_ranks[rank])
            cause = f"the loss on rank {names}" if names else "the gradient"
            messages.append(f"step {first_step + number}: {cause} was not finite; step skipped")
            if self._bad_steps == _MAX_BAD_STEPS:
                raise UsageError(
                    f"step {first_step + number}: {cause} was not finite, the last of {_MAX_BAD_STEPS} such steps in "
                    "a row; resume from the last checkpoint with a lower --base-lr or another --amp"
                )
        return messages

    def _exchange_unreadable(self) -> list[str]:
        gathered = distributed.all_gather_object(sorted(self._new_unreadable))
        new = sorted({name for names in gathered for name in names})
        self.unreadable += new
        self._new_unreadable.clear()
        if len(self.unreadable) > _MAX_UNREADABLE_SHARE * self.num_images:
            raise UsageError(
                f"--data-dir: {len(self.unreadable)} of {self.num_images} images are unreadable, more than 1 %; "
                f"repair or remove {', '.join(self.unreadable)}"
            )
        return [f"unreadable, replaced by another image: {name}" for name in new]
