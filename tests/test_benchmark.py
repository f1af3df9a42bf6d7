"""The benchmark's tables: a row for everything that is asked for, numbers that belong together, no timings."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

import main_pretrain
from scripts import benchmark
from tests.helpers import run_expecting_usage_error
from utils.benchmark import profiling, report, step, timing
from utils.benchmark.configurations import Configuration
from utils.benchmark.rows import fill
from utils.benchmark.stepping import Block, Stepper, memory_batch, reference_stepper
from utils.benchmark.table import Spread, Table

SCRIPT = Path(benchmark.__file__)
FLAGS = ["--arch", "resnet18", "--image-size", "32", "--dim-hidden", "32", "--dim-out", "16", "--num-prototypes", "8"]
FLAGS += ["--device", "cpu", "--num-workers", "1", "--batch-size", "4"]
SHORT = ["--steps", "2", "--warm-up", "1"]


def measure(tmp_path: Path, *options: str, flags: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run the benchmark, and return what it writes for programs; the Markdown has as many rows."""
    files = tmp_path / "table.md", tmp_path / "table.json"
    benchmark.main([*options, "--out", str(files[0]), "--out", str(files[1]), "--", *FLAGS, *flags])
    written = json.loads(files[1].read_text())
    table = [line for line in files[0].read_text().splitlines() if line.startswith("| ")]
    assert len(table) == 2 + len(written["rows"])
    for row in written["rows"]:
        for cell in row.values():
            assert not isinstance(cell, dict) or cell["lowest"] <= cell["median"] <= cell["highest"]
    return written


def assert_rate(rate: dict[str, float], milliseconds: dict[str, float], images: int) -> None:
    for of_rate, of_time in (("median", "median"), ("lowest", "highest"), ("highest", "lowest")):
        assert rate[of_rate] * milliseconds[of_time] == pytest.approx(1000 * images)


def test_a_step_s_table_has_every_method_batch_and_switch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    span = ["--methods", "slotcon", "slotfa", "--batch-sizes", "2", "4", "--switch=", "--switch=--clip-grad 1"]
    written = measure(tmp_path, "step", *span, "--steps", "1", "--warm-up", "1")
    names = [(row["method"], row["batch_size"], row["switches"]) for row in written["rows"]]
    assert names == list(product(("slotcon", "slotfa"), (2, 4), ("", "--clip-grad 1")))
    for row in written["rows"]:
        assert_rate(row["images_per_second"], row["milliseconds_per_step"], row["batch_size"])
        assert row["first_step_seconds"] > 0
        assert (row["compiled"], row["precision"]) == (False, "off")
    # A process's peak never falls again.
    assert [row["peak_memory_gib"] is None for row in written["rows"]] == [False] + [True] * 7
    assert "8 of 8: slotfa, batch 4, --clip-grad 1" in capsys.readouterr().err


def test_files_name_machine_versions_revision_and_command(tmp_path: Path) -> None:
    facts = measure(tmp_path, "step", *SHORT, flags=("--seed", "3"))["facts"]
    assert str(torch.__version__) in facts["versions"]
    assert facts["device"] == report.device_name(torch.device("cpu"))
    assert facts["device"]
    assert facts["command"].startswith("python scripts/benchmark.py step --steps 2")
    assert facts["command"].endswith("--seed 3")
    text = (tmp_path / "table.md").read_text()
    assert all(fact in text for fact in facts.values())


def test_the_reference_is_timed_beside_the_run_and_the_profile_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "profile"
    written = measure(tmp_path, "step", "--reference", "--profile", str(folder), *SHORT)
    (row,) = written["rows"]
    assert row["method"] == "slotcon"
    assert row["speed_up"]["median"] > 0
    assert row["reference_images_per_second"]["median"] > 0
    assert {path.name for path in folder.iterdir()} == {"trace.json.gz", "table.txt"}
    assert (folder / "trace.json.gz").read_bytes()[:2] == b"\x1f\x8b"
    text = (folder / "table.txt").read_text()
    assert "aten::convolution_backward" in text
    shares = [float(share) for share in re.findall(r"^ *([\d.]+)%", text, re.MULTILINE)]
    assert len(shares) > profiling.SHOWN
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) <= 101
    assert "aten::convolution_backward" in capsys.readouterr().out


def test_several_rows_have_a_profile_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []
    monkeypatch.setattr(step, "profile", lambda _stepper, folder: folders.append(folder.name))
    options = ["--batch-sizes", "2", "4", "--switch=--clip-grad 1", "--steps", "1", "--warm-up", "1"]
    measure(tmp_path, "step", "--profile", str(tmp_path / "profile"), *options)
    assert folders == ["slotcon_batch_2_clip_grad_1", "slotcon_batch_4_clip_grad_1"]


