"""scripts/compare.sh: the same training for all methods, one table of their linear probes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.demo import render_scene
from tests.probe_data import write_image

SCRIPT = Path(__file__).parents[1] / "scripts" / "compare.sh"
RUNS = ("SlotCon", "SlotFA_contrast", "SlotFA_paper", "SlotFA_paper_sigma_0.1", "SlotFA_paper_sigma_0.5")
RUNS += ("SlotFA_released",)


def compare(folder: Path, data: Path, seeds: str, *flags: str) -> list[list[str]]:
    """Run the script; return the cells of the printed table's rows."""
    environment = {**os.environ, "DATA": str(data), "SEEDS": seeds, "OUT": str(folder)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = ["bash", str(SCRIPT), *flags]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| S")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_table_shows_mean_and_deviation_over_seeds(tmp_path: Path) -> None:
    for run in RUNS:
        for seed, miou in enumerate((10.0, 12.0, 17.0)):
            path = tmp_path / run / f"seed_{seed}" / "probe" / "results.json"
            path.parent.mkdir(parents=True)
            values = {"checkpoint": miou, "untrained": 5.0}
            results = {which: {"linear probe": {"miou": v, "accuracy": 2 * v}} for which, v in values.items()}
            path.write_text(json.dumps({"results": results}))
    rows = compare(tmp_path, tmp_path / "unused", "0 1 2")  # all results exist: nothing is trained
    assert rows == [[run.replace("_", " "), "3", "13.00 ± 3.61", "26.00 ± 7.21", "5.00 ± 0.00"] for run in RUNS]


@pytest.mark.full
def test_script_trains_and_probes_every_run(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("unlabeled", 4), ("val", 2)):
        for number in range(count):
            pixels, mask = render_scene(0, "train", number, 96, 72)
            write_image(tmp_path / f"data/{split}2017/{number}.jpg", pixels)
            write_image(tmp_path / f"data/semantic27/{split}2017/{number}.png", mask)
    small = ["--dim-hidden", "16", "--dim-out", "8", "--epochs", "1", "--warmup-epoch", "0", "--image-size", "32"]
    rows = compare(tmp_path, tmp_path / "data", "3", *small, "--batch-size", "4", "--num-workers", "0")
    assert [row[0] for row in rows] == [run.replace("_", " ") for run in RUNS]
