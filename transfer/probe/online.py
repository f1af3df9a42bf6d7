"""The linear probe during pre-training: how the teacher's encoder is doing, every few epochs."""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn

from transfer.probe.features import Features
from transfer.probe.labeled import LAYOUTS, Labeled
from transfer.probe.linear import fit
from transfer.probe.predict import count
from transfer.probe.scores import score
from utils.config import at_least
from utils.errors import UsageError
from utils.visualization import normalize

_IMAGES, _SIZE, _STEPS, _LR, _BATCH = 100, 224, 500, 1e-3, 16


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """The flags of the probe in pre-training."""
    said = "epochs between linear probes of the teacher's encoder on --probe-dir; 0 for none"
    group.add_argument("--probe-freq", type=at_least(0), default=0, help=said)
    group.add_argument("--probe-dir", default="", help="labeled images, of which 100 and 100 are taken")
    group.add_argument("--probe-dataset", choices=tuple(LAYOUTS), default="folder", help="layout of --probe-dir")


class OnlineProbe:
    """A small labeled set; 224 px, the same images every time.

    Raises:
        UsageError: naming --probe-dir, if it is not there, or has no labeled images of --probe-dataset's layout.
    """

    def __init__(self, args: argparse.Namespace):
        if not args.probe_dir:
            raise UsageError("--probe-freq: needs --probe-dir, a folder of labeled images")
        wanted = argparse.Namespace(dataset=args.probe_dataset, data_dir=Path(args.probe_dir), size=_SIZE)
        wanted.train_images = wanted.val_images = _IMAGES
        wanted.val_list = None
        try:
            self.train, self.val = Labeled(wanted, "train"), Labeled(wanted, "val")
        except UsageError as error:
            raise UsageError(f"--probe-dir {args.probe_dir}: {error}") from None
        self.classes = max(len(self.train.classes), len(self.val.classes))

    def measure(self, encoder: nn.Module, device: torch.device) -> dict[str, float]:
        """`probe_miou` and `probe_accuracy` of an encoder by its running statistics, in per cent."""
        training = encoder.training
        encoder.eval()
        train, val = (_look(encoder, split, device) for split in (self.train, self.val))
        encoder.train(training)
        linear = fit(train, self.classes, _STEPS, _LR, seed=0, device=device)
        found = score(count(val, linear, self.classes, self.classes))
        return {"probe_miou": found.miou, "probe_accuracy": found.accuracy}


@torch.no_grad()
def _look(encoder: nn.Module, labeled: Labeled, device: torch.device) -> Features:
    """All features in memory; without a loader, whose seed would come from the training's random numbers."""
    maps, labels = [], []
    for start in range(0, len(labeled), _BATCH):
        pairs = [labeled[number] for number in range(start, min(start + _BATCH, len(labeled)))]
        images = torch.stack([image for image, _ in pairs])
        maps.append(encoder(normalize(images / 255).to(device)).permute(0, 2, 3, 1).half().cpu().numpy())
        labels += [mask.numpy().astype(np.uint8) for _, mask in pairs]
    return Features(np.concatenate(maps), np.stack(labels))
