"""The benchmark: its tables, its three commands at a tiny size, and the errors that end it; nothing about speed."""

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import main_pretrain
from models.gtsa import GTSA
from scripts import benchmark, benchmark_loader, benchmark_training
from scripts.benchmark_table import quartiles, render
from scripts.pairwise_gtsa import PairwiseGTSA
from tests.helpers import TINY, run_expecting_usage_error, tiny_flags
from utils.batch import Batch

FLAGS = ["--", *TINY, "--image-size", "32", "--batch-size", "4", "--num-workers", "1"]
SHORT = ["--steps", "1", "--warm-up", "1"]


def run_benchmark(tmp_path: Path, *argv: str) -> list[dict[str, Any]]:
    """Run a command in this process, and return the rows of its JSON file."""
    path = tmp_path / "table.json"
    benchmark.main([*argv[:1], "--out", str(path), *argv[1:], *([] if "--" in argv else FLAGS)])
    return json.loads(path.read_text())["rows"]


def test_table_shows_medians_with_quartiles_and_omits_empty_columns() -> None:
    assert quartiles(np.array([4.0, 1.0, 3.0, 2.0, 5.0])) == {"p25": 2, "median": 3, "p75": 4}
    rows = [
        {"method": "slotcon", "switch": "", "batch": 64, "images/s": {"p25": 99.94, "median": 1234.5, "p75": 1300}},
        {"method": "slotfa", "switch": "", "batch": 512, "images/s": "out of memory", "peak GiB": 7.126},
    ]
    assert render(rows, "simple").splitlines() == [
        "method      batch          images/s    peak GiB",
        "--------  -------  ----------------  ----------",
        "slotcon        64  1234 (99.9-1300)",
        "slotfa        512     out of memory        7.13",
    ]
    assert render(rows, "github").splitlines()[3].split("|")[3].strip() == "out of memory"


def test_reference_and_profile_and_metadata_are_written(tmp_path: Path) -> None:
    path, folder = tmp_path / "table.md", tmp_path / "profile"
    switch = "--switch=--save-freq 1 --output-dir a/../b"
    argv = ["--reference", "--profile", str(folder), "--out", str(path), switch, *SHORT]
    (row,) = run_benchmark(tmp_path, "step", *argv)
    assert row["images/s"]["median"] * row["ms/step"]["median"] == pytest.approx(1000 * row["batch"])
    assert row["first step s"] > 0
    assert row["speed-up"]["median"] > 0
    assert row["baseline images/s"]["median"] > 0
    name = "slotcon_4_--save-freq_1_--output-dir_a_.._b"  # one file name, whatever the flags
    assert "aten::convolution_backward" in (folder / f"{name}.txt").read_text()
    assert (folder / f"{name}.json.gz").read_bytes()[:2] == b"\x1f\x8b"
    metadata = json.loads((tmp_path / "table.json").read_text())["metadata"]
    assert str(torch.__version__) in metadata["versions"]
    assert metadata["command"].startswith("scripts/benchmark.py step --out ")
    text = path.read_text()
    assert all(value in text for value in metadata.values())
    assert "| slotcon " in text


def test_baseline_is_eager_and_contiguous_and_the_run_itself_channels_last() -> None:
    args = main_pretrain.parse_args([*FLAGS[1:], "--compile", "--activation-budget", "0.5"])
    baseline_args = main_pretrain.argparse.Namespace(**vars(args) | benchmark_training.BASELINE)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        run = benchmark_training.TimedRun(baseline_args, benchmark_loader.rendered_batch(args), memory_format)
        method = run.training_run.method
        assert not set(method.compiled) & set(vars(method))  # where `compile_methods` stores compiled code
        before = method.encoder_q.state_dict()["conv1.weight"].clone()
        maps: list[torch.Tensor] = []
        method.encoder_q.layer1.register_forward_hook(lambda module, inputs, output, maps=maps: maps.append(output))
        run.run_steps(2)
        assert len(maps) == 4
        assert all(features.is_contiguous(memory_format=memory_format) for features in maps)
        assert (method.encoder_q.state_dict()["conv1.weight"] != before).any()


@pytest.mark.usefixtures("small_encoder")
def test_gtsa_is_timed_with_all_losses_and_against_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[set[str]] = []
    forwards = {method: method.forward for method in (GTSA, PairwiseGTSA)}
    for method, forward in forwards.items():

        def recorded(self: Any, batch: Batch, forward: Any = forward, name: str = method.__name__) -> Any:
            output = forward(self, batch)
            losses.append({name, *output})
            return output

        monkeypatch.setattr(method, "forward", recorded)
    flags = tiny_flags("--method", "gtsa", "--image-size", "32", "--batch-size", "4")
    (row,) = run_benchmark(tmp_path, "step", "--reference", *SHORT, "--", *flags)
    assert row["speed-up"]["median"] > 0
    for name in ("GTSA", "PairwiseGTSA"):
        outputs = [names for names in losses if name in names]
        assert len(outputs) >= 2
        assert all({"loss/crop", "loss/correspondence", "loss/rotation"} <= names for names in outputs)


