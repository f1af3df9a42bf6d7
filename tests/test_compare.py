"""Several runs' probes in one table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from transfer.probe import compare

SCRIPT = Path(__file__).parents[1] / "scripts" / "compare.sh"


def write(folder: Path, name: str, seed: int, miou: float, untrained: float) -> None:
    path = folder / name / f"seed_{seed}" / "probe" / "results.json"
    path.parent.mkdir(parents=True)
    rows = {"checkpoint": miou, "untrained": untrained}
    results = {which: {"linear probe": {"miou": value, "accuracy": 2 * value}} for which, value in rows.items()}
    path.write_text(json.dumps({"results": results}))


def test_mean_and_deviation_over_the_seeds_beside_the_untrained_encoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, value in enumerate([10.0, 12.0, 17.0]):
        write(tmp_path, "SlotFA_paper", seed, value, 5.0)
    write(tmp_path, "SlotCon", 0, 9.0, 5.0)
    compare.main([str(tmp_path)])
    said = capsys.readouterr().out
    assert "| SlotFA paper | 3 | 13.00 ± 3.61 | 26.00 ± 7.21 | 5.00 ± 0.00 |" in said
    assert "| SlotCon | 1 | 9.00 | 18.00 | 5.00 |" in said


def test_a_folder_without_results_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        compare.main([str(tmp_path)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.full
def test_the_script_trains_and_measures_the_same_budget_for_all(photographs: Path, tmp_path: Path) -> None:
    """Cut to one epoch of tiny networks; a second call runs nothing again."""
    small = ["--dim-hidden", "16", "--dim-out", "8", "--epochs", "1", "--warmup-epoch", "0", "--image-size", "32"]
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "DATA": str(photographs), "SEEDS": "3"}
    command = ["bash", str(SCRIPT), *small, "--batch-size", "185", "--num-workers", "0"]
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    names = {"SlotCon", "SlotFA paper", "SlotFA contrast", "SlotFA released"}
    names |= {"SlotFA paper sigma 0.1", "SlotFA paper sigma 0.5"}
    assert {line.split(" | ")[0].removeprefix("| ") for line in done.stdout.splitlines()[2:]} == names
    assert "step" not in done.stderr
