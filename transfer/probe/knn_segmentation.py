"""k-NN probe: a cell's class is that of the training cells with the most similar features; nothing is trained."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transfer.encoders import EncoderWeights, build_network
from transfer.probe.labeled_features import LabeledFeatures
from transfer.probe.segmentation_probe import ProbeResult, ProbeRun, compute_scores, dataset_confusion, make_parser, run
from utils.config import at_least


@dataclass(frozen=True)
class KNNIndex:
    """M training cells whose classes are averaged by a softmax over cosine similarities."""

    keys: Tensor
    """(M, C), normalized to length 1."""
    shares: Tensor
    """(M, classes): the share of each class among a cell's pixels."""
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
        """Draw `size` cells with labeled pixels at random, or take all cells if there are fewer."""
        shares = features.class_shares(num_classes).reshape(-1, num_classes)
        labeled_cells = np.flatnonzero(shares.sum(axis=1))
        rng = np.random.default_rng(seed)
        indices = np.sort(rng.choice(labeled_cells, min(size, len(labeled_cells)), replace=False))
        keys = F.normalize(features.cells(indices), dim=1)
        return cls(keys.to(device), torch.from_numpy(shares[indices]).to(device), neighbors, temperature)

    def __call__(self, features: Tensor) -> Tensor:
        """Map the features of one image (C, h, w) to weighted shares of the classes (classes, h, w)."""
        cells = F.normalize(features.to(self.keys.device).flatten(1).T, dim=1)
        similarities, nearest = (cells @ self.keys.T).topk(min(self.neighbors, len(self.keys)), dim=1)
        weights = (similarities / self.temperature).softmax(dim=1)
        return torch.einsum("nk,nkc->cn", weights, self.shares[nearest]).unflatten(1, features.shape[1:])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = make_parser("Dense nearest-neighbor retrieval on a frozen encoder.")
    group = parser.add_argument_group("probe")
    group.add_argument("--memory", type=at_least(1), default=100_000, help="number of training cells in the index")
    group.add_argument("--neighbors", type=at_least(1), default=30, help="number of nearest cells that vote")
    group.add_argument("--temperature", type=at_least(1e-6, float), default=0.02, help="of the softmax over cosines")
    run(parser.parse_args(argv), "knn", probe)


def probe(probe_run: ProbeRun, encoder: EncoderWeights) -> ProbeResult:
    """Index the cells of the training split, evaluate on the validation split."""
    args, num_classes = probe_run.args, len(probe_run.classes)
    network = build_network(encoder, args.output_stride)
    train, val = probe_run.extract_splits(network, encoder)
    index = KNNIndex.build(
        train, num_classes, args.memory, args.neighbors, args.temperature, args.seed, probe_run.device
    )
    return ProbeResult({"nearest neighbors": compute_scores(dataset_confusion(val, index, num_classes))}, val, index)


if __name__ == "__main__":
    main()
