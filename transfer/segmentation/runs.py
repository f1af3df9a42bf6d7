"""What training and testing share: a config made fit for the data, the GPUs and the folders at hand."""

import argparse
import io
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils import config, distributed
from utils.files import atomic_write_text
from utils.device import loader_workers
from utils.errors import UsageError

FOLDER = Path(__file__).resolve().parent
DATA = Path(os.environ.get("SEGMENTATION_DATA", FOLDER / "data"))
"""Holds `VOCdevkit`, `cityscapes` and `ade`, or links to them."""

_INSTALL = "pip install -r transfer/requirements-segmentation.txt"


def import_mmseg() -> None:
    """mmsegmentation and what it stands on, with all their parts registered.

    Raises:
        UsageError: it cannot be imported.
    """
    try:
        # It prints and warns of compiled operators that nothing here uses.
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            import_module("mmseg.utils").register_all_modules()
    except Exception as error:  # versions that do not fit one another fail with whatever they stumble over
        reason = " ".join(str(error).split())
        raise UsageError(f"mmsegmentation cannot be imported ({reason}); {_INSTALL}") from None


def make_parser(description: str, takes: str, said: str) -> argparse.ArgumentParser:
    """The flags of both commands; `takes` is the second argument's name."""
    from mmengine.config import DictAction

    class Options(DictAction):
        def __call__(self, parser: argparse.ArgumentParser, *words: Any) -> None:
            try:
                super().__call__(parser, *words)
            except ValueError:
                parser.error("--cfg-options: wants KEY=VALUE, as in train_cfg.max_iters=100")

    parser = config.make_parser(description)
    parser.add_argument("config", metavar="CONFIG", type=Path, help="a file of transfer/segmentation/configs")
    parser.add_argument(takes.lower(), metavar=takes, type=Path, help=said)
    parser.add_argument("--work-dir", type=Path, help="for logs, checkpoints, results.json (work_dirs/CONFIG's name)")
    parser.add_argument("--gpus", type=int, help="0 is the CPU (what is there, one at most, if not said)")
    said = "change the config, as in `train_cfg.max_iters=100`; the batch is auto_scale_lr.base_batch_size"
    parser.add_argument("--cfg-options", nargs="+", action=Options, metavar="KEY=VALUE", help=said)
    return parser


def load_config(args: argparse.Namespace) -> Any:
    """The config of `args`, changed as asked, for this machine.

    Raises:
        UsageError: it cannot be read, its data is not linked, or its batch does not divide over the GPUs.
    """
    from mmengine.config import Config

    if not args.config.is_file():
        raise UsageError(f"{args.config}: no such config; they lie in transfer/segmentation/configs")
    if any(key.endswith("train_dataloader.batch_size") for key in args.cfg_options or {}):
        raise UsageError("--cfg-options train_dataloader.batch_size: set auto_scale_lr.base_batch_size, of all GPUs")
    try:
        config = Config.fromfile(str(args.config))
        config.merge_from_dict(args.cfg_options or {})
    except Exception as error:  # a config is Python: it raises whatever its author wrote
        raise UsageError(f"{args.config}: cannot be read ({' '.join(str(error).split())})") from None
    config.work_dir = str(args.work_dir or Path("work_dirs") / args.config.stem)
    config.launcher = "pytorch" if "RANK" in os.environ else "none"
    _find_data(config)
    _spread(config, _processes(args))
    return config


def launch(args: argparse.Namespace) -> None:
    """Become torchrun on the same command, if it is for several GPUs and is not one of torchrun's processes yet.

    So a user's mistakes have ended the command before, in one line, without torchrun's report.
    """
    if args.gpus and args.gpus > 1 and "RANK" not in os.environ:
        port = os.environ.get("MASTER_PORT", "29501")
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(args.gpus), "--master_port", port]
        os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv])


def _processes(args: argparse.Namespace) -> int:
    """How many processes share the batch.

    Raises:
        UsageError: there are not so many GPUs.
    """
    if "RANK" in os.environ:
        return distributed.world_size()
    there = torch.cuda.device_count()
    if args.gpus is not None and not 0 <= args.gpus <= there:
        raise UsageError(f"--gpus {args.gpus}: this machine has {there}; 0 trains on the CPU")
    return max(args.gpus or 1, 1)


def _find_data(config: Any) -> None:
    """Make the data sets' folders absolute, and see that all they name is there."""
    for dataset in _datasets([config.train_dataloader, config.val_dataloader, config.test_dataloader]):
        root = Path(dataset.data_root)
        if root.parts[0] == "data":
            root = DATA.joinpath(*root.parts[1:])
        dataset.data_root = str(root)
        for part in (*dataset.data_prefix.values(), dataset.get("ann_file", "")):
            if not (root / part).exists():
                raise UsageError(f"{root / part}: not there; link the data below {DATA} as transfer/README.md shows")


def _datasets(parts: Any) -> Iterator[Any]:
    """All data sets in loaders, also those inside others (ConcatDataset, RepeatDataset)."""
    for part in parts if isinstance(parts, Sequence) else [parts]:
        if "data_root" in part:
            yield part
        for name in ("dataset", "datasets"):
            if name in part:
                yield from _datasets(part[name])


def _spread(config: Any, processes: int) -> None:
    """Each GPU's share of the batch (`auto_scale_lr.base_batch_size`), and each loader's of the cores."""
    total = config.auto_scale_lr.base_batch_size
    if total % processes:
        raise UsageError(f"a batch of {total} cannot be shared by {processes} GPUs; use a number that divides it")
    config.train_dataloader.batch_size = total // processes
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.num_workers = loader_workers(loader.num_workers) if loader.num_workers else 0
        loader.persistent_workers = loader.num_workers > 0


def write_results(path: Path, step: int, metrics: dict[str, float], pretrained: dict[str, Any]) -> None:
    """A JSON file: the step, metrics in per cent (null where undefined), and the encoder's origin."""
    values = {name: round(float(value), 4) if np.isfinite(value) else None for name, value in metrics.items()}
    atomic_write_text(path, json.dumps({"step": step, "metrics": values, "pretrained": pretrained}, indent=2) + "\n")
