"""Shared code of the segmentation probes: metrics, command line and result files."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from tabulate import tabulate
from torch import Tensor

from models import backbones
from transfer.encoders import EncoderWeights, extract_encoder, untrained_encoder
from transfer.probe.labeled_features import LAYOUTS, VOID, LabeledFeatures, SegmentationDataset, extract_features
from transfer.probe.prediction_figure import NO_CLASS, draw_predictions
from transfer.results import write_json
from utils import checkpoint, config, distributed
from utils.checkpoint import Weights
from utils.config import at_least
from utils.device import choose_device
from utils.errors import UsageError
from utils.files import atomic_write, atomic_write_text, check_writable

Predictor = Callable[[Tensor], Tensor]
"""The features of one image (C, h, w) -> a score for each class or cluster (n, h, w)."""

_IMAGES_SHOWN = 8


# Metrics


def predict_labels(scores: Tensor, size: int) -> NDArray[np.int64]:
    """Resize scores (n, h, w) bilinearly and return the index of the largest one at every pixel, (size, size)."""
    return F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0].argmax(dim=0).cpu().numpy()


def predicted_label_maps(features: LabeledFeatures, predictor: Predictor) -> Iterator[NDArray[np.int64]]:
    """Predict a label for every labeled pixel, one image at a time."""
    for feature_map in features.maps:
        channels_first = torch.from_numpy(np.array(feature_map)).float().permute(2, 0, 1)
        yield predict_labels(predictor(channels_first), features.labels.shape[1])


def confusion_matrix(
    labels: NDArray[np.integer], predictions: NDArray[np.integer], num_classes: int, num_outputs: int
) -> NDArray[np.int64]:
    """Count the pixels of class i that were predicted as j: (num_classes, num_outputs). Void pixels do not count.

    Args:
        labels: classes 0 .. num_classes - 1 and VOID, any shape.
        predictions: classes or clusters 0 .. num_outputs - 1, the same shape.
    """
    valid = labels != VOID
    bins = labels[valid].astype(np.int64) * num_outputs + predictions[valid]
    return np.bincount(bins, minlength=num_classes * num_outputs).reshape(num_classes, num_outputs)


def dataset_confusion(
    features: LabeledFeatures, predictor: Predictor, num_classes: int, num_outputs: int | None = None
) -> NDArray[np.int64]:
    """Sum the confusion matrices of all images; `num_outputs` of the predictor defaults to the number of classes."""
    outputs = num_outputs or num_classes
    total = np.zeros((num_classes, outputs), dtype=np.int64)
    for labels, predictions in zip(features.labels, predicted_label_maps(features, predictor)):
        total += confusion_matrix(labels, predictions, num_classes, outputs)
    return total


@dataclass(frozen=True)
class SegmentationScores:
    """Metrics in percent."""

    miou: float
    """Mean over the classes that occur in the labels or the predictions."""
    accuracy: float
    """Percentage of the pixels that are predicted correctly."""
    iou: tuple[float, ...]
    """Of each class; NaN for a class that occurs in neither labels nor predictions."""


def compute_scores(confusion: NDArray[np.int64]) -> SegmentationScores:
    """Compute mIoU and pixel accuracy from a confusion matrix (classes, classes or more).

    Columns beyond the classes are pixels without a predicted class: wrong, but false positives of no class.
    """
    classes = len(confusion)
    correct = np.diagonal(confusion).astype(np.float64)
    union = confusion.sum(axis=1) + confusion[:, :classes].sum(axis=0) - correct
    iou = np.divide(100 * correct, union, out=np.full(classes, np.nan), where=union > 0)
    total = confusion.sum()
    accuracy = 100 * correct.sum() / total if total else np.nan
    miou = float(np.nanmean(iou)) if (union > 0).any() else float("nan")
    return SegmentationScores(miou, float(accuracy), tuple(iou.tolist()))


# Command line


@dataclass(frozen=True)
class ProbeRun:
    """The arguments, the dataset and the device of one call of a probe's command."""

    args: argparse.Namespace
    train: SegmentationDataset
    val: SegmentationDataset
    device: torch.device
    weights: Weights = field(default_factory=dict)
    """All weights of the checkpoint, also those of projector and prototypes; empty without a checkpoint."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; where the masks determine their number, the splits may differ."""
        return max(self.train.classes, self.val.classes, key=len)

    def extract(
        self, dataset: SegmentationDataset, network: torch.nn.Module, encoder: EncoderWeights, layer: str = "map"
    ) -> LabeledFeatures:
        """Extract the features of a split by `network`, which was built from `encoder`; `layer` names its output."""
        args = self.args
        metadata = {name: encoder.provenance[name] for name in ("encoder", "source_sha256")}
        metadata |= {"layer": layer, "stride": args.output_stride}
        if backbones.is_vit(encoder.arch):  # earlier versions interpolated the position embeddings by timm's rule
            metadata["position_embeddings"] = "DINO"
        network = network.to(self.device)
        return extract_features(network, dataset, args.cache, metadata, self.device, args.batch_size, args.num_workers)

    def extract_splits(
        self, network: torch.nn.Module, encoder: EncoderWeights
    ) -> tuple[LabeledFeatures, LabeledFeatures]:
        """Extract the features of the training and of the validation split."""
        return self.extract(self.train, network, encoder), self.extract(self.val, network, encoder)


