"""k-NN segmentation probe: a position takes the classes of the training positions with the most similar features."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transfer.encoders import EncoderWeights, build_frozen_encoder
from transfer.probe.labeled_features import LabeledFeatures
from transfer.probe.segmentation_probe import (
    ProbeResult,
    ProbeRun,
    compute_scores,
    dataset_confusion,
    make_probe_parser,
    run,
)
from utils.config import at_least


@dataclass(frozen=True)
class KNNIndex:
    """M training positions whose classes are averaged by a softmax over cosine similarities."""

    keys: Tensor
    """(M, C), normalized to length 1."""
    soft_labels: Tensor
    """(M, classes): the fraction of a position's pixels that each class has."""
    neighbors: int
    temperature: float

    @classmethod
    def build(
        cls,
        features: LabeledFeatures,
        num_classes: int,
        size: int,
        neighbors: int,
        temperature: float,
        seed: int,
        device: torch.device,
    ) -> "KNNIndex":
        """Draw `size` positions with labeled pixels at random, or take all positions if there are fewer."""
        soft_labels = features.soft_labels(num_classes).reshape(-1, num_classes)
        labeled_positions = np.flatnonzero(soft_labels.sum(axis=1))
        rng = np.random.default_rng(seed)
        indices = np.sort(rng.choice(labeled_positions, min(size, len(labeled_positions)), replace=False))
        keys = F.normalize(features.positions(indices), dim=1)
        return cls(keys.to(device), torch.from_numpy(soft_labels[indices]).to(device), neighbors, temperature)

    def __call__(self, features: Tensor) -> Tensor:
        """Map the features of one image (C, h, w) to the weighted mean of its neighbors' labels (classes, h, w)."""
        positions = F.normalize(features.to(self.keys.device).flatten(1).T, dim=1)
        similarities, nearest = (positions @ self.keys.T).topk(min(self.neighbors, len(self.keys)), dim=1)
        weights = (similarities / self.temperature).softmax(dim=1)
        return torch.einsum("nk,nkc->cn", weights, self.soft_labels[nearest]).unflatten(1, features.shape[1:])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = make_probe_parser("k-NN segmentation probe on a frozen encoder.")
    group = parser.add_argument_group("probe")
    group.add_argument(
        "--memory", type=at_least(1), default=100_000, help="number of training positions in the memory bank"
    )
    group.add_argument(
        "--neighbors",
        "--neighbours",  # the spelling of earlier versions
        type=at_least(1),
        default=30,
        help="number of nearest training positions that vote",
    )
    group.add_argument(
        "--temperature",
        type=at_least(1e-6, float),
        default=0.02,
        help="temperature of the softmax over cosine similarities",
    )
    run(parser.parse_args(argv), "knn", probe)


def probe(probe_run: ProbeRun, encoder: EncoderWeights) -> ProbeResult:
    """Build the memory bank from the training split, and evaluate on the validation split."""
    args, num_classes = probe_run.args, len(probe_run.classes)
    network = build_frozen_encoder(encoder, args.output_stride)
    train, val = probe_run.extract_splits(network, encoder)
    index = KNNIndex.build(
        train, num_classes, args.memory, args.neighbors, args.temperature, args.seed, probe_run.device
    )
    return ProbeResult({"k-NN": compute_scores(dataset_confusion(val, index, num_classes))}, val, index)


if __name__ == "__main__":
    main()
