"""Logging of a run: progress bar, log.txt, metrics.jsonl and TensorBoard."""

import json
import math
import sys
import time
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils.errors import UsageError

Metrics = dict[str, float]
_BAR = "{desc} {percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}, {elapsed} elapsed, {remaining} left"


class RunLog:
    """Write the records of a run and show its progress; does nothing on ranks other than 0.

    The progress is a bar on a terminal, and one line per report elsewhere. The step axis of TensorBoard is the epoch
    times 1000, so that curves of different batch sizes can be compared.
    """

    def __init__(self, folder: Path, total_steps: int, start_step: int, steps_per_epoch: int, active: bool):
        self.active, self.folder = active, folder
        self.steps_per_epoch, self.total_steps = steps_per_epoch, total_steps
        if not active:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _truncate_metrics(folder / "metrics.jsonl", start_step)
            self._text = (folder / "log.txt").open("a", buffering=1)
            self._metrics = (folder / "metrics.jsonl").open("a", buffering=1)
            self._board = SummaryWriter(
                str(folder), purge_step=self._tensorboard_step(start_step) + 1 if start_step else None
            )
        except OSError as error:
            raise UsageError(
                f"--output-dir {folder}: cannot be written ({error.strerror}); use another folder"
            ) from None
        quiet = not sys.stderr.isatty()
        self._bar = tqdm(
            total=total_steps, initial=start_step, disable=quiet, bar_format=_BAR, desc="start", dynamic_ncols=True
        )
        self._status = tqdm(total=0, position=1, disable=quiet, bar_format="{desc}", dynamic_ncols=True, leave=False)
        self._started, self._start_step = time.monotonic(), start_step
        self._first: Metrics = {}
        self._last: Metrics = {}

    def _tensorboard_step(self, step: int) -> int:
        return round(step / self.steps_per_epoch * 1000)

    def info(self, message: str) -> None:
        """Print one or more lines, and write them to log.txt."""
        if self.active:
            self._write(message)
            tqdm.write(message, file=sys.stderr)

    def _write(self, message: str) -> None:
        for line in message.splitlines():
            self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def update_progress(self, step: int) -> None:
        """Set the progress bar to `step` completed optimizer steps."""
        if self.active:
            self._bar.update(step - self._bar.n)

    def log_metrics(self, step: int, metrics: Metrics, messages: list[str]) -> None:
        """Print the messages, then record and show the metrics after `step` optimizer steps."""
        if not self.active:
            return
        for message in messages:
            self.info(message)
        self._first = self._first or metrics
        self._last = metrics
        epoch = step / self.steps_per_epoch
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._metrics.write(json.dumps({"step": step, "epoch": round(epoch, 4), **finite}) + "\n")
        for name, value in metrics.items():
            self._board.add_scalar(name, value, self._tensorboard_step(step))
        text = format_metrics(metrics)
        self._write(f"step {step} epoch {epoch:.2f}: {text}")
        self._bar.set_description_str(f"epoch {math.ceil(epoch)}/{self.total_steps // self.steps_per_epoch}", False)
        self._status.set_description_str(text)
        if self._bar.disable:
            elapsed = time.monotonic() - self._started
            left = elapsed / max(1, step - self._start_step) * (self.total_steps - step)
            print(f"step {step}/{self.total_steps}, {_format_duration(left)} left: {text}", file=sys.stderr, flush=True)

    def add_image(self, step: int, name: str, image: Tensor) -> None:
        """Add an image (3, H, W) uint8 to TensorBoard."""
        if self.active:
            self._board.add_image(name, image, self._tensorboard_step(step))

    def finish(self) -> None:
        """Close the progress bar, and print how the metrics changed and where the results are."""
        if not self.active:
            return
        self._close_bars()
        shown = [
            name
            for name in self._last
            if name.startswith(("loss", "slots/prototypes_used", "slots/per_image", "probe"))
        ]
        for name in shown:
            first = f"{self._first[name]:.3f} -> " if name in self._first else ""
            self.info(f"{name:<21}  {first}{self._last[name]:.3f}")
        elapsed = f"{self.total_steps - self._start_step} steps in {_format_duration(time.monotonic() - self._started)}"
        self.info(f"{'finished':<21}  {elapsed}" if shown else "nothing left to train: the checkpoint has all epochs")
        self.info(f"{'checkpoint':<21}  {self.folder / 'current.pth'}")
        if (self.folder / "slots.png").exists():
            self.info(f"{'slot maps':<21}  {self.folder / 'slots.png'}")
        self.info(f"{'TensorBoard':<21}  tensorboard --logdir {self.folder}")

    def _close_bars(self) -> None:
        self._status.close()
        self._bar.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Close all files; an error that ended the run is written to log.txt."""
        if self.active:
            if error is not None:
                self._write(f"stopped: {str(error) or type(error).__name__}")
            self._close_bars()
            self._board.close()
            self._metrics.close()
            self._text.close()


def format_metrics(metrics: Metrics) -> str:
    """Format the most important metrics in one line."""
    terms = " ".join(f"{name[5:]} {value:.3f}" for name, value in metrics.items() if name.startswith("loss/"))
    terms = f" ({terms})" if terms else ""
    return (
        f"loss {metrics['loss']:.3f}{terms} lr {metrics['optim/lr']:.3g}, "
        f"{metrics['speed/images_per_second']:.0f} img/s, wait {100 * metrics['speed/data_wait']:.0f}%, "
        f"{metrics['speed/memory_gib']:.1f} GiB"
    )


def _format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _truncate_metrics(path: Path, step: int) -> None:
    """Delete the records of an interrupted run after step `step`, and an incomplete last line."""
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