def compile_with(backend: Any) -> Callable[..., Any]:
    """Return a `torch.compile` that uses `backend`, except for the check in `resolve_compile`."""
    compile_function = torch.compile

    def compile(function: Any, **options: Any) -> Any:
        return compile_function(function, backend="eager" if function is torch.nn.functional.gelu else backend)

    return compile


def test_code_that_cannot_be_compiled_ends_the_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(graph: object, inputs: object) -> Any:
        raise RuntimeError("no such\ninstruction")

    monkeypatch.setattr(torch, "compile", compile_with(fail))
    with pytest.raises(SystemExit) as exit_info:
        benchmark.main(["step", *SHORT, *FLAGS, "--compile"])
    assert exit_info.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    _progress, error = output.err.splitlines()
    assert "compiled step failed" in error
    assert "no such instruction" in error


def test_machine_without_a_compiler_ends_the_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A training run would continue without compilation, at a fraction of the speed."""
    monkeypatch.setattr("utils.compiler._compile_error", lambda device: "no compiler")
    assert "no compiler" in run_expecting_usage_error(benchmark.main, ["step", *FLAGS, "--compile"], capsys)


def test_recompilations_after_the_first_step_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = iter([3, 0, 2])
    counts = benchmark_training.dynamo.utils.counters["stats"]

    def train_step(*args: Any) -> None:
        counts["unique_graphs"] += next(graphs)

    monkeypatch.setattr("utils.compiler._compile_error", lambda device: "")
    monkeypatch.setattr(benchmark_training, "train_step", train_step)
    (row,) = run_benchmark(tmp_path, "step", *SHORT, *FLAGS, "--compile")
    assert row["recompilations"] == 2


def test_loader_has_rows_for_the_parts_and_for_the_workers(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark_loader, "MIN_SECONDS", 0.0)
    argv = ["--data-dir", str(images), "--images", "2", "--workers", "0", "1"]
    rows = run_benchmark(tmp_path, "loader", *argv)
    parts = ["worker (decode, crop, resize)", "decode", "torchvision on Pillow images", "color augmentation on cpu"]
    names = [(part, None) for part in parts] + [
        ("loader and color augmentation", 0),
        ("loader and color augmentation", 1),
    ]
    assert [(row["part"], row.get("workers")) for row in rows] == names
    for row in rows:
        assert row["images/s"]["p25"] * row["ms/image"]["p75"] == pytest.approx(1000)


def test_end_to_end_compares_with_the_step_alone(tmp_path: Path, images: Path) -> None:
    (row,) = run_benchmark(tmp_path, "end-to-end", "--data-dir", str(images), *SHORT)
    assert row["workers"] == 1
    assert row["% of step-only"] == pytest.approx(100 * row["images/s"] / row["step-only images/s"])
    assert 0 < row["data wait %"] < 100


def test_every_combination_of_method_batch_size_and_switch_has_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(benchmark.COMMANDS, "step", (lambda args, *_: [{"images/s": args.clip_grad}], ""))
    argv = ["--methods", "slotcon", "slotfa", "--batch-sizes", "2", "4", "--switch=", "--switch=--clip-grad 1"]
    rows = run_benchmark(tmp_path, "step", *argv)
    names = [(row["method"], row["batch"], row["switch"]) for row in rows]
    assert names == list(product(("slotcon", "slotfa"), (2, 4), ("", "--clip-grad 1")))
    assert [row["images/s"] for row in rows] == 4 * [0, 1]


def test_run_out_of_memory_does_not_end_the_other_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(args: Any, options: Any, name: str) -> list[dict[str, Any]]:
        if args.batch_size == 4:
            raise torch.OutOfMemoryError
        return [{"images/s": 1}]

    monkeypatch.setitem(benchmark.COMMANDS, "step", (measure, ""))
    rows = run_benchmark(tmp_path, "step", "--batch-sizes", "2", "4", "6")
    assert [row["images/s"] for row in rows] == [1, "out of memory", 1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["step", "--methods", "moco"], "moco"),
        (["step", "--switch=--no-such-flag"], "--no-such-flag"),
        (["step", "--switch='"], "--switch"),
        (["step", "--switch=--cuda-graphs"], "--cuda-graphs"),
        (["step", "--out", "table.csv"], ".json"),
        (["step", "--out", "existing.md"], "--overwrite"),
        (["step", "--profile", "existing.md"], "--profile"),
        (["loader", "--data-dir", "missing"], "--data-dir"),
    ],
)
def test_wrong_calls_are_refused_before_anything_is_measured(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("existing.md").write_text("existing")
    assert message in run_expecting_usage_error(benchmark.main, [*argv, *FLAGS], capsys)
    assert Path("existing.md").read_text() == "existing"


def test_two_ranks_share_the_batch_and_rank_0_prints(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, benchmark.__file__, "step", *SHORT, "--out", str(path), *FLAGS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("images/s") == 1
    written = json.loads(path.read_text())
    assert written["metadata"]["device"].startswith("2 x CPU")
    (row,) = written["rows"]
    assert row["images/s"]["median"] * row["ms/step"]["median"] == pytest.approx(1000 * 4)
