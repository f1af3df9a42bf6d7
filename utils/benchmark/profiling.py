"""Where the time of a step goes: a trace, and its operators by their own time."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from utils.benchmark.stepping import Stepper
from utils.errors import UsageError
from utils.files import atomic_write_text

STEPS = 3
SHOWN = 12
_LISTED = 60
_NAME = 50
"""Characters of an operator's name on the screen."""


class Operator(NamedTuple):
    """What an operator or kernel of some name took in all its calls."""

    name: str
    microseconds: float
    """Its own, on the GPU if there is one; without those of the operators that it calls."""
    calls: int


def profile(stepper: Stepper, folder: Path) -> str:
    """Write `trace.json.gz` and `table.txt` of a few steps into `folder`; returns the table's upper part.

    Raises:
        UsageError: the folder cannot be written.
    """
    gpu = stepper.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        stepper.take(STEPS)
    events = list(profiler.key_averages())
    tables = {"operator": on_gpu(events) if gpu else on_cpu(events)}
    if gpu:
        tables["kernel"] = kernels(events)
    where = "the GPU" if gpu else "the CPU"
    title = f"{STEPS} steps, own time on {where}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        whole = [listing(operators, kind, _LISTED) for kind, operators in tables.items()]
        atomic_write_text(folder / "table.txt", "\n\n".join([title, *whole]) + "\n")
        profiler.export_chrome_trace(str(folder / "trace.json.gz"))
    except OSError as error:
        raise UsageError(f"--profile {folder}: cannot be written ({error.strerror})") from None
    shown = listing(tables["operator"], "operator", SHOWN, lambda name: name[:_NAME])
    return f"{title}; all in {folder / 'table.txt'}, trace.json.gz beside it\n{shown}\n"


def on_cpu(events: list) -> list[Operator]:
    """Operators by their own time on the CPU, in all threads."""
    return _ordered([Operator(event.key, event.self_cpu_time_total, event.count) for event in events])


def on_gpu(events: list) -> list[Operator]:
    """Operators by the time of the kernels that they launch; CUDA graphs launch without operators."""
    there = [event for event in events if event.device_type == DeviceType.CPU]
    operators = [Operator(event.key, event.self_device_time_total, event.count) for event in there]
    rest = sum(kernel.microseconds for kernel in kernels(events)) - sum(each.microseconds for each in operators)
    return _ordered([*operators, Operator("(by no operator)", max(0.0, rest), 1)])


def kernels(events: list) -> list[Operator]:
    """What ran on the GPU: kernels, copies, fills."""
    there = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    return _ordered([Operator(event.key, event.self_device_time_total, event.count) for event in there])


def _ordered(operators: list[Operator]) -> list[Operator]:
    return sorted((each for each in operators if each.microseconds > 0), key=lambda each: -each.microseconds)


def listing(operators: list[Operator], kind: str, count: int, cut: Callable[[str], str] = str) -> str:
    """The first `count` as lines: share of all their time, milliseconds and calls a step, name."""
    total = sum(each.microseconds for each in operators)
    lines = [f"{'share':>7}{'ms a step':>11}{'calls a step':>14}  {kind}"]
    for each in operators[:count]:
        share, milliseconds = each.microseconds / total, each.microseconds / STEPS / 1000
        lines.append(f"{share:7.1%}{milliseconds:11.2f}{each.calls / STEPS:14.1f}  {cut(each.name)}")
    return "\n".join(lines)
