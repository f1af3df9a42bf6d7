"""Do clusters that were found without labels coincide with classes: prototypes, or k-means on an encoder's features.

Clusters are given classes by the validation labels, over the whole set: one to one by the Hungarian algorithm, and many
to one by majority (over-clustering, another number). Clusters that the former leaves over are wrong wherever they win.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transfer.encoders import EncoderWeights
from transfer.probe.clusters import kmeans, nearest
from transfer.probe.command import Result, Task, make_parser, run
from transfer.probe.predict import count
from transfer.probe.scores import majority, match, relabel, score
from transfer.encoders import build_network
from transfer.trained_slots import Projections, TrainedSlots, load_slots, untrained_slots
from utils.config import at_least
from utils.errors import UsageError

_PRESETS = {"coco-stuff-27": {"clusters": 27}}
"""arXiv 2103.17070 (PiCIE): 320 px, center square, 27 clusters one to one."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = make_parser("Match clusters found without labels to classes.")
    group = parser.add_argument_group("probe").add_mutually_exclusive_group()
    said = "k-means with so many, on the encoder's map (27 on coco-stuff-27; else CKPT's prototypes)"
    group.add_argument("--clusters", type=at_least(1), help=said)
    group.add_argument("--prototypes", action="store_true", help="CKPT's prototypes on coco-stuff-27, too")
    args = parser.parse_args(argv)
    if args.clusters is None and not args.prototypes:
        args.clusters = _PRESETS.get(args.dataset, {}).get("clusters")
    run(args, "unsupervised", probe)


def probe(task: Task, encoder: EncoderWeights) -> Result:
    """Cluster, give the clusters classes, measure."""
    args, classes = task.args, len(task.classes)
    if args.clusters:
        network = build_network(encoder, args.output_stride)
        train, val = (task.look(split, network, encoder) for split in (task.train, task.val))
        if args.clusters > (cells := int(np.prod(train.maps.shape[:3]))):
            raise UsageError(f"--clusters {args.clusters}: more than the {cells} cells of the training images")
        centers = kmeans(train, args.clusters, args.seed).to(task.device)
    else:
        slots = _slots(task, encoder)
        sizes = [tuple(value.shape) for value in slots.projector.state_dict().values()]
        val = task.look(task.val, Projections(slots), encoder, f"projections {sizes}")
        centers = slots.prototypes.detach().to(task.device)
    predict = partial(nearest, centers)
    counts = count(val, predict, classes, len(centers))
    one, many = match(counts), majority(counts)
    scores = {
        "Hungarian, one to one": score(relabel(counts, one)),
        "majority, many to one": score(relabel(counts, many)),
    }
    return Result(scores, val, predict, one if len(centers) <= classes else many)


def _slots(task: Task, encoder: EncoderWeights) -> TrainedSlots:
    args = task.args
    if args.checkpoint == "random":
        raise UsageError("random: has no prototypes; cluster its features with --clusters")
    slots = load_slots(args.checkpoint, args.encoder, args.output_stride)
    if encoder.provenance["encoder"] == "untrained":
        return untrained_slots(slots, build_network(encoder, args.output_stride), args.seed)
    return slots


if __name__ == "__main__":
    main()
