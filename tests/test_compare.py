"""scripts/compare.sh: the same training for all methods, one table of their linear probes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.demo import render_scene
from scripts.compare_table import render_table
from tests.probe_data import write_image

SCRIPT = Path(__file__).parents[1] / "scripts" / "compare.sh"
RUNS = ("SlotCon", "SlotFA_contrast", "SlotFA_paper", "SlotFA_paper_sigma_0.1", "SlotFA_paper_sigma_0.5")
RUNS += ("SlotFA_released",)


def compare(folder: Path, data: Path, seeds: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run the script with the output folder `folder`."""
    environment = {**os.environ, "DATA": str(data), "SEEDS": seeds, "OUT": str(folder)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = ["bash", str(SCRIPT), *flags]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def table_cells(table: str) -> list[list[str]]:
    """Return the cells of the rows of a printed table."""
    lines = [line for line in table.splitlines() if line.startswith("| S")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def write_results(run: Path, miou: float) -> None:
    values = {"checkpoint": miou, "untrained": 5.0}
    results = {which: {"linear probe": {"miou": value, "accuracy": 2 * value}} for which, value in values.items()}
    (run / "probe").mkdir(parents=True)
    (run / "probe/results.json").write_text(json.dumps({"results": results}))


def test_table_shows_mean_and_deviation_over_seeds(tmp_path: Path) -> None:
    for seed, miou in enumerate((10.0, 12.0, 17.0)):
        write_results(tmp_path / f"SlotFA_paper/seed_{seed}", miou)
    write_results(tmp_path / "SlotCon/seed_0", 11.0)
    assert table_cells(render_table(tmp_path)) == [
        ["SlotCon", "1", "11.00", "22.00", "5.00"],
        ["SlotFA paper", "3", "13.00 ± 3.61", "26.00 ± 7.21", "5.00 ± 0.00"],
    ]


def test_finished_runs_are_kept_and_other_flags_are_refused(tmp_path: Path) -> None:
    for run in RUNS:
        write_results(tmp_path / run / "seed_1", 10.0)
    done = compare(tmp_path, tmp_path / "unused", "1", "--epochs", "2")
    assert done.returncode == 0, done.stderr
    assert [row[0] for row in table_cells(done.stdout)] == [run.replace("_", " ") for run in RUNS]
    flags = tmp_path / "SlotFA_paper/seed_1/flags"
    flags.write_text("--epochs 1\n")
    done = compare(tmp_path, tmp_path / "unused", "1", "--epochs", "2")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert str(flags) in done.stderr


@pytest.mark.full
def test_script_trains_and_probes_every_run(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("unlabeled", 4), ("val", 2)):
        for number in range(count):
            pixels, mask = render_scene(0, "train", number, 96, 72)
            write_image(tmp_path / f"data/{split}2017/{number}.jpg", pixels)
            write_image(tmp_path / f"data/semantic27/{split}2017/{number}.png", mask)
    small = ["--dim-hidden", "16", "--dim-out", "8", "--epochs", "1", "--warmup-epoch", "0", "--image-size", "32"]
    flags = [*small, "--batch-size", "4", "--num-workers", "0"]
    for _ in range(2):  # the second call trains nothing
        done = compare(tmp_path, tmp_path / "data", "3", *flags)
        assert done.returncode == 0, done.stderr
        assert [row[0] for row in table_cells(done.stdout)] == [run.replace("_", " ") for run in RUNS]
    done = compare(tmp_path, tmp_path / "data", "3", *flags, "--epochs", "2")
    assert done.returncode == 2
    assert "SlotCon/seed_3/flags" in done.stderr
