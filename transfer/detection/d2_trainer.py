"""Train and evaluate with detectron2, after the checks of `d2_config` and `d2_weights`."""

import argparse
import importlib
import multiprocessing
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.engine import DefaultTrainer, default_setup, launch
from detectron2.evaluation import CityscapesInstanceEvaluator, COCOEvaluator, DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from transfer.detection import (
    d2_adamw,
    d2_config,
    d2_custom_dataset,
    d2_registration,
    d2_vit,  # noqa: F401  the import registers its backbone in every process
    d2_weights,
)
from transfer.results import write_json

_CITYSCAPES_PACKAGE = "deeplearning.projects.cityscapesApi.cityscapesscripts"
_EVALUATION = ".evaluation.evalInstanceLevelSemanticLabeling"


class FirstImagesEvaluator(COCOEvaluator):
    """COCO's evaluation on the first images by their ids; the objects of the others do not count as missed.

    A detector that finds nothing has an AP of 0, where detectron2 gives NaN.
    """

    def __init__(self, max_images: int | None, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.max_images = max_images

    def evaluate(self, img_ids: list[int] | None = None) -> dict[str, Any]:
        return super().evaluate(sorted(self._coco_api.getImgIds())[: self.max_images])

    def _derive_coco_results(self, coco_eval: Any, *args: Any, **options: Any) -> dict[str, float]:
        results = super()._derive_coco_results(coco_eval, *args, **options)
        return results if coco_eval else dict.fromkeys(results, 0.0)


class Trainer(DefaultTrainer):
    """detectron2's default trainer with AdamW, and with the evaluators of COCO and Cityscapes."""

    max_val_images: int | None = None
    """The number of images of each dataset to evaluate, set in every process; None for all."""

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        if cfg.SOLVER.OPTIMIZER == "ADAMW":
            return d2_adamw.build_adamw(cfg, model)
        return super().build_optimizer(cfg, model)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        if cls.max_val_images is None:
            return super().build_test_loader(cfg, dataset_name)
        images = get_detection_dataset_dicts(dataset_name, filter_empty=False)[: cls.max_val_images]  # sorted by id
        mapper = DatasetMapper(cfg, is_train=False)
        return build_detection_test_loader(images, mapper=mapper, num_workers=cfg.DATALOADER.NUM_WORKERS)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        if MetadataCatalog.get(dataset_name).evaluator_type == "coco":
            tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
            folder = str(Path(cfg.OUTPUT_DIR) / "inference")
            return FirstImagesEvaluator(cls.max_val_images, dataset_name, tasks, output_dir=folder)
        return CityscapesInstanceEvaluator(dataset_name)

    def train(self) -> dict[str, Any]:
        """Train to the end, and return the last evaluation's results on the main process."""
        super().train()
        return self._last_eval_results


def run(args: argparse.Namespace) -> None:
    """Check everything, then train or evaluate in one process per GPU, or in one on the CPU.

    Raises:
        UsageError: as `prepare`.
    """
    cfg, notes = prepare(args)
    gpus = 1 if cfg.MODEL.DEVICE == "cpu" else args.num_gpus
    launch(run_process, gpus, args.num_machines, args.machine_rank, args.dist_url, (args, cfg, notes))


def prepare(args: argparse.Namespace) -> tuple[CfgNode, list[str]]:
    """Check everything, and write the annotations of a custom dataset. Return the config and notes for the log.

    An evaluation gets a folder of its own below OUTPUT_DIR, so that it overwrites nothing of the training. The
    annotations, gigabytes for COCO, are released on return; each process reads those that it needs.

    Raises:
        UsageError: the config, the data, the weights or OUTPUT_DIR is unsuitable; nothing has been written.
    """
    d2_config.check_options(args)
    dataset = d2_custom_dataset.read_custom_dataset(args)
    cfg, notes = d2_config.load_config(args, dataset)
    d2_config.check_output_dir(cfg, resume_or_eval=args.resume or args.eval_only)
    if dataset is None:
        d2_config.check_data(cfg, args)
    file = d2_weights.find_weights(cfg, args.resume, args.eval_only)
    d2_weights.check_weights(file, d2_config.model_state(cfg))
    if args.eval_only:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = str(file.path), str(Path(cfg.OUTPUT_DIR) / "eval")
        cfg.freeze()
    if dataset:
        d2_registration.write_annotations(dataset, Path(cfg.OUTPUT_DIR), args.machine_rank)
    return cfg, notes


def run_process(args: argparse.Namespace, cfg: CfgNode, notes: list[str]) -> None:
    """Train or evaluate in one of the processes; the main one writes results.json to the folder of the config."""
    Trainer.max_val_images = args.max_val_images
    if d2_custom_dataset.uses_custom_dataset(args):
        d2_registration.register(args, Path(cfg.OUTPUT_DIR))
    default_setup(cfg, args)
    logger = setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="transfer")
    for note in notes:
        logger.info(note)
    if any(MetadataCatalog.get(name).evaluator_type == "cityscapes_instance" for name in cfg.DATASETS.TEST):
        patch_cityscapesscripts()
    resume = args.resume and not args.eval_only  # `prepare` has found the checkpoint to evaluate
    file = d2_weights.find_weights(cfg, resume, args.eval_only)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        DetectionCheckpointer(model, cfg.OUTPUT_DIR).load(cfg.MODEL.WEIGHTS)
        logger.info(d2_weights.check_loaded(file, model.state_dict()))
        results = Trainer.test(cfg, model)
    else:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=resume)
        logger.info(d2_weights.check_loaded(file, trainer.checkpointer.model.state_dict()))
        results = trainer.train()
    if comm.is_main_process():
        write_json(Path(cfg.OUTPUT_DIR) / "results.json", results)


def patch_cityscapesscripts() -> None:
    """Make the public package importable under the name that detectron2 uses, and let it run with NumPy 2."""
    parts = _CITYSCAPES_PACKAGE.split(".")
    for package in (".".join(parts[:length]) for length in range(1, len(parts))):
        sys.modules.setdefault(package, ModuleType(package))
    for name in ("", ".helpers", ".helpers.labels", ".evaluation", _EVALUATION):
        sys.modules.setdefault(_CITYSCAPES_PACKAGE + name, importlib.import_module(f"cityscapesscripts{name}"))
    # It would write matches.json to the current folder, and it fails on NumPy's numbers.
    sys.modules[_CITYSCAPES_PACKAGE + _EVALUATION].writeDict2JSON = lambda *_: None  # type: ignore[attr-defined]
    vars(np).setdefault("in1d", np.isin)  # removed in NumPy 2.4, used by cityscapesscripts 2.3
    # detectron2 reads the annotations in processes that have to inherit these changes.
    multiprocessing.set_start_method("fork", force=True)
