"""The command line, the mmsegmentation config and the launcher of train.py and test.py."""

import argparse
import io
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from transfer.frameworks import data_root
from transfer.segmentation import folder_config
from utils import distributed
from utils.config import at_least, make_parser
from utils.device import loader_workers
from utils.errors import UsageError
from utils.files import check_writable

_LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")


def import_and_register_mmseg() -> None:
    """Import mmsegmentation and register its models, datasets and transforms.

    Raises:
        UsageError: it cannot be imported.
    """
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # about compiled operators that no config here uses
            import_module("mmseg.utils").register_all_modules()
    except Exception as error:  # incompatible versions raise errors of many types
        reason = " ".join(str(error).split())
        install = "pip install -r transfer/requirements-segmentation.txt"
        raise UsageError(f"mmsegmentation cannot be imported ({reason}); {install}") from None


def make_mmseg_parser(description: str, positional: str, positional_help: str) -> argparse.ArgumentParser:
    """Build a parser with the arguments of both commands.

    Args:
        positional: the second positional argument, in capitals: PRETRAINED or CHECKPOINT.
        positional_help: its help text.
    """
    from mmengine.config import DictAction

    class ConfigOptions(DictAction):
        def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
            try:
                super().__call__(parser, *args)
            except ValueError:
                parser.error("--cfg-options: expected KEY=VALUE, such as train_cfg.max_iters=100")

    parser = make_parser(description)
    parser.set_defaults(data_dir=None, classes=None, crop_size=None)  # flags of train.py only
    parser.add_argument("config", metavar="CONFIG", type=Path, help="a file of transfer/segmentation/configs")
    parser.add_argument(positional.lower(), metavar=positional, type=Path, help=positional_help)
    parser.add_argument(
        "--work-dir",
        type=Path,
        help="output folder of logs, checkpoints and results (default: work_dirs/CONFIG_NAME, or the folder of a run "
        "if CONFIG is in it)",
    )
    parser.add_argument("--gpus", type=at_least(0), help="number of GPUs, 0 for the CPU (default: 1 if there is one)")
    parser.add_argument(
        "--max-val-images", type=at_least(1), metavar="N", help="evaluate only the first N images (default: all)"
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=ConfigOptions,
        metavar="KEY=VALUE",
        help="override config values, such as train_cfg.max_iters=100; auto_scale_lr.base_batch_size is the batch size",
    )
    return parser


def load_config(args: argparse.Namespace, loaders: Sequence[str]) -> Any:
    """Load the mmengine `Config` of a command, with its overrides and absolute data paths.

    Args:
        loaders: the config's data loaders that the command uses, such as `val_dataloader`; their files have to exist.

    Raises:
        UsageError: the config cannot be read, its data is not linked, --gpus is not possible here, or --work-dir
            cannot be written.
    """
    if not args.config.is_file():
        raise UsageError(f"{args.config}: no such config; they are in transfer/segmentation/configs")
    if any(key.endswith("train_dataloader.batch_size") for key in args.cfg_options or {}):
        raise UsageError(
            "--cfg-options train_dataloader.batch_size: set auto_scale_lr.base_batch_size, the total of all GPUs"
        )
    cfg = _read_config(args)
    # A config that a run wrote to its folder has this entry.
    default = args.config.parent if "work_dir" in cfg else Path("work_dirs") / args.config.stem
    cfg.work_dir = str(args.work_dir or default)
    check_writable("--work-dir", Path(cfg.work_dir), overwrite=True, folder=True)
    cfg.launcher = "pytorch" if "RANK" in os.environ else "none"
    for name in _LOADERS:
        _set_data_roots(cfg[name], data_root("segmentation"), must_exist=name in loaders)
        cfg[name].num_workers = loader_workers(cfg[name].num_workers) if cfg[name].num_workers else 0
        cfg[name].persistent_workers = cfg[name].num_workers > 0
    _check_gpus(args)
    return cfg


def _read_config(args: argparse.Namespace) -> Any:
    """Read a config, and set the flags and then --cfg-options, which therefore win."""
    from mmengine.config import Config

    try:
        cfg = Config.fromfile(str(args.config))
        folder_config.set_folder(cfg, args)
        for dataset in _find_datasets([cfg.val_dataloader, cfg.test_dataloader]):
            dataset.pop("indices", None)  # of the --max-val-images of the run that wrote the config
            if args.max_val_images:
                dataset.indices = args.max_val_images
        cfg.merge_from_dict(args.cfg_options or {})
        _check_image_sizes(cfg)
    except UsageError:
        raise
    except Exception as error:  # a config is Python code and can raise anything
        raise UsageError(f"{args.config}: cannot be read ({' '.join(str(error).split())})") from None
    return cfg


