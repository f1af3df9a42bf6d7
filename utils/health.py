"""Watches over epochs whether a run's slots are healthy, and says what to do when they are not."""

import torch
from torch import Tensor

from utils import distributed

_LARGEST = 0.95  # share of the positions in one slot
_UNIFORM = 0.995  # entropy of the assignment, as a share of ln K
_USED = 0.1  # share of the prototypes


class SlotHealth:
    """Which prototypes were used in the last epoch, and what a report has to warn of."""

    def __init__(self, steps_per_epoch: int):
        self.window, self.steps = steps_per_epoch, 0
        self._last_used: Tensor | None = None
        self._positions: Tensor | None = None
        self._warned: dict[str, int] = {}

    def add(self, positions: Tensor) -> None:
        """One optimizer step: how many positions (K,) each prototype won on this GPU."""
        if self._last_used is None or self._positions is None:
            self._last_used, self._positions = torch.full_like(positions, -self.window), torch.zeros_like(positions)
        self._last_used = torch.where(positions > 0, self.steps, self._last_used)
        self._positions = self._positions + positions
        self.steps += 1

    def read(self) -> Tensor:
        """On the device: the share of the prototypes used in the last epoch on any GPU, and the largest slot's share.

        (2,); empty for a method without slots. The latter is over the steps since the last call.
        """
        if self._last_used is None or self._positions is None:
            return torch.zeros(0)
        last = distributed.all_gather(self._last_used[None]).amax(dim=0)
        positions = distributed.all_reduce_sum(self._positions)
        self._positions = torch.zeros_like(self._positions)
        used = (last >= self.steps - self.window).float().mean()
        return torch.stack([used, positions.max() / positions.sum().clamp(min=1)])

    def warnings(self, metrics: dict[str, float]) -> list[str]:
        """What is wrong by a report's averages, each once an epoch; nothing before a whole epoch was seen."""
        if self.steps < self.window or self._positions is None:
            return []
        prototypes = len(self._positions)
        share, used = metrics["largest_slot"], metrics["prototypes_used"]
        found = {
            "one slot": share > _LARGEST,
            "uniform": metrics["assignment_entropy"] > _UNIFORM,
            "unused": used < _USED,
            "no positives": metrics["positives"] == 0,
        }
        said = {
            "one slot": f"collapse: one slot has {100 * share:.0f} % of all positions; a higher --teacher-temp, a "
            "lower --center-momentum or a lower --base-lr spreads them",
            "uniform": f"collapse: the teacher's assignment is uniform (entropy {metrics['assignment_entropy']:.4f} "
            "ln K); a lower --teacher-temp sharpens it",
            "unused": f"{round(used * prototypes)} of {prototypes} prototypes were used in the last epoch; fewer "
            "--num-prototypes or a higher --teacher-temp share them out",
            "no positives": "no slot is found in both views of an image, so the slot contrast learns nothing; a larger "
            "--min-scale makes views overlap more",
        }
        since = {kind: self.steps - self._warned.get(kind, -self.window) for kind in found}
        new = [kind for kind, wrong in found.items() if wrong and since[kind] >= self.window]
        self._warned |= dict.fromkeys(new, self.steps)
        return [said[kind] for kind in new]
