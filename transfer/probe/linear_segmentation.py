"""How much a linear classifier reads off a frozen encoder's map: mIoU and pixel accuracy on labeled images."""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transfer.encoders import EncoderWeights
from transfer.probe.command import Result, Task, make_parser, run
from transfer.probe.linear import fit
from transfer.probe.predict import count
from transfer.probe.scores import score
from transfer.encoders import build_network
from utils.config import at_least


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = make_parser("Linear segmentation probe on a frozen encoder.")
    group = parser.add_argument_group("probe")
    group.add_argument("--steps", type=at_least(1), default=2000, help="of 1024 cells each")
    group.add_argument("--lr", type=at_least(1e-12, float), default=1e-3, help="of AdamW, with a cosine to zero")
    run(parser.parse_args(argv), "linear", probe)


def probe(task: Task, encoder: EncoderWeights) -> Result:
    """Train on one split, measure on the other."""
    args, classes = task.args, len(task.classes)
    network = build_network(encoder, args.output_stride)
    train, val = (task.look(split, network, encoder) for split in (task.train, task.val))
    linear = fit(train, classes, args.steps, args.lr, args.seed, task.device)
    return Result({"linear probe": score(count(val, linear, classes, classes))}, val, linear)


if __name__ == "__main__":
    main()
