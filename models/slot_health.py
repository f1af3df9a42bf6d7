"""What a step tells about the slots' health: measures on the device, without gradient."""

import math

import torch
from torch import Tensor

from models.grouping import occupied


@torch.no_grad()
def slot_health(
    student: list[Tensor], teacher: list[Tensor], prototypes: Tensor, center: Tensor, temperature: float
) -> dict[str, Tensor]:
    """Measures of one batch on this GPU.

    Args:
        student: scores (B, K, H, W) of the two views.
        teacher: the same.
        prototypes: (K, D), the teacher's.
        center: (1, K) center of the teacher's scores.
        temperature: of the teacher's soft-max.

    Returns:
        `slots_per_image`; `positives`, slots that both networks find in their view of an image, over both directions;
        `assignment_entropy`, of a position's soft assignment as a share of ln K (1 is uniform); `prototype_norm`;
        `prototype_spread`, 1 less the mean cosine of two prototypes; and `slot_positions` (K,), how many positions
        each prototype wins.
    """
    slots = [occupied(scores) for scores in teacher]
    shared = sum((occupied(student[a]) & slots[b]).sum() for a, b in ((0, 1), (1, 0)))
    count = prototypes.shape[0]
    unit = torch.nn.functional.normalize(prototypes.float(), dim=1)
    pairs = count * (count - 1)
    mean_cosine = (unit.sum(dim=0).square().sum() - count) / max(pairs, 1)
    winners = torch.cat([scores.argmax(dim=1).flatten() for scores in teacher])
    return {
        "slots_per_image": torch.cat(slots).float().sum(dim=1).mean(),
        "positives": torch.as_tensor(shared, dtype=torch.float32),
        "assignment_entropy": torch.stack([_entropy(scores, center, temperature) for scores in teacher]).mean(),
        "prototype_norm": prototypes.float().norm(dim=1).mean(),
        "prototype_spread": 1 - mean_cosine,
        "slot_positions": torch.zeros(count, device=center.device).index_add(
            0, winners, torch.ones_like(winners).float()
        ),
    }


def _entropy(scores: Tensor, center: Tensor, temperature: float) -> Tensor:
    """Mean over images and positions of the entropy of `softmax_k((s - c) / temperature)`, as a share of ln K."""
    logs = ((scores.float() - center[:, :, None, None]) / temperature).log_softmax(dim=1)
    return -(logs.exp() * logs).sum(dim=1).mean() / math.log(max(scores.shape[1], 2))
