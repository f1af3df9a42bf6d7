"""What a run tells: progress bar, log.txt, metrics.jsonl, TensorBoard."""

import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils.errors import UsageError

Metrics = dict[str, float]
_BAR = "{desc} {percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}, {elapsed} gone, {remaining} left"


class RunLog:
    """Writes the run folder's records and shows the progress; on ranks other than 0 it does nothing.

    On a terminal the progress is a bar, elsewhere a line a report. TensorBoard's axis is the epoch times 1000, so
    that runs of different batch sizes lie over each other.
    """

    def __init__(self, folder: Path, total_steps: int, start_step: int, steps_per_epoch: int, active: bool):
        self.active, self.folder = active, folder
        self.steps_per_epoch, self.total_steps = steps_per_epoch, total_steps
        if not active:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _drop_after(folder / "metrics.jsonl", start_step)
            self._text = (folder / "log.txt").open("a", buffering=1)
            self._metrics = (folder / "metrics.jsonl").open("a", buffering=1)
            self._board = SummaryWriter(str(folder), purge_step=self._axis(start_step) + 1 if start_step else None)
        except OSError as error:
            raise UsageError(f"--output-dir {folder}: cannot be written ({error.strerror}); use another") from None
        quiet = not sys.stderr.isatty()
        self._bar = tqdm(
            total=total_steps, initial=start_step, disable=quiet, bar_format=_BAR, desc="start", dynamic_ncols=True
        )
        self._status = tqdm(total=0, position=1, disable=quiet, bar_format="{desc}", dynamic_ncols=True, leave=False)
        self._started, self._start_step = time.monotonic(), start_step
        self._first: Metrics = {}
        self._last: Metrics = {}

    def _axis(self, step: int) -> int:
        return round(step / self.steps_per_epoch * 1000)

    def say(self, message: str) -> None:
        """One or more lines for the user and log.txt."""
        if self.active:
            self._write(message)
            tqdm.write(message, file=sys.stderr)

    def _write(self, message: str) -> None:
        for line in message.splitlines():
            self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def advance(self, step: int) -> None:
        """Move the bar to `step` optimizer steps done."""
        if self.active:
            self._bar.update(step - self._bar.n)

    def report(self, step: int, metrics: Metrics, notes: list[str]) -> None:
        """Record the metrics after `step` optimizer steps and show them, after what a user has to know."""
        if not self.active:
            return
        for note in notes:
            self.say(note)
        self._first = self._first or metrics
        self._last = metrics
        epoch = step / self.steps_per_epoch
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._metrics.write(json.dumps({"step": step, "epoch": round(epoch, 4), **finite}) + "\n")
        for name, value in metrics.items():
            self._board.add_scalar(_board_name(name), value, self._axis(step))
        text = summary(metrics)
        self._write(f"step {step} epoch {epoch:.2f}: {text}")
        self._bar.set_description_str(f"epoch {math.ceil(epoch)}/{self.total_steps // self.steps_per_epoch}", False)
        self._status.set_description_str(text)
        if self._bar.disable:
            elapsed = time.monotonic() - self._started
            left = elapsed / max(1, step - self._start_step) * (self.total_steps - step)
            print(f"step {step}/{self.total_steps}, {_clock(left)} left: {text}", file=sys.stderr, flush=True)

    def picture(self, step: int, name: str, image: Tensor) -> None:
        """An image (3, H, W) uint8 for TensorBoard."""
        if self.active:
            self._board.add_image(name, image, self._axis(step))

    def finish(self) -> None:
        """Close the bar, and say what was learned from the first report to the last, and where everything lies."""
        if not self.active:
            return
        self._close_bars()
        learned = [name for name in self._last if name.startswith(("loss", "prototypes_used", "slots", "probe"))]
        for name in learned:
            first = f"{self._first[name]:.3f} -> " if name in self._first else ""
            self.say(f"{name:<16}  {first}{self._last[name]:.3f}")
        figure = self.folder / "slots.png"
        took = f"{self.total_steps - self._start_step} steps in {_clock(time.monotonic() - self._started)}"
        self.say(f"done              {took}" if learned else "nothing was left to do")
        self.say(f"weights           {self.folder / 'current.pth'}")
        if figure.exists():
            self.say(f"figure            {figure}")
        self.say(f"curves, pictures  tensorboard --logdir {self.folder}")

    def _close_bars(self) -> None:
        self._status.close()
        self._bar.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Flush and close all files; what ended the run early goes into log.txt as well."""
        if self.active:
            if error is not None:
                self._write(f"stopped: {str(error) or type(error).__name__}")
            self._close_bars()
            self._board.close()
            self._metrics.close()
            self._text.close()


def summary(metrics: Metrics) -> str:
    """The metrics that a person watches, in one line."""
    parts = " ".join(f"{name[5:]} {value:.3f}" for name, value in metrics.items() if name.startswith("loss_"))
    return (
        f"loss {metrics['loss']:.3f} ({parts}) lr {metrics['lr']:.3g}, {metrics['images_per_second']:.0f} img/s, "
        f"wait {100 * metrics['data_wait']:.0f}%, {metrics['memory_gib']:.1f} GiB"
    )


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: the device's for a GPU, this process's for the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on Windows, where GPUs are still fine

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _board_name(name: str) -> str:
    slots = "slot" in name or "prototype" in name or name in ("positives", "assignment_entropy")
    group = "loss" if name.startswith("loss") else "slots" if slots else "probe" if "probe" in name else "run"
    return f"{group}/{name}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _drop_after(path: Path, step: int) -> None:
    """Forget what an interrupted run recorded beyond the checkpoint that it goes on from, and half a last line."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        temporary.replace(path)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
