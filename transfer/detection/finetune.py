"""Training and evaluation with detectron2, and what is checked before anything is built or written."""

import argparse
import importlib
import importlib.util
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer, default_setup, launch
from detectron2.evaluation import CityscapesInstanceEvaluator, COCOEvaluator, DatasetEvaluator
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import Tensor

from transfer.detection import weights
from utils.errors import UsageError
from utils.files import atomic_write_text

CONFIG_GPUS = 8
EVALUATORS = ("coco", "cityscapes_instance")
CITYSCAPES = "deeplearning.projects.cityscapesApi.cityscapesscripts"
EVALUATION = ".evaluation.evalInstanceLevelSemanticLabeling"


class Trainer(DefaultTrainer):
    """detectron2's own loop, with an evaluator for each kind of data, and the last results in hand."""

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        if MetadataCatalog.get(dataset_name).evaluator_type == "coco":
            tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
            return COCOEvaluator(dataset_name, tasks, output_dir=str(Path(cfg.OUTPUT_DIR) / "inference"))
        return CityscapesInstanceEvaluator(dataset_name)

    def train(self) -> dict[str, Any]:
        """The rest of the run; returns the results of the evaluation that ends it, on the main process."""
        super().train()
        return self._last_eval_results


def run(args: argparse.Namespace) -> None:
    """A whole run: every check first, then as many processes as GPUs, or one on the CPU.

    Raises:
        UsageError: the config, the data, the weights or the output folder will not do; nothing has been written.
    """
    cfg, notes = configure(args)
    if not (args.resume or args.eval_only):
        check_output(cfg)
    check_data(cfg, args)
    weights.check(weights.find_source(cfg, args.resume, args.eval_only), shapes(cfg))
    try:
        Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"OUTPUT_DIR {cfg.OUTPUT_DIR}: cannot be made ({error.strerror})") from None
    gpus = 1 if cfg.MODEL.DEVICE == "cpu" else args.num_gpus
    launch(work, gpus, args.num_machines, args.machine_rank, args.dist_url, (args, cfg, notes))


