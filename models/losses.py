"""Losses: tensors in, scalar out, in float32 under mixed precision."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.precision import upcast

_BLOCK = 2**26
"""Largest number of query-key products in memory at a time, 256 MiB in float32."""
_MAX_BLOCKS = 16
"""Largest number of blocks; larger inputs get larger blocks, because the compiler unrolls the loop."""


def distillation(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float, valid: Tensor
) -> Tensor:
    """Compute the grouping loss of one direction (SlotCon, equation 4).

    `- sum_k softmax((teacher - center) / teacher_temp) log softmax(student / student_temp)`, averaged over positions
    and valid images; 0 if no image is valid.

    Args:
        student: (B, K, H, W) aligned scores, with gradient.
        teacher: (B, K, H, W) aligned scores of the same pixels.
        center: (1, K).
        student_temp: temperature of the softmax of the student.
        teacher_temp: temperature of the softmax of the teacher.
        valid: (B,) bool.
    """
    target = ((upcast(teacher.detach()) - center[:, :, None, None]) / teacher_temp).softmax(dim=1)
    log_probability = (upcast(student) / student_temp).log_softmax(dim=1)
    per_image = -(target * log_probability).sum(dim=1).mean(dim=(1, 2))
    return torch.where(valid, per_image, 0).sum() / valid.sum().clamp(min=1)


def slot_contrast(
    queries: Tensor, query_mask: Tensor, keys: Tensor, key_mask: Tensor, positives: Tensor, temperature: float
) -> Tensor:
    """Compute the slot contrast of one direction, InfoNCE times twice the temperature (SlotCon, equation 6).

    Args:
        queries: (N, D) with gradient, not normalized.
        query_mask: (N,) bool, the rows that are queries; the others are padding.
        keys: (M, D), not normalized.
        key_mask: (M,) bool, the rows that are keys; the others are padding.
        positives: (N,) int64, the row of the positive key of each query.
        temperature: of the softmax over the keys (tau).

    Returns:
        The mean over the queries; 0 if there are none.
    """
    query = F.normalize(upcast(queries), dim=1, eps=1e-12)
    key = F.normalize(upcast(keys.detach()), dim=1, eps=1e-12)
    with torch.autocast(queries.device.type, enabled=False):
        total = _InfoNCE.apply(query / temperature, query_mask, key, key_mask, positives)
    return 2 * temperature * total / query_mask.sum().clamp(min=1)


def aligned_cosine(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Compute the crop loss of GTSA (arXiv 2304.08014): the negative cosine of aligned cells.

    Args:
        student: (G, B, T, C, h, w) cells of G x T pairs of views, with gradient.
        teacher: (G, B, T, C, h, w) cells of the same pixels.
        valid: (G, B, T) bool, the pairs of views that have common pixels.

    Returns:
        (G, T), the mean over the cells of the valid images; 0 where no image is valid.
    """
    cosine = F.cosine_similarity(upcast(student), upcast(teacher.detach()), dim=3).mean(dim=(3, 4))
    return -torch.where(valid, cosine, 0).sum(dim=1) / valid.sum(dim=1).clamp(min=1)


def patch_correspondence(cosine: Tensor, num_matches: int) -> Tensor:
    """Compute the patch correspondence loss of GTSA (arXiv 2304.08014).

    Every patch is matched with its nearest neighbor among the patches of the other view. The `num_matches` best matches
    of each direction count with their negative cosines; the two directions are averaged.

    Args:
        cosine: (..., N, M) similarities of the N patches of one view with the M patches of another.
        num_matches: at most N and M.

    Returns:
        (...), one value for each pair of views and image.
    """
    best = [cosine.amax(dim=dim).topk(num_matches, dim=-1).values.mean(dim=-1) for dim in (-1, -2)]
    return -(best[0] + best[1]) / 2


class _InfoNCE(torch.autograd.Function):
    """The sum over queries of their cross-entropy with all keys, a block of queries at a time.

    The products of all queries and keys would be the largest tensor of a step, 12544 x 12544 for 256 images. Here a
    block of them is held at a time, and the gradient is computed in the forward, while the block is there.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, query_mask: Tensor, key: Tensor, key_mask: Tensor, positives: Tensor
    ) -> Tensor:
        gradient, total = [], query.new_zeros(())
        rows = max(1, _BLOCK // len(key), -(-len(query) // _MAX_BLOCKS))
        for q, mask, positive in zip(query.split(rows), query_mask.split(rows), positives.split(rows)):
            logits = (q @ key.T).masked_fill(~key_mask, -torch.inf)
            log_sum = logits.logsumexp(dim=1, keepdim=True)
            loss = log_sum - logits.gather(1, positive[:, None])
            total = total + torch.where(mask[:, None], loss, 0).sum()
            block_gradient = (logits - log_sum).exp() @ key - key[positive]
            gradient.append(torch.where(mask[:, None], block_gradient, 0))
        ctx.save_for_backward(torch.cat(gradient))
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None, None, None, None
