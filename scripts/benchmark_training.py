"""Benchmarks of the training step alone, and of training from image files."""

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
from torch import _dynamo as dynamo
from torch.profiler import profile
from torch.utils.benchmark import timer

from data.loader import prefetch
from main_pretrain import build_run, train_step
from models import Method
from models.gtsa import GTSA
from scripts.benchmark_loader import EPOCH_BATCHES, data_loader, rendered_batch
from scripts.benchmark_table import Row, quartiles
from scripts.pairwise_gtsa import PairwiseGTSA
from utils import distributed
from utils.batch import Batch
from utils.device import choose_device, loader_workers
from utils.errors import UsageError
from utils.finite import FiniteGuard
from utils.meter import Meter

BASELINE = {"compile": False, "cuda_graphs": False, "activation_budget": 1.0}
"""Arguments of the baseline of --reference, which also is in the layout NCHW."""
BASELINE_METHODS: dict[type[Method], type[Method]] = {GTSA: PairwiseGTSA}
"""The methods whose baseline also computes the same losses by loops."""


class TimedRun:
    """A training run whose steps are timed; its batches are one batch from memory, unless `batches` is replaced."""

    def __init__(self, args: argparse.Namespace, batch: Batch, memory_format: torch.memory_format):
        self.args, self.device = args, choose_device(args)
        self.training_run = build_run(args, self.device, EPOCH_BATCHES * args.batch_size * args.accum_steps)
        method, plan = self.training_run.method, self.training_run.plan
        self.step = plan.total_steps // 2  # some losses start after some epochs
        self.model = distributed.wrap_ddp(method.to(memory_format=memory_format), self.device)
        self.guard = FiniteGuard(method, self.device)
        self.meter = Meter(self.device, plan.num_images, method.build_monitor(plan.steps_per_epoch))
        batches = itertools.repeat(batch.pin_memory() if self.device.type == "cuda" else batch)
        self.batches = prefetch(self.meter.timed(batches), self.device)

    def run_steps(self, steps: int) -> float:
        """Run optimizer steps and return the mean seconds of one; raise a `UsageError` if they do not compile."""
        start = timer()
        try:
            with dynamo.config.patch(suppress_errors=False, fail_on_recompile_limit_hit=True):
                for _ in range(steps):
                    train_step(self.training_run, self.model, self.batches, self.guard, self.meter, self.step)
                    self.step += 1
        except Exception as error:  # compilers and backends raise errors of many kinds
            if not self.args.compile or isinstance(error, UsageError | torch.OutOfMemoryError):
                raise
            raise UsageError(f"the compiled step failed: {type(error).__name__}: {str(error)[:400]}") from error
        return (timer() - start) / steps

    def peak_memory(self, steps: int) -> Row:
        """Return the peak GPU memory of `steps` steps on the rank that needs most; CUDA graphs count as reserved."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        self.run_steps(steps)
        peaks = torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
        allocated, reserved = (max(values) / 2**30 for values in zip(*distributed.all_gather_object(peaks)))
        return {"peak GiB": allocated, "reserved GiB": reserved}


def benchmark_step(args: argparse.Namespace, options: argparse.Namespace, name: str) -> list[Row]:
    """Return the row of one run: speed, memory, time to the first step, and graphs that were compiled after it."""
    batch, start = rendered_batch(args), timer()
    runs = [TimedRun(args, batch, torch.channels_last)]
    runs[0].run_steps(1)
    first_step_seconds = timer() - start
    graphs = dynamo.utils.counters["stats"]["unique_graphs"]
    runs[0].run_steps(options.warm_up)
    memory = runs[0].peak_memory(options.warm_up) if runs[0].device.type == "cuda" else {}
    if options.reference:
        runs.append(TimedRun(argparse.Namespace(**vars(args) | BASELINE), batch, torch.contiguous_format))
        baseline_method = runs[1].training_run.method
        baseline_method.__class__ = BASELINE_METHODS.get(type(baseline_method), type(baseline_method))
        runs[1].run_steps(options.warm_up)
    block = 1 if runs[0].device.type == "cpu" else 10
    # The runs alternate, so that a change of the machine's speed affects both.
    blocks = [min(block, options.steps - done) for done in range(0, options.steps, block)]
    times = [[run.run_steps(steps) for run in runs] for steps in blocks]
    seconds, *baseline = np.array(times).T
    images = runs[0].training_run.plan.effective_batch
    row: Row = {"images/s": quartiles(images / seconds), "ms/step": quartiles(1000 * seconds)}
    if baseline:
        row |= {"baseline images/s": quartiles(images / baseline[0]), "speed-up": quartiles(baseline[0] / seconds)}
    row |= memory | {"first step s": first_step_seconds}
    if runs[0].args.compile:
        row["recompilations"] = dynamo.utils.counters["stats"]["unique_graphs"] - graphs
    if options.profile:
        profile_steps(runs[0], options.profile, name)
    return [row]


def profile_steps(run: TimedRun, folder: Path, name: str) -> None:
    """Print where a few steps spend their time; write all operators to `name`.txt and a trace to `name`.json.gz."""
    with profile() as profiler:  # of all activities that the machine supports
        run.run_steps(3)
    if distributed.is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"{name}.json.gz"))
        averages = profiler.key_averages()
        order = "self_cpu_time_total" if run.device.type == "cpu" else "self_device_time_total"
        (folder / f"{name}.txt").write_text(averages.table(order, row_limit=200, max_name_column_width=120))
        print(averages.table(order, row_limit=15, max_name_column_width=60), flush=True)


def benchmark_end_to_end(args: argparse.Namespace, options: argparse.Namespace, name: str) -> list[Row]:
    """Return the row of one run from image files; speeds are means, because workers deliver in bursts."""
    loader = data_loader(args, options.data_dir, loader_workers(args.num_workers))
    run = TimedRun(args, rendered_batch(args), torch.channels_last)
    run.run_steps(options.warm_up)
    step_only = run.run_steps(options.steps)
    run.batches = prefetch(run.meter.timed(loader), run.device, loader.dataset.view_recipes)  # type: ignore[attr-defined]
    run.run_steps(options.warm_up + 2 * loader.num_workers)  # the workers' first batches arrive all at once
    run.meter.read(run.step)
    seconds = run.run_steps(options.steps)
    data_wait = run.meter.read(run.step)[0]["speed/data_wait"]
    images = run.training_run.plan.effective_batch
    row = {"workers": loader.num_workers, "images/s": images / seconds, "step-only images/s": images / step_only}
    return [row | {"% of step-only": 100 * step_only / seconds, "data wait %": 100 * data_wait}]