def _check_image_sizes(cfg: Any) -> None:
    """Check that the padded images of a config with a ViT consist of whole patches, and of two or more per side.

    mmsegmentation would predict for incomplete patches as well, and then stretch the result over the image. The
    pyramid pools two patches per side into one.

    Raises:
        UsageError: the crops, or the images to evaluate, do not.
    """
    patch_size = cfg.model.backbone.get("patch_size")
    if patch_size is None:
        return
    preprocessor = cfg.model.data_preprocessor
    crop_size, padding = preprocessor.get("size") or (), preprocessor.get("test_cfg") or {}
    text = " x ".join(map(str, crop_size))
    if any(side % patch_size for side in crop_size):
        raise UsageError(f"crop size {text}: not a multiple of the patch size {patch_size}; use one")
    if any(side < 2 * patch_size for side in crop_size):
        raise UsageError(f"crop size {text}: smaller than two patches of {patch_size} pixels; use {2 * patch_size}")
    divisor = padding.get("size_divisor") or 1
    if divisor % (2 * patch_size):
        raise UsageError(
            f"model.data_preprocessor.test_cfg.size_divisor={divisor}: not a multiple of two patches of {patch_size} "
            f"pixels; use {2 * patch_size * math.ceil(divisor / (2 * patch_size))}"
        )


def launch_distributed(args: argparse.Namespace) -> None:
    """Replace this process by torchrun with the same command line if --gpus is greater than 1.

    Call it after all checks, so that a usage error is printed in one line and not in torchrun's report.
    """
    if args.gpus and args.gpus > 1 and "RANK" not in os.environ:
        port = os.environ.get("MASTER_PORT", "29501")
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(args.gpus), "--master_port", port]
        os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv])


def _check_gpus(args: argparse.Namespace) -> None:
    """Check --gpus.

    Raises:
        UsageError: it is more than this machine has, or 0 where mmengine would use a GPU.
    """
    if "RANK" in os.environ or args.gpus is None:
        return
    available = torch.cuda.device_count()
    if args.gpus > available:
        raise UsageError(f"--gpus {args.gpus}: this machine has {available}; 0 trains on the CPU")
    if args.gpus == 0 and available:  # mmengine uses every GPU that it sees
        raise UsageError("--gpus 0: run mim_dist_train.sh or mim_dist_test.sh, or set CUDA_VISIBLE_DEVICES=''")


def count_processes(args: argparse.Namespace) -> int:
    """Return the number of processes that share a batch."""
    return distributed.world_size() if "RANK" in os.environ else max(args.gpus or 1, 1)


def set_batch_size(cfg: Any, processes: int) -> None:
    """Divide the total batch, `auto_scale_lr.base_batch_size`, over the processes.

    Raises:
        UsageError: it does not divide evenly.
    """
    batch_size = cfg.auto_scale_lr.base_batch_size
    if batch_size % processes:
        raise UsageError(f"a batch of {batch_size} does not divide over {processes} GPUs; use another number of GPUs")
    cfg.train_dataloader.batch_size = batch_size // processes


def _set_data_roots(loader: Any, root: Path, must_exist: bool) -> None:
    """Replace the leading `data` of each dataset's `data_root` with `root`.

    Raises:
        UsageError: with `must_exist`, a folder, a list of files or a file of that list does not exist.
    """
    for dataset in _find_datasets(loader):
        folder, advice = Path(dataset.data_root), "the config names it as the data's place"
        if folder.parts[0] == "data":
            folder = root.joinpath(*folder.parts[1:])
            advice = f"link the data below {root} as described in transfer/README.md"
        dataset.data_root = str(folder)
        for part in (*dataset.get("data_prefix", {}).values(), dataset.get("ann_file", "")):
            if must_exist and not (folder / part).exists():
                raise UsageError(f"{folder / part} does not exist; {advice}")
        if must_exist and "ann_file" in dataset:
            _check_listed_files(dataset)


def _check_listed_files(dataset: Any) -> None:
    """Check that all images and masks in the list of a dataset exist, because training would stop at the first one.

    Raises:
        UsageError: files are missing; it names the first.
    """
    root = Path(dataset.data_root)
    names = (root / dataset.ann_file).read_text().split()
    suffixes = {"img_path": dataset.get("img_suffix", ".jpg"), "seg_map_path": dataset.get("seg_map_suffix", ".png")}
    for key, folder in dataset.data_prefix.items():
        existing = {entry.name for entry in os.scandir(root / folder)}
        missing = [name for name in names if f"{name}{suffixes[key]}" not in existing]
        if missing:
            path = root / folder / f"{missing[0]}{suffixes[key]}"
            raise UsageError(f"{path} does not exist; {len(missing)} files of {root / dataset.ann_file} are missing")


def _find_datasets(configs: Any) -> Iterator[Any]:
    """Yield the config of each dataset, including those inside a ConcatDataset or RepeatDataset."""
    for cfg in configs if isinstance(configs, Sequence) else [configs]:
        if "data_root" in cfg:
            yield cfg
        for key in ("dataset", "datasets"):
            if key in cfg:
                yield from _find_datasets(cfg[key])