def work(args: argparse.Namespace, cfg: CfgNode, notes: list[str]) -> None:
    """One process of a run, which ends with OUTPUT_DIR/results.json."""
    default_setup(cfg, args)
    logger = setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="transfer")
    for note in notes:
        logger.info(note)
    if any(MetadataCatalog.get(name).evaluator_type == "cityscapes_instance" for name in cfg.DATASETS.TEST):
        adapt_cityscapesscripts()
    source = weights.find_source(cfg, args.resume, args.eval_only)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        DetectionCheckpointer(model, cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        logger.info(weights.taken_over(source, model.state_dict()))
        results = Trainer.test(cfg, model)
    else:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        logger.info(weights.taken_over(source, trainer.checkpointer.model.state_dict()))
        results = trainer.train()
    if comm.is_main_process():
        write_results(Path(cfg.OUTPUT_DIR) / "results.json", results)


def configure(args: argparse.Namespace) -> tuple[CfgNode, list[str]]:
    """The config of a run on the devices at hand, and what there is to say about it.

    Raises:
        UsageError: file, key or value will not do, or there are not these GPUs.
    """
    if not Path(args.config_file).is_file():
        raise UsageError(f"--config-file {args.config_file}: no such file")
    stray = next((word for word in args.opts[::2] if word.startswith("--")), None)
    if stray:
        raise UsageError(f"{stray}: flags come before the KEY VALUE pairs")
    if len(args.opts) % 2:
        raise UsageError(f"{args.opts[-1]}: a key without a value; changes to the config are KEY VALUE pairs")
    cfg, where = get_cfg(), f"--config-file {args.config_file}"
    try:
        cfg.merge_from_file(args.config_file)
        where = "KEY VALUE"
        cfg.merge_from_list(args.opts)
    except (yaml.YAMLError, KeyError, ValueError, TypeError, AttributeError, AssertionError, OSError) as error:
        raise UsageError(f"{where}: {' '.join(str(error).split())}") from None
    processes, notes = use_devices(cfg, args)
    if args.auto_scale:
        cfg = scale(cfg, processes)
        solver = f"batch {cfg.SOLVER.IMS_PER_BATCH}, lr {cfg.SOLVER.BASE_LR:g}, {cfg.SOLVER.MAX_ITER} iterations"
        notes.append(f"--auto-scale: {solver}, for {processes} instead of {CONFIG_GPUS} processes")
    if cfg.SOLVER.IMS_PER_BATCH % processes and not args.eval_only:
        raise UsageError(f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH}: not a multiple of {processes} GPUs")
    cfg.freeze()
    return cfg, notes


def use_devices(cfg: CfgNode, args: argparse.Namespace) -> tuple[int, list[str]]:
    """Set MODEL.DEVICE to what is there; returns the number of processes on all machines, and what there is to say.

    Raises:
        UsageError: more GPUs than there are, or several machines without a GPU or an address.
    """
    if args.machine_rank >= args.num_machines:
        raise UsageError(f"--machine-rank {args.machine_rank}: not below --num-machines {args.num_machines}")
    if args.num_machines > 1 and args.dist_url == "auto":
        raise UsageError("--dist-url: several machines need tcp://FIRST_MACHINE:PORT")
    if cfg.MODEL.DEVICE == "cpu" or args.num_gpus == 0:
        if args.num_machines > 1:
            raise UsageError("--num-machines: without GPUs, one machine only; batch norms do not synchronize over CPUs")
        if cfg.SOLVER.AMP.ENABLED:
            raise UsageError("SOLVER.AMP.ENABLED: detectron2 trains with mixed precision on GPUs only")
        cfg.MODEL.DEVICE = "cpu"
        return 1, ["no GPU in use: one process on the CPU"]
    if args.num_gpus > torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise UsageError(f"--num-gpus {args.num_gpus}: this machine has {there}; 0 trains on the CPU")
    return args.num_gpus * args.num_machines, []


def scale(cfg: CfgNode, processes: int) -> CfgNode:
    """The config of CONFIG_GPUS processes for another number: the batch of a process stays as it is.

    Batch and learning rate go with the processes; iterations, steps, warm-up and the periods of evaluation and
    checkpoints go inversely.

    Raises:
        UsageError: the config's batch does not divide by CONFIG_GPUS.
    """
    if cfg.SOLVER.IMS_PER_BATCH % CONFIG_GPUS:
        raise UsageError(
            f"--auto-scale: SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} is no multiple of the {CONFIG_GPUS} GPUs "
            "that the configs are for; leave it as the config has it, or scale by hand"
        )
    cfg.SOLVER.REFERENCE_WORLD_SIZE = CONFIG_GPUS
    return DefaultTrainer.auto_scale_workers(cfg, processes)


def check_output(cfg: CfgNode) -> None:
    """Raises UsageError if OUTPUT_DIR holds a run, which a new one would overwrite."""
    if (Path(cfg.OUTPUT_DIR) / "last_checkpoint").is_file():
        raise UsageError(f"OUTPUT_DIR {cfg.OUTPUT_DIR}: holds a run; go on with --resume, or append another OUTPUT_DIR")


def check_data(cfg: CfgNode, args: argparse.Namespace) -> None:
    """See that the data sets of a run are there, and that they can be evaluated.

    Raises:
        UsageError: naming the path that is missing and how to link it, or what cannot be evaluated.
    """
    root = Path(os.environ["DETECTRON2_DATASETS"]).expanduser()
    for name in cfg.DATASETS.TEST if args.eval_only else [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]:
        if name not in DatasetCatalog.list():
            raise UsageError(f"DATASETS: detectron2 has no data set {name}")
        data = MetadataCatalog.get(name)
        if data.evaluator_type not in EVALUATORS:
            raise UsageError(f"DATASETS: {name} is no instance segmentation of COCO or Cityscapes")
        for path in (data.get("json_file"), data.get("image_root"), data.get("image_dir"), data.get("gt_dir")):
            if path and not Path(path).exists():
                folder = root / Path(path).relative_to(root).parts[0]
                link = f"mkdir -p {root} && ln -s /path/to/{folder.name} {folder}"
                raise UsageError(f"{path} is missing; {link} (or set DETECTRON2_DATASETS)")
        if data.evaluator_type == "cityscapes_instance":
            if not all(map(importlib.util.find_spec, ("cityscapesscripts", "shapely"))):
                raise UsageError(f"DATASETS: {name} needs pip install -r transfer/requirements-detection.txt")
            if args.num_machines > 1:
                raise UsageError("--num-machines: detectron2 evaluates Cityscapes on one machine only")


def shapes(cfg: CfgNode) -> dict[str, Tensor]:
    """The state of the config's model on the meta device: names and shapes, without memory.

    Raises:
        UsageError: detectron2 does not build it.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    try:
        with torch.device("meta"):
            return build_model(cfg).state_dict()
    except (AssertionError, KeyError, ValueError) as error:
        raise UsageError(f"--config-file: detectron2 cannot build its model ({error})") from None


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """The metrics by task (`bbox`, `segm`), in percent, as JSON; null where there was nothing to measure."""
    atomic_write_text(path, json.dumps(finite(results), indent=2) + "\n")


def finite(value: Any) -> Any:
    """Nested mappings of numbers as JSON knows them."""
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    return float(value) if math.isfinite(value) else None


def adapt_cityscapesscripts() -> None:
    """Let the name under which detectron2 imports cityscapesscripts lead to the public package, on NumPy of today."""
    parts = CITYSCAPES.split(".")
    for parent in (".".join(parts[:length]) for length in range(1, len(parts))):
        sys.modules.setdefault(parent, ModuleType(parent))
    for name in ("", ".helpers", ".helpers.labels", ".evaluation", EVALUATION):
        sys.modules.setdefault(CITYSCAPES + name, importlib.import_module(f"cityscapesscripts{name}"))
    # It would leave a matches.json in the current folder, and fail at NumPy's numbers.
    sys.modules[CITYSCAPES + EVALUATION].writeDict2JSON = lambda *_: None  # type: ignore[attr-defined]
    vars(np).setdefault("in1d", np.isin)  # which NumPy 2.4 has dropped, and cityscapesscripts 2.3 calls
    # The processes in which detectron2 reads the annotations have to inherit it.
    multiprocessing.set_start_method("fork", force=True)
