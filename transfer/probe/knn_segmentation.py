"""How well a frozen encoder's cells retrieve cells of the same class: mIoU and pixel accuracy, nothing trained."""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transfer.encoders import EncoderWeights
from transfer.probe.command import Result, Task, make_parser, run
from transfer.probe.neighbors import remember
from transfer.probe.predict import count
from transfer.probe.scores import score
from transfer.encoders import build_network
from utils.config import at_least


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = make_parser("Dense nearest-neighbor retrieval on a frozen encoder.")
    group = parser.add_argument_group("probe")
    group.add_argument("--memory", type=at_least(1), default=100_000, help="training cells that are kept")
    group.add_argument("--neighbors", type=at_least(1), default=30, help="nearest cells that vote")
    group.add_argument(
        "--temperature", type=at_least(1e-6, float), default=0.02, help="of the soft-max over their cosines"
    )
    run(parser.parse_args(argv), "knn", probe)


def probe(task: Task, encoder: EncoderWeights) -> Result:
    """Remember cells of one split, retrieve for the other."""
    args, classes = task.args, len(task.classes)
    network = build_network(encoder, args.output_stride)
    train, val = (task.look(split, network, encoder) for split in (task.train, task.val))
    memory = remember(train, classes, args.memory, args.neighbors, args.temperature, args.seed, task.device)
    return Result({"nearest neighbors": score(count(val, memory, classes, classes))}, val, memory)


if __name__ == "__main__":
    main()
