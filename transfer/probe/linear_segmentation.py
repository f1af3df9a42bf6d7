"""Linear probe: train a 1x1 convolution on a frozen encoder's feature map; report mIoU and pixel accuracy."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transfer.encoders import EncoderWeights, build_frozen_encoder
from transfer.probe.labeled_features import LabeledFeatures, has_progress_bar
from transfer.probe.segmentation_probe import (
    ProbeResult,
    ProbeRun,
    compute_scores,
    dataset_confusion,
    make_probe_parser,
    run,
)
from utils.config import at_least
from utils.errors import UsageError

_BATCH_POSITIONS = 1024


@dataclass(frozen=True)
class LinearClassifier:
    """Standardize each channel, then apply a 1x1 convolution."""

    mean: Tensor
    """(C,)."""
    scale: Tensor
    """(C,): one over the standard deviation."""
    weight: Tensor
    """(classes, C)."""
    bias: Tensor
    """(classes,)."""

    def __call__(self, features: Tensor) -> Tensor:
        """Map the features of one image (C, h, w) to logits (classes, h, w)."""
        positions = (features.to(self.mean.device).flatten(1).T - self.mean) * self.scale
        return F.linear(positions, self.weight, self.bias).T.unflatten(1, features.shape[1:])


def fit_linear(
    features: LabeledFeatures,
    num_classes: int,
    steps: int,
    lr: float,
    seed: int,
    device: torch.device,
    progress: bool = False,
) -> LinearClassifier:
    """Train with AdamW and a cosine schedule to zero; the channels are standardized over the training positions.

    The target of a position is the fraction of its pixels that each class has. The loss is therefore the cross-entropy
    over all pixels that are not void, of logits that are constant within a position. AdamW's weight decay is PyTorch's
    default, 0.01.

    Args:
        progress: whether to show a progress bar.

    Raises:
        UsageError: all training pixels are void.
    """
    soft_labels = torch.from_numpy(features.soft_labels(num_classes)).flatten(0, 2)
    labeled = np.flatnonzero(soft_labels.sum(dim=1).numpy())
    if not len(labeled):
        raise UsageError("the training masks have no labeled pixels")
    mean, scale = (moment.to(device) for moment in _channel_moments(features))
    weight = torch.zeros(num_classes, len(mean), device=device, requires_grad=True)
    bias = torch.zeros(num_classes, device=device, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng = np.random.default_rng(seed)
    for _ in tqdm(range(steps), unit="step", desc="training", disable=not progress):
        indices = np.sort(rng.choice(labeled, min(_BATCH_POSITIONS, len(labeled)), replace=False))
        logits = F.linear((features.positions(indices).to(device) - mean) * scale, weight, bias)
        target = soft_labels[indices].to(device)
        loss = -(target * logits.log_softmax(dim=1)).sum() / target.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return LinearClassifier(mean, scale, weight.detach(), bias.detach())


def _channel_moments(features: LabeledFeatures) -> tuple[Tensor, Tensor]:
    """Return mean and inverse standard deviation (C,) of each channel; the latter is 0 for a constant channel."""
    channels = features.maps.shape[3]
    total, total_squares, count = np.zeros(channels), np.zeros(channels), 0
    for feature_map in features.maps:
        positions = np.asarray(feature_map, dtype=np.float64).reshape(-1, channels)
        total, total_squares = total + positions.sum(axis=0), total_squares + (positions**2).sum(axis=0)
        count += len(positions)
    mean = total / count
    variance = np.maximum(total_squares / count - mean**2, 0)
    scale = np.where(variance > 1e-12 * mean**2, 1 / np.sqrt(variance + 1e-12), 0)
    return torch.from_numpy(mean).float(), torch.from_numpy(scale).float()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = make_probe_parser("Linear segmentation probe on a frozen encoder.")
    group = parser.add_argument_group("probe")
    group.add_argument(
        "--steps", type=at_least(1), default=2000, help=f"number of steps, each on {_BATCH_POSITIONS} positions"
    )
    group.add_argument(
        "--lr",
        type=at_least(1e-12, float),
        default=1e-3,
        help="initial learning rate of AdamW, with a cosine schedule to zero",
    )
    run(parser.parse_args(argv), "linear", probe)


def probe(probe_run: ProbeRun, encoder: EncoderWeights) -> ProbeResult:
    """Train on the training split, evaluate on the validation split."""
    args, num_classes = probe_run.args, len(probe_run.classes)
    network = build_frozen_encoder(encoder, args.output_stride)
    train, val = probe_run.extract_splits(network, encoder)
    classifier = fit_linear(
        train, num_classes, args.steps, args.lr, args.seed, probe_run.device, progress=has_progress_bar()
    )
    return ProbeResult(
        {"linear probe": compute_scores(dataset_confusion(val, classifier, num_classes))}, val, classifier
    )


if __name__ == "__main__":
    main()
