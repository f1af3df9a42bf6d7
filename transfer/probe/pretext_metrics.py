"""Compute the losses and metrics of pre-training on other images than those of the run, such as held-out ones."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tabulate import tabulate
from torch.utils.data import DataLoader, Subset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.datasets import FOLDERS, MultiViewDataset, build_dataset, evenly_spaced
from data.loader import collate, prefetch
from models import METHODS, Method, build_method
from transfer.results import write_json
from utils import checkpoint, distributed
from utils.batch import Batch
from utils.config import at_least, make_parser
from utils.device import choose_device, loader_workers
from utils.errors import UsageError
from utils.files import check_writable

_LATER_ARGUMENTS = {"patch_size": None, "drop_path": 0.0}
"""The arguments of a run that earlier versions of this project did not have -> their values in such a run."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the arguments."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", type=Path, help="checkpoint of a run of this project, with its heads")
    add("--dataset", choices=tuple(FOLDERS), default="folder", help="layout of the images in --data-dir")
    add("--data-dir", required=True, help="folder of the images")
    add("--max-images", type=at_least(1), help="use this many images, evenly spaced in the dataset (default: all)")
    add("--batch-size", type=at_least(1), default=64, help="images per batch")
    add("--num-workers", type=at_least(0), default=8, help="DataLoader workers")
    add("--seed", type=at_least(0), default=0, help="random seed of the views")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: a GPU if there is one")
    add("--out", type=Path, help="also write the metrics to this JSON file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; invalid input ends it with one line and exit status 2."""
    args = parse_args(argv)
    try:
        evaluate(args)
    except UsageError as error:
        distributed.exit_with_error(str(error))
    except KeyboardInterrupt:
        distributed.exit_with_error("interrupted", status=130)


def evaluate(args: argparse.Namespace) -> None:
    """Print the metrics, and write them to --out."""
    if args.out:
        check_writable("--out", args.out, overwrite=True)
    args.amp = "off"
    device = choose_device(args)
    method, run_args, epoch = load_method(args.checkpoint)
    overrides = {"dataset": args.dataset, "data_dir": args.data_dir, "seed": args.seed, "decode": "cpu"}
    views = argparse.Namespace(**{**vars(run_args), **overrides})
    dataset = build_dataset(views, method.view_recipes(views))
    indices = evenly_spaced(len(dataset), args.max_images)
    metrics = average_outputs(method.to(device), load_batches(args, dataset, indices, device), float(epoch))
    print(tabulate(metrics.items(), ("metric", f"mean of {len(indices)} images"), floatfmt=".4f"))
    if args.out:
        write_json(args.out, {"checkpoint": str(args.checkpoint), "images": len(indices), "metrics": metrics})


def load_method(path: Path) -> tuple[Method, argparse.Namespace, int]:
    """Return the method of a checkpoint in evaluation mode, the arguments of its run, and the number of its epochs.

    Raises:
        UsageError: the file is not a checkpoint of a run of this project, or is damaged.
    """
    state = checkpoint.load(path, "checkpoint")
    run_args = argparse.Namespace(**{**_LATER_ARGUMENTS, **checkpoint.checkpoint_args(state)})
    if getattr(run_args, "method", None) not in METHODS or not isinstance(state.get("epoch"), int):
        raise UsageError(f"checkpoint {path}: not of a run of main_pretrain.py; use its current.pth")
    try:
        method = build_method(run_args)
    except AttributeError as error:
        raise UsageError(f"checkpoint {path}: its run has no argument {error.name}; use its current.pth") from None
    checkpoint.load_strict(method, checkpoint.extract_weights(state, f"checkpoint {path}"), f"checkpoint {path}")
    return method.eval().requires_grad_(False), run_args, state["epoch"]


def load_batches(
    args: argparse.Namespace, dataset: MultiViewDataset, indices: Sequence[int], device: torch.device
) -> Iterator[Batch]:
    """Yield the views of the images `indices`, colored as in pre-training, on the device."""
    loader: DataLoader[Batch] = DataLoader(
        Subset(dataset, indices),  # type: ignore[arg-type]
        args.batch_size,
        num_workers=loader_workers(args.num_workers),
        collate_fn=collate,
    )
    return prefetch(loader, device, dataset.view_recipes)


@torch.inference_mode()
def average_outputs(method: Method, batches: Iterator[Batch], epoch: float) -> dict[str, float]:
    """Return the mean over images of each output of a method.

    Args:
        epoch: the epoch of pre-training whose losses are computed.
    """
    sums: dict[str, float] = {}
    count = 0
    for batch in batches:
        batch.epoch = epoch
        for name, value in method(batch).items():
            if value.ndim == 0:
                sums[name] = sums.get(name, 0.0) + float(value) * len(batch.index)
        count += len(batch.index)
    return {name: total / count for name, total in sums.items()}


if __name__ == "__main__":
    main()
