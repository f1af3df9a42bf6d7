"""Load the encoder, projector and prototypes of a trained method."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.grouping import Grouping
from models.heads import Projector
from transfer.encoders import build_frozen_encoder, extract_encoder
from utils import checkpoint
from utils.checkpoint import Weights
from utils.errors import UsageError

_TEMPERATURE = 0.07
"""Temperature of the attention that pools slots; scores do not depend on it."""


class SlotModel(nn.Module):
    """Encoder, projector and prototypes of one branch of a method, frozen, in evaluation mode.

    Args:
        which: the branch, as in `EncoderWeights.provenance["encoder"]`: `teacher`, `student`, `only` or `untrained`.
    """

    def __init__(self, encoder: nn.Module, projector: Projector, grouping: Grouping, which: str):
        super().__init__()
        self.encoder, self.projector, self.grouping, self.which = encoder, projector, grouping, which
        self.eval().requires_grad_(False)

    @property
    def prototypes(self) -> Tensor:
        """Return the prototypes (K, D)."""
        return self.grouping.slot_embed.weight

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map normalized images (B, 3, H, W) to projections (B, D, h, w) and scores (B, K, h, w), which are cosines."""
        projections = self.projector(self.encoder(images))
        return projections, self.grouping.scores(projections)


class ProjectionEncoder(nn.Module):
    """The encoder and the projector of a slot model as one dense encoder.

    It maps normalized images (B, 3, H, W) to projections (B, D, h, w), and can be used wherever an encoder can.
    """

    def __init__(self, model: SlotModel):
        super().__init__()
        self.encoder, self.projector = model.encoder, model.projector

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.encoder(images))


def load_slot_model(path: Path | str, which: str | None = None, output_stride: int = 32) -> SlotModel:
    """Load the slot model of a checkpoint of this project or a released one; all sizes follow from the weights.

    Args:
        which: `teacher` or `student`; None for the teacher where the file has both.
        output_stride: as in `load_encoder`.

    Raises:
        UsageError: as `read_encoder`, or the file has no prototypes or no projector.
    """
    return extract_slot_model(checkpoint.load(path, "checkpoint"), path, which, output_stride)


def extract_slot_model(
    state: Mapping[str, Any],
    path: Path | str,
    which: str | None = None,
    output_stride: int = 32,
    flag: str = "checkpoint",
) -> SlotModel:
    """Return the slot model in a loaded checkpoint.

    Args:
        path: the file that was loaded.
        which: as in `load_slot_model`.
        output_stride: as in `load_encoder`.
        flag: as in `read_encoder`.

    Raises:
        UsageError: there is no encoder, no prototypes or no projector, or one of them is incomplete.
    """
    encoder = extract_encoder(state, path, which, flag)
    weights = checkpoint.extract_weights(state, f"{flag} {path}")
    network = build_frozen_encoder(encoder, output_stride)
    return build_slot_model(weights, network, encoder.provenance["encoder"], f"{flag} {path}")


def has_prototypes(weights: Weights) -> bool:
    """Return whether there are prototypes among the weights of a checkpoint."""
    return any(f"grouping_{suffix}.slot_embed.weight" in weights for suffix in "qk")


def build_slot_model(weights: Weights, encoder: nn.Module, which: str, where: str) -> SlotModel:
    """Return the projector and prototypes among the weights of a checkpoint on an encoder.

    Args:
        which: the branch, as in `SlotModel`.
        where: the file, as messages name it.

    Raises:
        UsageError: there are no prototypes or no projector, or one of them is incomplete.
    """
    suffix = "q" if which == "student" else "k"
    prefix = f"projector_{suffix}."
    projector_weights = {
        name.removeprefix(prefix): value.float() for name, value in weights.items() if name.startswith(prefix)
    }
    prototypes = weights.get(f"grouping_{suffix}.slot_embed.weight")
    if prototypes is None or not projector_weights:
        raise UsageError(f"{where}: no prototypes in it; use a complete checkpoint of slotcon or slotfa")
    checkpoint.check_finite(projector_weights | {"prototypes": prototypes}, where)
    projector = _build_projector(projector_weights, f"{where}: projector_{suffix}")
    dim = len(projector_weights["mlp.6.weight"])
    if prototypes.ndim != 2 or prototypes.shape[1] != dim:
        shape = tuple(prototypes.shape)
        raise UsageError(f"{where}: prototypes of shape {shape} do not fit its projector; the file is incomplete")
    grouping = Grouping(len(prototypes), dim, temperature=_TEMPERATURE)
    checkpoint.load_strict(grouping, {"slot_embed.weight": prototypes.float()}, f"{where}: grouping_{suffix}")
    return SlotModel(encoder, projector, grouping, which)


def _build_projector(weights: Weights, where: str) -> Projector:
    for name in ("mlp.0.weight", "mlp.6.weight"):
        if name not in weights or weights[name].ndim < 2:
            raise UsageError(f"{where}.{name} is missing; the file is incomplete")
    dim_hidden, dim_in = weights["mlp.0.weight"].shape[:2]
    projector = Projector(dim_in, dim_hidden, len(weights["mlp.6.weight"]))
    checkpoint.load_strict(projector, weights, where)
    return projector


def untrained_slot_model(model: SlotModel, encoder: nn.Module, seed: int) -> SlotModel:
    """Return an untrained projector and prototypes, of the sizes of `model`, on an untrained `encoder`."""
    dim_hidden, dim_in = model.projector.state_dict()["mlp.0.weight"].shape[:2]
    count, dim = model.prototypes.shape
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        projector = Projector(dim_in, dim_hidden, dim)
        return SlotModel(encoder, projector, Grouping(count, dim, temperature=_TEMPERATURE), "untrained")