@dataclass(frozen=True)
class ProbeResult:
    """The result of a probe of one encoder."""

    scores: dict[str, SegmentationScores]
    """By the name of the evaluation protocol."""
    features: LabeledFeatures
    """Of the validation images."""
    predictor: Predictor
    cluster_classes: NDArray[np.int64] | None = None
    """(clusters,): the class of each cluster, -1 for none; None if the predictor's outputs are classes."""


Probe = Callable[[ProbeRun, EncoderWeights], ProbeResult]


def make_probe_parser(description: str) -> argparse.ArgumentParser:
    """Build a parser with the flags of every probe."""
    parser = config.make_parser(description)
    parser.add_argument(
        "checkpoint", metavar="CKPT", help="file that transfer/convert.py reads, or `random` for an untrained --arch"
    )
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=tuple(LAYOUTS), default="folder", help="layout of --data-dir")
    group.add_argument("--data-dir", type=Path, required=True, help="dataset, in a layout of transfer/probe/README.md")
    group.add_argument(
        "--size",
        type=at_least(1),
        default=320,
        help="resize the short side to this many pixels and take the center square",
    )
    group.add_argument("--train-images", type=at_least(1), help="number of training images to use (default: all)")
    group.add_argument("--val-images", type=at_least(1), help="number of validation images to use (default: all)")
    group.add_argument(
        "--val-list", type=Path, help="file with the names of the validation images to use, one per line (default: all)"
    )
    group = parser.add_argument_group("encoder")
    group.add_argument(
        "--encoder",
        choices=("teacher", "student"),
        help="which encoder of CKPT to use (default: the teacher, if there are two)",
    )
    backbones.add_arguments(group)
    group.add_argument("--baseline", choices=("random",), help="also run the same encoder with random weights")
    group = parser.add_argument_group("features")
    group.add_argument("--cache", type=Path, default=Path("output/features"), help="folder for cached features")
    group.add_argument("--batch-size", type=at_least(1), default=16, help="images per batch on each GPU")
    group.add_argument("--num-workers", type=at_least(0), default=8, help="DataLoader workers for each GPU")
    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, help="folder of the results (default: output/probe/PROBE_DATASET_CKPT)")
    group.add_argument("--seed", type=at_least(0), default=0, help="random seed")
    group.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="device to compute on")
    return parser


def run(args: argparse.Namespace, name: str, probe: Probe) -> None:
    """Run `probe` on the checkpoint and its baseline; a usage error is printed in one line, with exit status 2."""
    try:
        _run(args, name, probe)
    except UsageError as error:
        distributed.exit_with_error(str(error))
    except KeyboardInterrupt:
        distributed.exit_with_error("interrupted; completed features stay in --cache", status=130)
    distributed.shutdown()


