"""What the three probes share: their flags, the encoders that they run, and how they tell what came out."""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import nn

from models.backbones import ARCHITECTURES
from transfer.encoders import EncoderWeights, read_encoder
from transfer.probe import features, labeled
from transfer.probe.features import Features
from transfer.probe.labeled import Labeled
from transfer.probe.predict import Predict, label_maps
from transfer.probe.scores import VOID, Score
from transfer.encoders import untrained_encoder
from utils import config, distributed
from utils.config import at_least
from utils.device import choose_device
from utils.errors import UsageError
from utils.files import atomic_write, atomic_write_text
from utils.visualization import palette

_PICTURED = 8
_MARGIN = 110


@dataclass(frozen=True)
class Task:
    """A data set's two splits, and where to compute."""

    args: argparse.Namespace
    train: Labeled
    val: Labeled
    device: torch.device

    @property
    def classes(self) -> tuple[str, ...]:
        """Without names the masks tell how many there are, those of one split perhaps more than the other's."""
        return max(self.train.classes, self.val.classes, key=len)

    def look(self, split: Labeled, network: nn.Module, encoder: EncoderWeights, layer: str = "map") -> Features:
        """What `network`, made of `encoder`, sees of a split; `layer` says what it gives."""
        facts = {name: encoder.provenance[name] for name in ("encoder", "source_sha256")}
        facts |= {"layer": layer, "stride": self.args.output_stride}
        return features.extract(network.to(self.device), split, self.args, self.device, facts)


@dataclass(frozen=True)
class Result:
    """What one encoder achieved."""

    scores: dict[str, Score]
    """By the name of the measure."""
    seen: Features
    """The validation images."""
    predict: Predict
    """Scores of each class, or of each cluster."""
    class_of: NDArray[np.int64] | None = None
    """(clusters,): the class that each cluster stands for, -1 for none; None where `predict` is of classes."""


Probe = Callable[[Task, EncoderWeights], Result]


def make_parser(description: str) -> argparse.ArgumentParser:
    """The flags that all probes have."""
    parser = config.make_parser(description)
    parser.add_argument("checkpoint", metavar="CKPT", help="any that transfer/convert.py reads, or `random`")
    labeled.add_arguments(parser.add_argument_group("data"))
    group = parser.add_argument_group("encoder")
    said = "which of two encoders (the teacher if not said, where there are two)"
    group.add_argument("--encoder", choices=("teacher", "student"), help=said)
    group.add_argument("--arch", choices=ARCHITECTURES, default="resnet50", help="of `random`")
    said = "pixels to a cell of the map, below 32 by dilation"
    group.add_argument("--output-stride", type=int, choices=(32, 16, 8), default=32, help=said)
    group.add_argument("--baseline", choices=("random",), help="run the same encoder untrained as well")
    features.add_arguments(parser.add_argument_group("features"))
    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, help="folder of results and picture (below output/probe, by probe and CKPT)")
    group.add_argument("--seed", type=at_least(0), default=0, help="of everything drawn by chance")
    group.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to compute")
    return parser


def run(args: argparse.Namespace, name: str, probe: Probe) -> None:
    """Run `probe` on the checkpoint and its baseline; mistakes of the user end in one line and exit status 2."""
    try:
        _run(args, name, probe)
    except UsageError as error:
        distributed.exit_with_error(str(error))
    except KeyboardInterrupt:
        distributed.exit_with_error("stopped; the features that are complete are kept", status=130)
    distributed.shutdown()


def _run(args: argparse.Namespace, name: str, probe: Probe) -> None:
    args.amp = "off"
    device = choose_device(args)
    distributed.initialize(device)
    torch.manual_seed(args.seed)
    path = Path(args.checkpoint)
    source = args.checkpoint if args.checkpoint == "random" else f"{path.resolve().parent.name}_{path.stem}"
    args.out = args.out or Path("output/probe") / f"{name}_{args.dataset}_{source}"
    encoder = untrained_encoder(args.arch, args.seed) if args.checkpoint == "random" else read_encoder(path, args.encoder)
    _check_writable(args.out)
    task = Task(args, Labeled(args, "train"), Labeled(args, "val"), device)
    encoders = {"checkpoint": encoder} | ({"untrained": untrained_encoder(encoder.arch, args.seed)} if args.baseline else {})
    results = {which: probe(task, one) for which, one in encoders.items()}
    if distributed.is_main_process():
        _write(task, encoder, results)


def _check_writable(folder: Path) -> None:
    """Before an hour's computing rather than after."""
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UsageError(f"--out {folder}: cannot be made in {there}; use another folder")


def _write(task: Task, encoder: EncoderWeights, results: dict[str, Result]) -> None:
    """The table on the screen; `results.json`, `results.md` and `predictions.png` in --out."""
    out = task.args.out
    lines = [f"| {task.args.dataset} | measure | mIoU | pixel accuracy |", "| --- | --- | --- | --- |"]
    for which, result in results.items():
        for measure, score in result.scores.items():
            lines.append(f"| {which} | {measure} | {score.miou:.2f} | {score.accuracy:.2f} |")
    text = "\n".join(lines) + "\n"
    content = {
        "checkpoint": encoder.provenance,
        "args": {name: str(value) if isinstance(value, Path) else value for name, value in vars(task.args).items()},
        "images": {"train": len(task.train), "val": len(task.val)},
        "results": {which: _numbers(result, task.classes) for which, result in results.items()},
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        atomic_write_text(out / "results.json", json.dumps(content, indent=2) + "\n")
        atomic_write_text(out / "results.md", text)
        picture = _picture(task, results)
        atomic_write(out / "predictions.png", partial(picture.save, format="png"))
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({error.strerror})") from None
    print(f"{text}\nwritten to {out}: results.json, results.md, predictions.png", flush=True)


def _numbers(result: Result, classes: tuple[str, ...]) -> dict[str, Any]:
    numbers = {}
    for measure, score in result.scores.items():
        iou = {name: None if np.isnan(value) else value for name, value in zip(classes, score.iou)}
        numbers[measure] = asdict(replace(score, iou=())) | {"iou": iou}
    return numbers


def _picture(task: Task, results: dict[str, Result]) -> Image.Image:
    """The first validation images, their labels, and what each encoder makes of them; a row each, void black."""
    count = min(_PICTURED, len(task.val))
    colors = np.zeros((VOID + 1, 3), dtype=np.uint8)
    colors[: len(task.classes)] = (palette(len(task.classes)) * 255).byte().numpy()
    first = next(iter(results.values())).seen
    rows = {"image": [task.val[number][0].permute(1, 2, 0).numpy() for number in range(count)]}
    rows["labels"] = [colors[mask] for mask in first.labels[:count]]
    for which, result in results.items():
        class_of = (
            np.arange(VOID + 1) if result.class_of is None else np.where(result.class_of < 0, VOID, result.class_of)
        )
        seen = Features(result.seen.maps[:count], result.seen.labels[:count])
        rows[which] = [colors[class_of[winner]] for winner in label_maps(seen, result.predict)]
    pixels = np.concatenate([np.concatenate(row, axis=1) for row in rows.values()])
    picture = Image.new("RGB", (pixels.shape[1] + _MARGIN, pixels.shape[0]), "white")
    picture.paste(Image.fromarray(pixels), (_MARGIN, 0))
    draw = ImageDraw.Draw(picture)
    for number, name in enumerate(rows):
        draw.text((8, (number + 0.5) * pixels.shape[0] / len(rows)), name, "black", font_size=18, anchor="lm")
    return picture
