"""The losses: tensors in, scalar out, in float32 whatever the precision of the networks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 2**26
"""Products of queries and keys that are held at a time: 256 MiB,"""
_MOST_BLOCKS = 16
"""and more where that would be more blocks than a compiler should unroll."""


def distillation(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float, valid: Tensor
) -> Tensor:
    """Grouping loss of one direction (SlotCon, equation 4).

    `- sum_k softmax((teacher - center) / teacher_temp) log softmax(student / student_temp)`, mean over
    positions and over the images that count; 0 if none does.

    Args:
        student: (B, K, H, W) aligned scores, with gradient.
        teacher: (B, K, H, W) aligned scores of the same pixels.
        center: (1, K).
        student_temp: temperature of the student's soft-max.
        teacher_temp: temperature of the teacher's soft-max.
        valid: (B,) bool, the images that count.
    """
    target = ((teacher.detach().float() - center[:, :, None, None]) / teacher_temp).softmax(dim=1)
    log_probability = (student.float() / student_temp).log_softmax(dim=1)
    per_image = -(target * log_probability).sum(dim=1).mean(dim=(1, 2))
    return torch.where(valid, per_image, 0).sum() / valid.sum().clamp(min=1)


def slot_contrast(queries: Tensor, keys: Tensor, positives: Tensor, temperature: float) -> Tensor:
    """InfoNCE between slots, times twice the temperature, of one direction (SlotCon, equation 6).

    Args:
        queries: (N, D) with gradient, not normalized; a row of zeros is padding and does not count.
        keys: (M, D), not normalized; a row of zeros is padding and is nobody's negative.
        positives: (N,) int64, each query's own key.
        temperature: tau.

    Returns:
        Mean over the queries that count; 0 if there is none.
    """
    counts = queries.ne(0).any(dim=1)
    there = keys.ne(0).any(dim=1)
    query = F.normalize(queries.float(), dim=1, eps=1e-12)
    key = F.normalize(keys.detach().float(), dim=1, eps=1e-12)
    with torch.autocast(queries.device.type, enabled=False):
        total = _InfoNCE.apply(query / temperature, key, positives, counts, there)
    return 2 * temperature * total / counts.sum().clamp(min=1)


class _InfoNCE(torch.autograd.Function):
    """Sum over queries of the cross-entropy of their products with all keys, a block of queries at a time.

    The products of all queries with all keys would be the largest tensor of a step: 12544 x 12544 at 256 images. Here
    they live for one block, and the gradient is made on the way forward, while they are there.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, positives: Tensor, counts: Tensor, there: Tensor) -> Tensor:
        gradient, total = [], query.new_zeros(())
        rows = max(1, _BLOCK // len(key), -(-len(query) // _MOST_BLOCKS))
        for q, positive, count in zip(query.split(rows), positives.split(rows), counts.split(rows)):
            logits = (q @ key.T).masked_fill(~there, -torch.inf)
            log_sum = logits.logsumexp(dim=1, keepdim=True)
            loss = log_sum - logits.gather(1, positive[:, None])
            total = total + torch.where(count[:, None], loss, 0).sum()
            slope = (logits - log_sum).exp() @ key - key[positive]
            gradient.append(torch.where(count[:, None], slope, 0))
        ctx.save_for_backward(torch.cat(gradient))
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None, None, None, None