def _run(args: argparse.Namespace, name: str, probe: Probe) -> None:
    args.amp = "off"
    device = choose_device(args)
    distributed.initialize(device)
    random, path = args.checkpoint == "random", Path(args.checkpoint)
    source = "random" if random else f"{path.resolve().parent.name}_{path.stem}"
    args.out = args.out or Path("output/probe") / f"{name}_{args.dataset}_{source}"
    state = {} if random else checkpoint.load(path, "checkpoint")
    if random:
        backbones.resolve_patch_size(args)
    encoder = untrained_encoder(args.arch, args.seed) if random else extract_encoder(state, path, args.encoder)
    with torch.device("meta"):  # without memory for the weights
        backbones.build_encoder(encoder.arch, args.output_stride).check_image_size(args.size, "--size")
    check_writable("--out", args.out, overwrite=True, folder=True)
    train = SegmentationDataset(args.dataset, args.data_dir, "train", args.size, args.train_images)
    val = SegmentationDataset(args.dataset, args.data_dir, "val", args.size, args.val_images, args.val_list)
    weights = {} if random else checkpoint.extract_weights(state, f"checkpoint {path}")
    del state  # with the optimizer's, it is several times as large as the weights
    probe_run = ProbeRun(args, train, val, device, weights)
    encoders = {"checkpoint": encoder}
    if args.baseline:
        encoders["untrained"] = untrained_encoder(encoder.arch, args.seed)
    results = {key: probe(probe_run, weights) for key, weights in encoders.items()}
    if distributed.is_main_process():
        _write_results(probe_run, encoder, results)


# Results


def _write_results(probe_run: ProbeRun, encoder: EncoderWeights, results: dict[str, ProbeResult]) -> None:
    """Print the run and its scores; write `results.json`, `results.md` and `predictions.png` to --out."""
    args, out = probe_run.args, probe_run.args.out
    rows = [
        (name, protocol, scores.miou, scores.accuracy)
        for name, result in results.items()
        for protocol, scores in result.scores.items()
    ]
    headers = ("encoder", "protocol", "mIoU", "pixel accuracy")
    stride = args.size // next(iter(results.values())).features.maps.shape[1]
    table = tabulate(rows, headers, tablefmt="github", floatfmt=".2f")
    text = f"{_describe_run(probe_run, encoder, stride)}\n\n{table}"
    content = {
        "checkpoint": encoder.provenance,
        "args": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "images": {"train": len(probe_run.train), "val": len(probe_run.val)},
        "image_size": args.size,
        "output_stride": stride,
        "results": {
            name: {
                protocol: asdict(scores) | {"iou": dict(zip(probe_run.classes, scores.iou))}
                for protocol, scores in result.scores.items()
            }
            for name, result in results.items()
        },
    }
    figure = _draw_predictions(probe_run, results)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "results.json", content)
        atomic_write_text(out / "results.md", text + "\n")
        atomic_write(out / "predictions.png", partial(figure.save, format="png"))
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({error.strerror})") from None
    print(f"{text}\n\nwritten to {out}: results.json, results.md, predictions.png", flush=True)


def _describe_run(probe_run: ProbeRun, encoder: EncoderWeights, stride: int) -> str:
    """List the checkpoint, the dataset and the size of the images, each in a line."""
    args, provenance = probe_run.args, encoder.provenance
    facts = [provenance["encoder"]] if provenance["encoder"] != "only" else []
    facts += [encoder.arch, *([provenance["method"]] if "method" in provenance else [])]
    facts += [f"epoch {provenance['epoch']}"] if "epoch" in provenance else []
    return (
        f"- Checkpoint: {args.checkpoint} ({', '.join(facts)})\n"
        f"- Dataset: {args.dataset}, {len(probe_run.train):,} training and {len(probe_run.val):,} validation images\n"
        f"- Image size: {args.size} x {args.size}, output stride {stride}"
    )


def _draw_predictions(probe_run: ProbeRun, results: dict[str, ProbeResult]) -> Image.Image:
    """Draw the first validation images, their labels and each encoder's predictions."""
    count = min(_IMAGES_SHOWN, len(probe_run.val))
    images = np.stack([probe_run.val[number][0].permute(1, 2, 0).numpy() for number in range(count)])
    label_maps: dict[str, NDArray[np.integer]] = {}
    for name, result in results.items():
        features = LabeledFeatures(result.features.maps[:count], result.features.labels[:count])
        label_maps["labels"] = features.labels
        outputs = np.stack([*predicted_label_maps(features, result.predictor)])
        if result.cluster_classes is not None:
            outputs = np.where(result.cluster_classes < 0, NO_CLASS, result.cluster_classes)[outputs]
        label_maps[f"prediction ({name})"] = outputs
    return draw_predictions(images, label_maps, probe_run.classes)
