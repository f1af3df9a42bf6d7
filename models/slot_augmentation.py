"""Slot-level feature augmentation (SlotFA): random scale and shift of the features of each slot."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.precision import upcast
from utils.distributed import all_reduce_sum
from utils.seeds import derive_seed


class AugmentationNoise(NamedTuple):
    """The random numbers of one view and step: scales and shifts (K, D), and a random number in 0..1 of each slot (K,).

    With a ratio below 1, the slots with the lowest `slot_priority` are augmented.
    """

    alpha: Tensor
    beta: Tensor
    slot_priority: Tensor


class SlotAugmentation(nn.Module):
    """Compute `alpha_k x + beta_k` at every position that is assigned to slot k (the object-aware augmentation).

    `alpha_k ~ N(1, sigma_scale)` and `beta_k ~ N(0, sigma_shift)` are vectors of the width of the features, drawn for
    each of K slots from (seed, step, view) alone, so that all ranks draw the same.
    """

    def __init__(self, num_slots: int, dim: int, sigma_scale: float, sigma_shift: float, ratio: float = 1.0):
        """With `ratio` below 1, that share of the slots occupied in the global batch of a view is augmented."""
        super().__init__()
        self.shape = (num_slots, dim)
        self.sigma_scale, self.sigma_shift, self.ratio = sigma_scale, sigma_shift, ratio

    def forward(self, features: Tensor, assignment: Tensor, noise: AugmentationNoise) -> Tensor:
        """Augment features (B, D, H, W), given the slot of each position (B, H, W) int64."""
        alpha, beta = self.scale_and_shift(assignment, noise)
        scale, shift = torch.cat([alpha, beta], dim=1)[assignment].movedim(-1, 1).chunk(2, dim=1)
        return torch.addcmul(shift, scale, upcast(features))

    def draw_noise(self, seed: int, step: int, view: int, device: torch.device) -> AugmentationNoise:
        """Draw the noise of a view of a step."""
        generator = torch.Generator(device)
        generator.manual_seed(derive_seed(seed, step, view))
        alpha = torch.randn(self.shape, generator=generator, device=device).mul_(self.sigma_scale).add_(1)
        beta = torch.randn(self.shape, generator=generator, device=device).mul_(self.sigma_shift)
        return AugmentationNoise(alpha, beta, torch.rand(self.shape[0], generator=generator, device=device))

    @torch.no_grad()
    def scale_and_shift(self, assignment: Tensor, noise: AugmentationNoise) -> tuple[Tensor, Tensor]:
        """Return alpha and beta of every slot, (K, D) each; 1 and 0 for slots that are not augmented."""
        if self.ratio == 1:
            return noise.alpha, noise.beta
        selected = self._select_slots(assignment, noise.slot_priority)[:, None]
        return torch.where(selected, noise.alpha, 1), torch.where(selected, noise.beta, 0)

    def _select_slots(self, assignment: Tensor, slot_priority: Tensor) -> Tensor:
        """Return the `floor(ratio n)` slots of lowest priority value among the n occupied on any rank: (K,) bool."""
        local = torch.zeros_like(slot_priority).scatter(0, assignment.flatten(), 1.0)
        is_occupied = all_reduce_sum(local) > 0
        order = torch.where(is_occupied, slot_priority, 2.0).argsort().argsort()
        return is_occupied & (order < (is_occupied.sum().double() * self.ratio).floor())
