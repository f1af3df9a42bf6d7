"""A linear segmentation probe of the teacher's encoder, run every few epochs of pre-training."""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn

from models.backbones import build_encoder
from transfer.probe.labeled_features import LabeledFeatures, SegmentationDataset, encode_images
from transfer.probe.linear_segmentation import fit_linear
from transfer.probe.segmentation_probe import compute_scores, dataset_confusion
from utils.errors import UsageError

_IMAGES, _SIZE, _STEPS, _LR, _BATCH = 100, 224, 500, 1e-3, 16


class OnlineProbe:
    """A linear probe on the first 100 training and 100 validation images of a labeled dataset, at 224 px.

    Args:
        args: the run's arguments, of which `probe_dir`, `probe_dataset`, `arch` and `output_stride` are used.

    Raises:
        UsageError: --probe-dir is not given, or has no labeled images in the layout --probe-dataset; or the patches of
            the encoder do not divide the images.
    """

    def __init__(self, args: argparse.Namespace):
        if not args.probe_dir:
            raise UsageError("--probe-freq: needs --probe-dir, a folder of labeled images")
        with torch.device("meta"):  # without memory for the weights
            stride = build_encoder(args.arch, args.output_stride).stride
        if _SIZE % stride:
            raise UsageError(
                f"--probe-freq: the probe's images of {_SIZE} px are no multiple of the patch size {stride}; "
                "use another --patch-size or --probe-freq 0"
            )
        self.train, self.val = (
            SegmentationDataset(args.probe_dataset, Path(args.probe_dir), split, _SIZE, _IMAGES, flag="--probe-dir")
            for split in ("train", "val")
        )
        self.num_classes = max(len(self.train.classes), len(self.val.classes))

    def measure(self, encoder: nn.Module, device: torch.device) -> dict[str, float]:
        """Return `probe/miou` and `probe/accuracy` in percent of an encoder, which runs in evaluation mode."""
        training = encoder.training
        encoder.eval()
        train, val = (_extract(encoder, split, device) for split in (self.train, self.val))
        encoder.train(training)
        classifier = fit_linear(train, self.num_classes, _STEPS, _LR, seed=0, device=device)
        scores = compute_scores(dataset_confusion(val, classifier, self.num_classes))
        return {"probe/miou": scores.miou, "probe/accuracy": scores.accuracy}


@torch.no_grad()
def _extract(encoder: nn.Module, dataset: SegmentationDataset, device: torch.device) -> LabeledFeatures:
    """Extract all features into memory, without a DataLoader, which would draw its seed from the run's generator."""
    maps, labels = [], []
    for start in range(0, len(dataset), _BATCH):
        pairs = [dataset[number] for number in range(start, min(start + _BATCH, len(dataset)))]
        images = torch.stack([image for image, _ in pairs])
        maps.append(encode_images(encoder, images, device))
        labels += [mask.numpy().astype(np.uint8) for _, mask in pairs]
    return LabeledFeatures(np.concatenate(maps), np.stack(labels))
