"""Load and check the detectron2 config of a run before any model is built or file written.

detectron2 is imported where it is used, so that the other checks can be tested without it.
"""

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transfer.detection import d2_custom_config
from transfer.detection.d2_custom_dataset import FLAGS, CustomDataset
from transfer.detection.d2_registration import DATASET_NAMES
from transfer.detection.d2_solver import BASE_LR
from transfer.frameworks import CONFIG_GPUS, data_root
from utils.errors import UsageError
from utils.files import check_writable

_EVALUATORS = ("coco", "cityscapes_instance")
_VIT_BACKBONE = "build_vit_fpn_backbone"


def load_config(args: argparse.Namespace, dataset: CustomDataset | None = None) -> tuple[Any, list[str]]:
    """Load the detectron2 config of a command for this machine's devices. Return it, frozen, and notes for the log.

    Args:
        dataset: the custom dataset, from which classes and schedule follow; None for the datasets of the config.

    Raises:
        UsageError: the file, a key or a value is invalid, or this machine has fewer GPUs.
    """
    import yaml
    from detectron2.config import get_cfg

    from transfer.detection.d2_vit import add_vit_config, check_vit

    cfg, where = get_cfg(), f"--config-file {args.config_file}"
    add_vit_config(cfg)
    try:
        cfg.merge_from_file(args.config_file)
        where = "KEY VALUE"
        cfg.merge_from_list(args.opts)
    except (yaml.YAMLError, KeyError, ValueError, TypeError, AttributeError, AssertionError, OSError) as error:
        raise UsageError(f"{where}: {' '.join(str(error).split())}") from None
    check_optimizer(cfg)
    if cfg.MODEL.BACKBONE.NAME == _VIT_BACKBONE:
        check_vit(cfg)
    processes, notes = configure_device(cfg, args)
    if dataset:
        notes += d2_custom_config.configure(cfg, dataset, args, processes)
    if args.auto_scale:
        cfg = scale_schedule(cfg, processes)
        solver = f"batch {cfg.SOLVER.IMS_PER_BATCH}, lr {cfg.SOLVER.BASE_LR:g}, {cfg.SOLVER.MAX_ITER} iterations"
        notes.append(f"--auto-scale: {solver}, for {processes} processes instead of {CONFIG_GPUS}")
    if cfg.SOLVER.IMS_PER_BATCH % processes and not args.eval_only:
        raise UsageError(f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH}: not a multiple of {processes} GPUs")
    if args.max_val_images:
        notes.append(f"--max-val-images: evaluation on the first {args.max_val_images} images only")
    cfg.freeze()
    return cfg, notes


def check_optimizer(cfg: Any) -> None:
    """Check the optimizer of a config.

    Raises:
        UsageError: it is unknown, or a setting is given that it or the backbone does not have.
    """
    optimizer, layer_decay = cfg.SOLVER.OPTIMIZER, cfg.SOLVER.LAYER_DECAY
    if optimizer not in BASE_LR:
        raise UsageError(f"SOLVER.OPTIMIZER {optimizer}: must be {' or '.join(BASE_LR)}")
    if not 0 < layer_decay <= 1:
        raise UsageError(f"SOLVER.LAYER_DECAY {layer_decay}: must be above 0 and at most 1")
    if optimizer == "ADAMW" and cfg.SOLVER.BIAS_LR_FACTOR != 1:
        raise UsageError(f"SOLVER.BIAS_LR_FACTOR {cfg.SOLVER.BIAS_LR_FACTOR}: is for SGD; set it to 1.0")
    if layer_decay < 1 and (optimizer, cfg.MODEL.BACKBONE.NAME) != ("ADAMW", _VIT_BACKBONE):
        raise UsageError(f"SOLVER.LAYER_DECAY {layer_decay}: is for ADAMW on a ViT; set it to 1.0")


def check_options(args: argparse.Namespace) -> None:
    """Check the command line without detectron2.

    Raises:
        UsageError: the config file does not exist, or the KEY VALUE pairs are not pairs.
    """
    if not Path(args.config_file).is_file():
        raise UsageError(f"--config-file {args.config_file}: no such file")
    flag = next((option for option in args.opts[::2] if option.startswith("--")), None)
    if flag:
        raise UsageError(f"{flag}: flags come before the KEY VALUE pairs")
    if len(args.opts) % 2:
        raise UsageError(f"{args.opts[-1]}: a key without a value; overrides of the config are KEY VALUE pairs")