def test_the_loader_s_parts_and_its_workers(tmp_path: Path, images: Path) -> None:
    options = ["--data-dir", str(images), "--images", "4", "--workers", "0", "1"]
    switches = ["", "--min-scale 0.5"]
    rows = measure(tmp_path, "loader", "--batch-sizes", "2", "3", *(f"--switch={s}" for s in switches), *options)[
        "rows"
    ]
    parts = ["worker", "decoding alone", "Pillow transforms", "color on the CPU"]
    loaders = ["DataLoader", "DataLoader, prefetch"]
    names = [(row["switches"], row["part"], row.get("batch_size"), row.get("workers")) for row in rows]
    assert sorted(names, key=str) == sorted(
        [
            *((*both, None, None) for both in product(switches, parts)),
            *((switch, part, size, n) for switch, size, n, part in product(switches, (2, 3), (0, 1), loaders)),
        ],
        key=str,
    )
    for row in rows:
        assert_rate(row["images_per_second"], row["milliseconds_per_image"], 1)
        assert ("times_worker" in row) == (row["part"] in parts)
    assert rows[0]["times_worker"] == {"median": 1, "lowest": 1, "highest": 1}


def test_end_to_end_beside_the_step_alone(tmp_path: Path, images: Path) -> None:
    switches = ["--switch=", "--switch=--num-workers 0"]
    written = measure(tmp_path, "end-to-end", "--data-dir", str(images), *SHORT, *switches)
    assert [(row["batch_size"], row["workers"]) for row in written["rows"]] == [(4, 1), (4, 0)]
    for row in written["rows"]:
        rate, alone = row["images_per_second"]["median"], row["step_alone_images_per_second"]["median"]
        assert row["percent_of_step_alone"] == pytest.approx(100 * rate / alone)
        assert 0 < row["percent_waiting"]["median"] < 100


def test_without_a_folder_photographs_are_rendered(tmp_path: Path) -> None:
    rows = measure(tmp_path, "loader", "--images", "2", "--workers", "0")["rows"]
    assert rows[0]["images_per_second"]["median"] > 0


def test_the_command_s_table_fits_a_terminal() -> None:
    switch = "--clip-grad 1 --base-lr 0.5 --momentum 0.5"
    environment = {**os.environ, "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "step", f"--switch={switch}", "--reference", *SHORT, "--", *FLAGS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert f"{switch}:\nslotcon " in done.stdout


def arguments(*flags: str) -> Any:
    return main_pretrain.parse_args([*FLAGS, *flags])


def conv_layouts(stepper: Stepper) -> set[bool]:
    """Whether the 3 x 3 weights, and the maps of both networks in a step, lie in NCHW."""
    layouts = {weight.is_contiguous() for weight in stepper.run.method.parameters() if weight.shape[2:] == (3, 3)}
    for module in stepper.run.method.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda _module, _inputs, maps: layouts.add(maps.is_contiguous()))
    stepper.take(1)
    return layouts


def test_the_reference_is_eager_keeps_all_and_lies_in_nchw() -> None:
    args = arguments("--image-size", "96", "--compile", "--activation-budget", "0.5")
    stepper = reference_stepper(args, memory_batch(args))
    run = stepper.run
    assert not set(run.method.compiled) & set(vars(run.method))  # where `compile_method` puts compiled code
    assert (run.args.compile, run.args.cuda_graphs, run.args.activation_budget) == (False, False, 1)
    assert (args.compile, args.activation_budget) == (True, 0.5)
    assert conv_layouts(stepper) == {True}


def test_the_run_itself_lies_as_a_run_does() -> None:
    args = arguments("--image-size", "96")
    assert conv_layouts(Stepper(args, memory_batch(args))) == {False}


def test_each_step_goes_on_from_the_last() -> None:
    args = arguments("--warmup-epoch", "0", "--base-lr", "1")
    stepper = Stepper(args, memory_batch(args))
    before = [weight.clone() for weight in stepper.run.method.encoder_q.parameters()]
    block = stepper.take(3)
    assert stepper.taken == 3
    assert block.seconds > 0
    assert 0 <= block.data_wait <= 1
    assert any((new != old).any() for new, old in zip(stepper.run.method.encoder_q.parameters(), before))


def test_blocks_are_taken_in_turns() -> None:
    taken = []

    class Fake:
        def __init__(self, name: str):
            self.name = name

        def take(self, steps: int) -> Block:
            taken.append((self.name, steps))
            return Block(len(taken), 0)

    options = SimpleNamespace(steps=6, block=2)
    assert timing.in_turns([Fake("a"), Fake("b")], options) == [[1, 3, 5], [2, 4, 6]]  # type: ignore[list-item, arg-type]
    assert taken == [("a", 2), ("b", 2)] * 3


@pytest.mark.parametrize(
    ("given", "device", "wanted"),
    [
        ((None, None, None), "cuda", (100, 10, 10)),
        ((None, None, None), "cpu", (20, 3, 1)),
        ((None, 5, 25), "cuda", (250, 5, 25)),
        ((8, None, 4), "cpu", (8, 3, 4)),
    ],
)
def test_steps_that_are_not_given_fit_the_device(
    given: tuple[int | None, ...], device: str, wanted: tuple[int, ...]
) -> None:
    options = SimpleNamespace(steps=given[0], warm_up=given[1], block=given[2])
    timing.resolve(options, torch.device(device))  # type: ignore[arg-type]
    assert (options.steps, options.warm_up, options.block) == wanted


