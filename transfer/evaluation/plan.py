"""The plan of evaluate.py on a machine without GPU: the runs, and how long they take."""

from collections import Counter

from tabulate import tabulate

from transfer.evaluation.runs import FineTuningRun
from transfer.evaluation.training_time import (
    count_encoder_flops,
    estimate_seconds,
    format_duration,
    measure_throughput,
)
from transfer.frameworks import data_root


def print_plan(runs: list[FineTuningRun], arch: str) -> None:
    """Print how long each fine-tuning of an encoder of this architecture takes on the CPU."""
    throughput = measure_throughput()
    rows, total = [], 0.0
    for name, count in Counter(run.name for run in runs).items():
        run = next(run for run in runs if run.name == name)
        linked = run.fine_tuning.dataset.count_val_images(data_root(run.fine_tuning.task))
        val_images = min(linked, run.length.max_val_images or linked)
        flops = run.fine_tuning.flops or count_encoder_flops(arch)
        seconds = count * estimate_seconds(run.length, flops, val_images, throughput)
        training = f"{run.length.iterations:,} x {run.length.batch_size}"
        evaluation = f"{run.length.evaluations} x {val_images:,}"
        rows.append((name, count, training, evaluation, format_duration(seconds)))
        total += seconds
    headers = ("fine-tuning", "runs", "iterations x images", "evaluations x images", "time on this CPU")
    print(tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 4)))
    print(
        f"In total {format_duration(total)}, estimated for the image sizes of the recipes from the speed of a "
        f"ResNet-50 on this CPU at the moment ({throughput:.0f} GFLOP/s, which is less while other programs run).",
        flush=True,
    )
