"""Unsupervised segmentation: match clusters that were found without labels to classes.

The clusters are a model's prototypes, or k-means clusters of an encoder's features. The labels of the whole validation
set assign classes to them: one to one by the Hungarian algorithm, and many to one by majority. With the former, all
pixels of a cluster without a class are wrong.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import MiniBatchKMeans
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
from transfer.slot_model import ProjectionEncoder, SlotModel, build_slot_model, untrained_slot_model
from utils import checkpoint
from utils.config import at_least
from utils.errors import UsageError

_KMEANS_POSITIONS = 1_000_000
"""The largest number of positions that k-means is fit to."""
_DEFAULT_CLUSTERS = {"coco-stuff-27": 27}
"""PiCIE's protocol, arXiv 2103.17070: 27 clusters, one to one."""


def cosine_similarity(centers: Tensor, features: Tensor) -> Tensor:
    """Return the cosine of every center with every position: (K, C) and (C, h, w) -> (K, h, w)."""
    return torch.einsum("kc,chw->khw", F.normalize(centers, dim=1), F.normalize(features.to(centers.device), dim=0))


def fit_kmeans(features: LabeledFeatures, clusters: int, seed: int) -> Tensor:
    """Return the centers (clusters, C), of length 1, of mini-batch k-means on normalized positions."""
    num_positions = int(np.prod(features.maps.shape[:3]))
    rng = np.random.default_rng(seed)
    indices = np.sort(rng.choice(num_positions, min(num_positions, _KMEANS_POSITIONS), replace=False))
    positions = F.normalize(features.positions(indices), dim=1).numpy()
    kmeans = MiniBatchKMeans(clusters, random_state=seed, n_init=3, batch_size=4096).fit(positions)
    return F.normalize(torch.from_numpy(kmeans.cluster_centers_).float(), dim=1)


def match_one_to_one(confusion: NDArray[np.int64]) -> NDArray[np.int64]:
    """Assign classes to clusters by the Hungarian algorithm, which maximizes the number of correct pixels.

    Args:
        confusion: (classes, clusters), of the whole set.

    Returns:
        (clusters,), -1 for a cluster without a class.
    """
    classes, clusters = linear_sum_assignment(confusion, maximize=True)
    cluster_classes = np.full(confusion.shape[1], -1, dtype=np.int64)
    cluster_classes[clusters] = classes
    return cluster_classes


def match_majority(confusion: NDArray[np.int64]) -> NDArray[np.int64]:
    """Assign to each cluster the class of most of its pixels: (classes, clusters) -> (clusters,), -1 if it has none."""
    return np.where(confusion.sum(axis=0) > 0, confusion.argmax(axis=0), -1)


def merge_clusters(confusion: NDArray[np.int64], cluster_classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sum the columns (classes, clusters) by assigned class: (classes, classes + 1), the last one for no class."""
    merged = np.zeros((len(confusion), len(confusion) + 1), dtype=np.int64)
    np.add.at(merged.T, cluster_classes, confusion.T)  # index -1 is the last column
    return merged


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = make_probe_parser("Unsupervised segmentation: match clusters of the features to classes.")
    group = parser.add_argument_group("probe").add_mutually_exclusive_group()
    group.add_argument(
        "--clusters",
        type=at_least(1),
        help="number of k-means clusters (default: 27 for coco-stuff-27; for other datasets the checkpoint's "
        "prototypes are used)",
    )
    group.add_argument(
        "--prototypes", action="store_true", help="use the checkpoint's prototypes, also for coco-stuff-27"
    )
    args = parser.parse_args(argv)
    if args.clusters is None and not args.prototypes:
        args.clusters = _DEFAULT_CLUSTERS.get(args.dataset)
    run(args, "unsupervised", probe)


def probe(probe_run: ProbeRun, encoder: EncoderWeights) -> ProbeResult:
    """Match clusters to the classes of the validation split both ways, and evaluate both.

    `predictions.png` shows the one-to-one matching, or the majority matching if there are more clusters than classes.
    """
    num_classes = len(probe_run.classes)
    centers, val = (_kmeans if probe_run.args.clusters else _prototypes)(probe_run, encoder)
    predictor = partial(cosine_similarity, centers.to(probe_run.device))
    confusion = dataset_confusion(val, predictor, num_classes, len(centers))
    one_to_one, majority = match_one_to_one(confusion), match_majority(confusion)
    scores = {
        "Hungarian, one to one": compute_scores(merge_clusters(confusion, one_to_one)),
        "majority, many to one": compute_scores(merge_clusters(confusion, majority)),
    }
    return ProbeResult(scores, val, predictor, one_to_one if len(centers) <= num_classes else majority)


def _kmeans(probe_run: ProbeRun, encoder: EncoderWeights) -> tuple[Tensor, LabeledFeatures]:
    """Return k-means centers of the training features, and the validation features."""
    args = probe_run.args
    network = build_frozen_encoder(encoder, args.output_stride)
    train, val = probe_run.extract_splits(network, encoder)
    if args.clusters > (num_positions := int(np.prod(train.maps.shape[:3]))):
        raise UsageError(f"--clusters {args.clusters}: more than the {num_positions} positions of the training images")
    return fit_kmeans(train, args.clusters, args.seed), val


def _prototypes(probe_run: ProbeRun, encoder: EncoderWeights) -> tuple[Tensor, LabeledFeatures]:
    """Return the prototypes, and the projected validation features."""
    model = _build_slot_model(probe_run, encoder)
    # An untrained projector of other sizes is another network, which the encoder's hash does not show.
    shapes = [tuple(value.shape) for value in model.projector.state_dict().values()]
    return model.prototypes, probe_run.extract(
        probe_run.val, ProjectionEncoder(model), encoder, f"projections {shapes}"
    )


def _build_slot_model(probe_run: ProbeRun, encoder: EncoderWeights) -> SlotModel:
    args = probe_run.args
    if args.checkpoint == "random":
        raise UsageError("random: has no prototypes; use --clusters for k-means on its features")
    # The sizes of an untrained projector and prototypes are those of the checkpoint.
    which, _ = checkpoint.find_encoder(probe_run.weights, args.encoder or "teacher")
    network = build_frozen_encoder(encoder, args.output_stride)
    try:
        model = build_slot_model(probe_run.weights, network, which, f"checkpoint {args.checkpoint}")
    except UsageError as error:
        raise UsageError(f"{error}, or --clusters for k-means on the features of the encoder") from None
    untrained = encoder.provenance["encoder"] == "untrained"
    return untrained_slot_model(model, network, args.seed) if untrained else model


if __name__ == "__main__":
    main()
