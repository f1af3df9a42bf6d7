"""Keep the images with the highest scores."""

import torch
from torch import Tensor


class NearestImages:
    """The k highest-scoring images of each of Q queries, such as prototypes, in memory for Q x k entries.

    Ties go to the lower image index, so that the order of the updates does not matter.
    """

    def __init__(self, num_queries: int, k: int, device: torch.device | str = "cpu"):
        self.scores = torch.full((num_queries, k), -torch.inf, device=device)
        """(Q, k) descending; -inf where there are fewer than k images."""
        self.indices = torch.full((num_queries, k), -1, device=device)
        """(Q, k) image indices; -1 where there are fewer than k images."""

    def update(self, indices: Tensor, scores: Tensor) -> None:
        """Add the images `indices` (B,) with scores (B, Q), -inf where an image is no candidate for a query."""
        indices = indices.to(self.indices.device).expand(len(self.indices), -1)
        indices, by_index = torch.cat([self.indices, indices], dim=1).sort(dim=1, stable=True)
        candidates = torch.cat([self.scores, scores.T], dim=1).gather(1, by_index)
        ranked, by_score = candidates.sort(dim=1, descending=True, stable=True)
        k = self.scores.shape[1]
        self.scores = ranked[:, :k].clone()
        self.indices = indices.gather(1, by_score[:, :k]).masked_fill(self.scores.isneginf(), -1)

    def ranking(self, query: int) -> list[tuple[int, float]]:
        """Return at most k pairs of image index and score, best first."""
        indices, scores = self.indices[query].tolist(), self.scores[query].tolist()
        return [(index, score) for index, score in zip(indices, scores) if index >= 0]