def configure_device(cfg: Any, args: argparse.Namespace) -> tuple[int, list[str]]:
    """Set MODEL.DEVICE to `cpu` for --num-gpus 0. Return the total number of processes and notes for the log.

    Raises:
        UsageError: there are fewer GPUs, or several machines without GPUs or an address.
    """
    if args.machine_rank >= args.num_machines:
        raise UsageError(f"--machine-rank {args.machine_rank}: must be less than --num-machines {args.num_machines}")
    if args.num_machines > 1 and args.dist_url == "auto":
        raise UsageError("--dist-url: several machines need tcp://FIRST_MACHINE:PORT")
    if cfg.MODEL.DEVICE == "cpu" or args.num_gpus == 0:
        if args.num_machines > 1:
            raise UsageError("--num-machines: several machines need GPUs, because SyncBN does not work across CPUs")
        if cfg.SOLVER.AMP.ENABLED:
            raise UsageError("SOLVER.AMP.ENABLED: detectron2 supports mixed precision on GPUs only")
        cfg.MODEL.DEVICE = "cpu"
        return 1, ["no GPU in use: one process on the CPU"]
    available = torch.cuda.device_count()
    if args.num_gpus > available:
        raise UsageError(f"--num-gpus {args.num_gpus}: this machine has {available}; 0 trains on the CPU")
    return args.num_gpus * args.num_machines, []


def scale_schedule(cfg: Any, processes: int) -> Any:
    """Scale the config from 8 processes to `processes`, with the same batch per process.

    Batch and learning rate scale with the number of processes; iterations, learning-rate steps, warm-up, and the
    periods of evaluation and checkpoints scale inversely.

    Raises:
        UsageError: the config's batch is not a multiple of 8.
    """
    from detectron2.engine import DefaultTrainer

    if cfg.SOLVER.IMS_PER_BATCH % CONFIG_GPUS:
        raise UsageError(
            f"--auto-scale: SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} is not a multiple of the configs' "
            f"{CONFIG_GPUS} GPUs; leave it as in the config, or scale without --auto-scale"
        )
    cfg.SOLVER.REFERENCE_WORLD_SIZE = CONFIG_GPUS
    return DefaultTrainer.auto_scale_workers(cfg, processes)


def check_output_dir(cfg: Any, resume_or_eval: bool) -> None:
    """Check that OUTPUT_DIR can be written.

    Args:
        resume_or_eval: whether the command resumes or evaluates a run; otherwise OUTPUT_DIR must not contain one.

    Raises:
        UsageError: it cannot be written, or it contains a run that would be overwritten.
    """
    folder = Path(cfg.OUTPUT_DIR)
    check_writable("OUTPUT_DIR", folder, overwrite=True, folder=True)
    if not resume_or_eval and (folder / "last_checkpoint").is_file():
        raise UsageError(f"OUTPUT_DIR {folder}: already contains a run; add --resume, or use another OUTPUT_DIR")


def check_data(cfg: Any, args: argparse.Namespace) -> None:
    """Check that the datasets of a run exist and can be evaluated.

    Raises:
        UsageError: a path is missing (the message shows how to link it), or a dataset cannot be evaluated.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog

    for name in cfg.DATASETS.TEST if args.eval_only else [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]:
        if name in DATASET_NAMES.values():
            raise UsageError(f"DATASETS: {name} needs {', '.join(FLAGS)}")
        if name not in DatasetCatalog.list():
            raise UsageError(f"DATASETS: detectron2 has no dataset {name}")
        check_dataset(name, MetadataCatalog.get(name).as_dict(), args.num_machines, args.max_val_images)


def check_dataset(name: str, metadata: dict[str, Any], num_machines: int, max_val_images: int | None = None) -> None:
    """Check one dataset.

    Args:
        metadata: detectron2's metadata of the dataset: `evaluator_type` and the paths of its files.

    Raises:
        UsageError: as `check_data`.
    """
    evaluator, root = metadata.get("evaluator_type"), data_root("detection")
    if evaluator not in _EVALUATORS:
        raise UsageError(f"DATASETS: {name} is not instance segmentation on COCO or Cityscapes")
    for path in (metadata.get(key) for key in ("json_file", "image_root", "image_dir", "gt_dir")):
        if path and not Path(path).exists():
            folder = root / Path(path).relative_to(root).parts[0]
            link = f"mkdir -p {root} && ln -s /path/to/{folder.name} {folder}"
            raise UsageError(f"{path} does not exist; {link} (or set DETECTRON2_DATASETS)")
    if evaluator == "cityscapes_instance":
        if not all(map(importlib.util.find_spec, ("cityscapesscripts", "shapely"))):
            raise UsageError(f"DATASETS: {name} needs pip install -r transfer/requirements-detection.txt")
        if num_machines > 1:
            raise UsageError("--num-machines: detectron2 evaluates Cityscapes on one machine only")
        if max_val_images:
            raise UsageError("--max-val-images: detectron2 evaluates Cityscapes on all images only; leave it out")


def model_state(cfg: Any) -> dict[str, Tensor]:
    """Return the state dict of the config's model on the meta device, which has names and shapes but no memory.

    Raises:
        UsageError: detectron2 cannot build the model.
    """
    from detectron2.modeling import build_model

    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    try:
        with torch.device("meta"):
            return build_model(cfg).state_dict()
    except (AssertionError, KeyError, ValueError) as error:
        raise UsageError(f"--config-file: detectron2 cannot build its model ({error})") from None
