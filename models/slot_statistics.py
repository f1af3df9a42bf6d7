"""Statistics of the slots of a run, and warnings when they collapse."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.grouping import occupied
from models.precision import upcast
from utils import distributed

POSITIONS = "slots/positions"
"""The output (K,) of `slot_statistics` that `SlotMonitor` takes: the number of positions assigned to each prototype."""

_LARGEST = 0.95
"""Share of all positions in one slot above which the run is reported as collapsed."""
_UNIFORM = 0.995
"""Entropy of the assignment, as a fraction of ln K, above which the run is reported as collapsed."""
_FEW_USED = 0.1
"""Share of used prototypes below which a report warns."""


@torch.no_grad()
def slot_statistics(
    student: list[Tensor], teacher: list[Tensor], prototypes: Tensor, center: Tensor, temperature: float
) -> dict[str, Tensor]:
    """Compute slot statistics of one batch on this GPU, without gradient or host reads.

    Args:
        student: scores (B, K, H, W) of the two views.
        teacher: the same of the teacher.
        prototypes: (K, D) of the teacher.
        center: (1, K), center of the teacher's scores.
        temperature: of the teacher's softmax.

    Returns:
        `slots/per_image`, the mean number of occupied slots; `slots/positives`, the number of slots that are occupied
        in both the student's view and the teacher's other view; `slots/assignment_entropy`, the mean entropy of the
        teacher's soft assignment as a fraction of ln K (1 is uniform); `slots/prototype_norm`, the mean length;
        `slots/prototype_spread`, 1 minus the mean cosine of two prototypes; and `slots/positions` (K,).
    """
    slots = [occupied(scores) for scores in teacher]
    shared = sum((occupied(student[a]) & slots[b]).sum() for a, b in ((0, 1), (1, 0)))
    count = prototypes.shape[0]
    unit = F.normalize(upcast(prototypes), dim=1)
    pairs = count * (count - 1)
    mean_cosine = (unit.sum(dim=0).square().sum() - count) / max(pairs, 1)
    assignment = torch.cat([scores.argmax(dim=1).flatten() for scores in teacher])
    positions = torch.zeros(count, device=center.device)
    return {
        "slots/per_image": torch.cat(slots).float().sum(dim=1).mean(),
        "slots/positives": torch.as_tensor(shared, dtype=torch.float32),
        "slots/assignment_entropy": torch.stack([_entropy(scores, center, temperature) for scores in teacher]).mean(),
        "slots/prototype_norm": upcast(prototypes).norm(dim=1).mean(),
        "slots/prototype_spread": 1 - mean_cosine,
        POSITIONS: positions.index_add(0, assignment, torch.ones_like(assignment).float()),
    }


def _entropy(scores: Tensor, center: Tensor, temperature: float) -> Tensor:
    """Return the mean entropy of `softmax_k((s - c) / temperature)` over images and positions, over ln K."""
    logs = ((upcast(scores) - center[:, :, None, None]) / temperature).log_softmax(dim=1)
    return -(logs.exp() * logs).sum(dim=1).mean() / math.log(max(scores.shape[1], 2))


class SlotMonitor:
    """Track the use of the prototypes over an epoch, and warn of collapse (a `utils.meter.Monitor`)."""

    def __init__(self, steps_per_epoch: int):
        self.window, self.steps = steps_per_epoch, 0
        self._last_used: Tensor | None = None
        self._positions: Tensor | None = None
        self._last_warned: dict[str, int] = {}

    def update(self, outputs: list[dict[str, Tensor]]) -> None:
        """Take `slots/positions` out of the outputs of the batches of one optimizer step."""
        positions = torch.stack([output.pop(POSITIONS) for output in outputs]).sum(dim=0)
        if self._last_used is None or self._positions is None:
            self._last_used, self._positions = torch.full_like(positions, -self.window), torch.zeros_like(positions)
        self._last_used = torch.where(positions > 0, self.steps, self._last_used)
        self._positions = self._positions + positions
        self.steps += 1

    def compute(self) -> dict[str, Tensor]:
        """Compute over all ranks, on the device.

        Returns:
            `slots/prototypes_used`, the share of the prototypes that had the highest score at some position in the last
            epoch on any GPU, and `slots/largest`, the share of the positions since the last call that are assigned to
            the largest slot.
        """
        if self._last_used is None or self._positions is None:
            return {}
        last_used = distributed.all_gather(self._last_used[None]).amax(dim=0)
        positions = distributed.all_reduce_sum(self._positions)
        self._positions = torch.zeros_like(self._positions)
        return {
            "slots/prototypes_used": (last_used >= self.steps - self.window).float().mean(),
            "slots/largest": positions.max() / positions.sum().clamp(min=1),
        }

    def warnings(self, metrics: dict[str, float]) -> list[str]:
        """Return warnings about the metrics of a report, each at most once an epoch and none in the first epoch."""
        if self.steps < self.window or self._positions is None:
            return []
        prototypes = len(self._positions)
        largest, used = metrics["slots/largest"], metrics["slots/prototypes_used"]
        entropy = metrics["slots/assignment_entropy"]
        messages = {
            "one slot": f"collapse: one slot has {100 * largest:.0f} % of all positions; try a higher --teacher-temp, "
            "a lower --center-momentum or a lower --base-lr",
            "uniform": f"collapse: the teacher's assignment is uniform (entropy {entropy:.4f} ln K); try a lower "
            "--teacher-temp",
            "unused": f"only {round(used * prototypes)} of {prototypes} prototypes were used in the last epoch; try "
            "fewer --num-prototypes or a higher --teacher-temp",
            "no positives": "no slot occurs in both views of an image; try a larger --min-scale, which makes the "
            "views overlap more",
        }
        active = {
            "one slot": largest > _LARGEST,
            "uniform": entropy > _UNIFORM,
            "unused": used < _FEW_USED,
            "no positives": metrics["slots/positives"] == 0,
        }
        due = [
            kind
            for kind, is_active in active.items()
            if is_active and self.steps - self._last_warned.get(kind, -self.window) >= self.window
        ]
        self._last_warned |= dict.fromkeys(due, self.steps)
        return [messages[kind] for kind in due]
