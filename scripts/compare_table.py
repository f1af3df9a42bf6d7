"""Print a table of the linear probes of the runs in a folder: mean and sample standard deviation over the seeds."""

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate


def render_table(folder: Path) -> str:
    """Return the table of all `RUN/seed_N/probe/results.json` in `folder` as Markdown."""
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(folder.glob("*/seed_*/probe/results.json")):
        runs[path.parts[-4].replace("_", " ")].append(json.loads(path.read_text())["results"])
    rows = []
    for name, results in runs.items():
        trained, untrained = (
            [result[key]["linear probe"] for result in results] for key in ("checkpoint", "untrained")
        )
        metrics = [(trained, "miou"), (trained, "accuracy"), (untrained, "miou")]
        cells = [mean_and_deviation([scores[key] for scores in group]) for group, key in metrics]
        rows.append([name, len(results), *cells])
    headers = ["run", "seeds", "mIoU", "pixel accuracy", "mIoU of the untrained encoder"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def mean_and_deviation(values: Sequence[float]) -> str:
    """Return the mean, and from two values on the sample standard deviation, with two decimals."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


if __name__ == "__main__":
    print(render_table(Path(sys.argv[1])))
