"""Load the encoder, projector and prototypes of a trained method."""

from pathlib import Path

import torch
from torch import Tensor, nn

from models.grouping import Grouping
from models.heads import MLP
from transfer.encoders import build_network, read_encoder
from utils import checkpoint
from utils.errors import UsageError


class TrainedSlots(nn.Module):
    """Encoder, projector and prototypes of one half of a trained method, frozen, in evaluation mode."""

    def __init__(self, encoder: nn.Module, projector: MLP, grouping: Grouping):
        super().__init__()
        self.encoder, self.projector, self.grouping = encoder, projector, grouping
        self.eval().requires_grad_(False)

    @property
    def prototypes(self) -> Tensor:
        """(K, D)."""
        return self.grouping.slot_embed.weight

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalized images (B, 3, H, W) -> projections (B, D, h, w) and scores (B, K, h, w), cosines."""
        projections = self.projector(self.encoder(images))
        return projections, self.grouping(projections).scores


def load_slots(path: Path | str, which: str | None = None, output_stride: int = 32) -> TrainedSlots:
    """The slots of a checkpoint of this project or a released one; all sizes are told by the weights.

    Raises:
        UsageError: as `read_encoder`, or the file has no prototypes or no projector.
    """
    encoder = read_encoder(path, which)
    suffix = "q" if encoder.provenance["encoder"] == "student" else "k"
    weights = checkpoint.load_weights(path, "checkpoint")
    projector = {name: weights[name] for name in weights if name.startswith(f"projector_{suffix}.")}
    prototypes = weights.get(f"grouping_{suffix}.slot_embed.weight")
    if prototypes is None or not projector:
        whole = "slots are in whole checkpoints of slotcon and slotfa alone"
        raise UsageError(f"{path}: no prototypes in it; {whole}, others can be clustered with --clusters")
    projector = {name.partition(".")[2]: value.float() for name, value in projector.items()}
    for name in ("mlp.0.weight", "mlp.6.weight"):
        if name not in projector:
            raise UsageError(f"{path}: projector_{suffix}.{name} is missing; the file is not whole")
    if prototypes.ndim != 2 or prototypes.shape[1] != len(projector["mlp.6.weight"]):
        shape = tuple(prototypes.shape)
        raise UsageError(f"{path}: prototypes of shape {shape} do not fit its projector; the file is not whole")
    for name, value in {**projector, "prototypes": prototypes}.items():
        if not value.isfinite().all():
            raise UsageError(f"{path}: {name} holds values that are not finite; use an earlier checkpoint")
    hidden, width = projector["mlp.0.weight"].shape[:2]
    head = MLP(width, hidden, len(projector["mlp.6.weight"]), maps=True)
    checkpoint.load_strict(head, projector, f"{path}: projector_{suffix}")
    # The temperature shapes slots, not scores.
    grouping = Grouping(len(prototypes), prototypes.shape[1], temperature=0.07)
    checkpoint.load_strict(grouping, {"slot_embed.weight": prototypes.float()}, f"{path}: grouping_{suffix}")
    return TrainedSlots(build_network(encoder, output_stride), head, grouping)


class Projections(nn.Module):
    """Normalized images (B, 3, H, W) -> projections (B, D, h, w), whose cosines with the prototypes are the scores."""

    def __init__(self, slots: TrainedSlots):
        super().__init__()
        self.slots = slots

    def forward(self, images: Tensor) -> Tensor:
        return self.slots(images)[0]


def untrained_slots(slots: TrainedSlots, network: nn.Module, seed: int) -> TrainedSlots:
    """Projector and prototypes of the sizes of `slots` as pre-training starts with them, on an untrained `network`."""
    hidden, width = slots.projector.state_dict()["mlp.0.weight"].shape[:2]
    count, dim = slots.prototypes.shape
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TrainedSlots(network, MLP(width, hidden, dim, maps=True), Grouping(count, dim, temperature=0.07))
