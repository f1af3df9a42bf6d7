"""One table of several runs' linear probes, mean and deviation over seeds: `python transfer/probe/compare.py FOLDER`.

FOLDER holds NAME/seed_N/probe/results.json, as scripts/compare.sh leaves them.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils import config, distributed
from utils.errors import UsageError


def main(argv: Sequence[str] | None = None) -> None:
    """The command: mistakes of the user end in one line and exit status 2."""
    parser = config.make_parser("Gather the linear probes of several runs and seeds in one table.")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="holds NAME/seed_N/probe/results.json")
    try:
        print(table(parser.parse_args(argv).folder), end="")
    except UsageError as error:
        distributed.exit_with_error(str(error))


def table(folder: Path) -> str:
    """Markdown: a row for each NAME, its mIoU and pixel accuracy beside those of its untrained encoder.

    Raises:
        UsageError: there are no results.
    """
    rows: dict[str, dict[str, list[dict[str, float]]]] = {}
    for file in sorted(folder.glob("*/seed_*/probe/results.json")):
        results = json.loads(file.read_text())["results"]
        for which, scores in results.items():
            rows.setdefault(file.parts[-4], {}).setdefault(which, []).append(scores["linear probe"])
    if not rows:
        raise UsageError(f"{folder}: no NAME/seed_N/probe/results.json in it; scripts/compare.sh makes them")
    lines = ["| run | seeds | mIoU | pixel accuracy | untrained: mIoU |", "| --- | --- | --- | --- | --- |"]
    for name, found in rows.items():
        own, before = found["checkpoint"], found.get("untrained", [])
        cells = [name.replace("_", " "), str(len(own)), _spread(own, "miou"), _spread(own, "accuracy")]
        lines.append("| " + " | ".join([*cells, _spread(before, "miou")]) + " |")
    return "\n".join(lines) + "\n"


def _spread(scores: list[dict[str, float]], measure: str) -> str:
    """Mean, and sample standard deviation where there are several."""
    values = [score[measure] for score in scores]
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


if __name__ == "__main__":
    main()
