"""Slot-level feature augmentation: each slot's features scaled and shifted at random."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from utils.distributed import all_reduce_sum


class Chance(NamedTuple):
    """What one view of a step draws: factors and shifts (K, D), and a lot in 0..1 for each slot (K,)."""

    alpha: Tensor
    beta: Tensor
    lots: Tensor


class SlotAugmentation(nn.Module):
    """`alpha_k x + beta_k` at every position that belongs to slot k (SlotFA's object-aware augmentation).

    `alpha_k ~ N(1, sigma_scale)` and `beta_k ~ N(0, sigma_shift)` are vectors as wide as the features, drawn for each
    of K slots from (seed, step, view) alone, so that all ranks draw the same and no other chance is disturbed.
    """

    def __init__(self, num_slots: int, dim: int, sigma_scale: float, sigma_shift: float, ratio: float = 1.0):
        """With `ratio` below 1, that share of the slots that occur in the view's batch over all ranks is augmented."""
        super().__init__()
        self.shape = (num_slots, dim)
        self.sigma_scale, self.sigma_shift, self.ratio = sigma_scale, sigma_shift, ratio

    def forward(self, features: Tensor, assignment: Tensor, chance: Chance) -> Tensor:
        """Features (B, D, H, W), the slot of each position (B, H, W) int64, and what was drawn -> the augmented map."""
        alpha, beta = self.factors(assignment, chance)
        scale, shift = torch.cat([alpha, beta], dim=1)[assignment].movedim(-1, 1).chunk(2, dim=1)
        return torch.addcmul(shift, scale, features.to(scale.dtype))

    def chance(self, seed: int, step: int, view: int, device: torch.device) -> Chance:
        """What a view of this step draws."""
        generator = torch.Generator(device)
        generator.manual_seed(int(np.random.SeedSequence([seed, step, view]).generate_state(1, np.uint64)[0]))
        alpha = torch.randn(self.shape, generator=generator, device=device).mul_(self.sigma_scale).add_(1)
        beta = torch.randn(self.shape, generator=generator, device=device).mul_(self.sigma_shift)
        return Chance(alpha, beta, torch.rand(self.shape[0], generator=generator, device=device))

    @torch.no_grad()
    def factors(self, assignment: Tensor, chance: Chance) -> tuple[Tensor, Tensor]:
        """Alpha and beta of every slot, (K, D) each: 1 and 0 for the slots that are left as they are."""
        if self.ratio == 1:
            return chance.alpha, chance.beta
        chosen = self._choose(assignment, chance.lots)[:, None]
        return torch.where(chosen, chance.alpha, 1), torch.where(chosen, chance.beta, 0)

    def _choose(self, assignment: Tensor, lots: Tensor) -> Tensor:
        """The `floor(ratio n)` of the n slots that occur on any rank whose lots (K,) are lowest: (K,) bool."""
        here = torch.zeros_like(lots).scatter(0, assignment.flatten(), 1.0)
        occupied = all_reduce_sum(here) > 0
        place = torch.where(occupied, lots, 2.0).argsort().argsort()  # each slot's place in the order of the lots
        return occupied & (place < (occupied.sum().double() * self.ratio).floor())