def test_a_row_that_does_not_fit_costs_no_other() -> None:
    found = [Configuration(arguments("--batch-size", size), "") for size in ("2", "4")]
    table = Table("", {"batch_size": "batch", "rate": "rate"})

    def cells(configuration: Configuration) -> dict[str, Any]:
        if configuration.args.batch_size == 2:
            raise torch.OutOfMemoryError
        return {"rate": 1.0}

    fill(table, found, cells)
    assert [(row["batch_size"], row.get("rate")) for row in table.rows] == [(2, None), (4, 1.0)]
    assert table.notes == ["slotcon, batch 2: the GPU's memory does not suffice"]


def test_a_reference_that_does_not_fit_costs_no_more_than_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> Stepper:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(step, "reference_stepper", full)
    written = measure(tmp_path, "step", "--reference", *SHORT)
    assert written["rows"][0]["images_per_second"]["median"] > 0
    assert "speed_up" not in written["rows"][0]
    assert any("no reference" in note for note in written["notes"])


def test_a_spread_in_other_units() -> None:
    seconds = Spread.of([2.0, 1.0, 4.0])
    assert seconds == Spread(2, 1, 4)
    assert seconds.times(1000) == Spread(2000, 1000, 4000)
    assert seconds.under(8) == Spread(4, 2, 8)


def test_a_table_for_eyes() -> None:
    table = Table("Title", {"name": "name", "switches": "switches", "rate": "images/s", "gap": "never seen"})
    table.rows = [{"name": "a", "switches": "", "rate": Spread(1234, 9.5, 12345.6)}]
    table.rows += [{"name": "b", "switches": "--x 1", "rate": None}]
    table.note("once")
    table.note("once")
    assert table.text(80).splitlines() == [
        "Title",
        "",
        "name  switches     images/s",
        "a                      1234",
        "                9.50..12346",
        "b     --x 1",
        "",
        "- once",
    ]
    assert table.text(25).splitlines()[2:-2] == [
        "name     images/s",
        "no switches:",
        "a            1234",
        "      9.50..12346",
        "--x 1:",
        "b",
    ]
    assert table.markdown().splitlines() == [
        "| name | switches | images/s |",
        "| --- | --- | --- |",
        "| a |  | 1234 (9.50..12346) |",
        "| b | `--x 1` |  |",
        "",
        "- once",
    ]


def test_time_on_a_gpu_that_no_operator_launched_is_shown() -> None:
    def event(key: str, device: DeviceType, microseconds: float, annotation: bool = False) -> SimpleNamespace:
        time = {"self_device_time_total": microseconds, "self_cpu_time_total": 1.0}
        return SimpleNamespace(key=key, device_type=device, count=6, is_user_annotation=annotation, **time)

    events = [
        event("aten::mm", DeviceType.CPU, 30),
        event("aten::view", DeviceType.CPU, 0),
        event("gemm", DeviceType.CUDA, 30),
        event("in a graph", DeviceType.CUDA, 70),
        event("Optimizer.step", DeviceType.CUDA, 100, annotation=True),
    ]
    assert [(each.name, each.microseconds) for each in profiling.kernels(events)] == [("in a graph", 70), ("gemm", 30)]
    operators = profiling.on_gpu(events)
    assert [(each.name, each.microseconds) for each in operators] == [("(by no operator)", 70), ("aten::mm", 30)]
    lines = profiling.listing(operators, "operator", 1).splitlines()
    assert [line.split()[0] for line in lines] == ["share", "70.0%"]


mistake = partial(run_expecting_usage_error, benchmark.main)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["walk"], "walk"),
        (["step", "--methods", "moco"], "moco"),
        (["step", "--batch-sizes", "0"], "--batch-sizes"),
        (["step", "--steps", "3", "--block", "2"], "--block"),
        (["step", "--switch=--no-such-flag"], "--no-such-flag"),
        (["step", "--switch=--cuda-graphs"], "--cuda-graphs"),
        (["step", "--switch='"], "--switch"),
        (["step", "--out", "table.csv"], ".json"),
        (["step", "--out", "there.md/table.md"], "nothing can be written"),
        (["step", "--out", "there.md"], "--overwrite"),
        (["step", "--profile", "there.md"], "--profile"),
        (["step", "--profile", "full"], "--overwrite"),
        (["end-to-end", "--data-dir", "nowhere"], "--data-dir"),
        (["loader", "--data-dir", "full"], "no images"),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(
    argv: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.md").write_text("precious")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "there.md").write_text("precious")
    assert named in mistake([*argv, "--", *FLAGS], capsys)
    assert (tmp_path / "there.md").read_text() == "precious"


def test_a_file_is_written_over_when_asked(tmp_path: Path) -> None:
    file = tmp_path / "table.md"
    file.write_text("old")
    benchmark.main(["step", "--out", str(file), "--overwrite", "--steps", "1", "--warm-up", "1", "--", *FLAGS])
    assert "images/s" in file.read_text()
