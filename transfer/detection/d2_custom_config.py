"""Set in a detectron2 config what follows from a custom dataset, and describe it for the log."""

import argparse
from typing import Any

from transfer.detection import d2_weights
from transfer.detection.coco_json import CocoData
from transfer.detection.d2_custom_dataset import CustomDataset
from transfer.detection.d2_registration import DATASET_NAMES
from transfer.detection.d2_solver import default_solver_settings
from utils.errors import UsageError


def configure(cfg: Any, dataset: CustomDataset, args: argparse.Namespace, processes: int) -> list[str]:
    """Set what follows from the dataset, except what KEY VALUE pairs set. Return notes for the log.

    Raises:
        UsageError: some annotations have masks and others do not, or a KEY VALUE pair is out of range.
    """
    overridden = set(args.opts[::2])
    settings = {
        "DATASETS.TRAIN": (DATASET_NAMES["train"],),
        "DATASETS.TEST": (DATASET_NAMES["val"],),
        "MODEL.ROI_HEADS.NUM_CLASSES": len(dataset["val"].classes),
    }
    if "train" in dataset:
        settings |= _training_settings(cfg, dataset["train"], overridden, processes)
    elif "MODEL.MASK_ON" not in overridden:
        detector = d2_weights.find_weights(cfg, args.resume, eval_only=True)
        settings["MODEL.MASK_ON"] = d2_weights.has_mask_head(detector)
    for key, value in settings.items():
        if key not in overridden:
            cfg.merge_from_list([key, value])
    if cfg.MODEL.MASK_ON:
        _check_masks(dataset)
    return _describe(cfg, dataset)


def _training_settings(cfg: Any, train: CocoData, overridden: set[str], processes: int) -> dict[str, Any]:
    """Return the settings of a training run by their keys."""
    given = {name: cfg.SOLVER[name] for name in ("IMS_PER_BATCH", "MAX_ITER") if f"SOLVER.{name}" in overridden}
    for name, value in given.items():
        if value < 1:
            raise UsageError(f"SOLVER.{name} {value}: must be at least 1")
    solver = default_solver_settings(
        train.num_training_images,
        processes,
        given.get("IMS_PER_BATCH"),
        given.get("MAX_ITER"),
        cfg.SOLVER.OPTIMIZER,
    )
    return {
        "MODEL.MASK_ON": train.has_masks,
        "INPUT.MASK_FORMAT": "bitmask" if train.has_encoded_masks else "polygon",
        "SOLVER.IMS_PER_BATCH": solver.ims_per_batch,
        "SOLVER.BASE_LR": solver.base_lr,
        "SOLVER.MAX_ITER": solver.max_iter,
        "SOLVER.STEPS": solver.steps,
        "SOLVER.WARMUP_ITERS": solver.warmup_iters,
        "SOLVER.CHECKPOINT_PERIOD": solver.eval_period,
        "TEST.EVAL_PERIOD": solver.eval_period,
        "TEST.PRECISE_BN.NUM_ITER": solver.precise_bn_iters,
    }


def _check_masks(dataset: CustomDataset) -> None:
    for split, coco in dataset.items():
        total = len(coco.content["annotations"])
        if coco.without_mask:
            raise UsageError(
                f"--{split}-json: {len(coco.without_mask)} of {total} annotations (crowds included) have no mask, the "
                f"first is annotations[{coco.without_mask[0]}]; add the masks, or MODEL.MASK_ON False for boxes only"
            )


def _describe(cfg: Any, dataset: CustomDataset) -> list[str]:
    """Return a line on each split, on the schedule, and on the mask head if it is left out."""
    notes = []
    for split, coco in dataset.items():
        images, ignored = len(coco.content["images"]), coco.num_ignored
        note = f"--{split}-json: {images} images, {len(coco.objects)} objects, number of classes {len(coco.classes)}"
        notes.append(
            note + (f"; annotations ignored because their box or mask has no area: {ignored}" if ignored else "")
        )
    train, solver = dataset.get("train"), cfg.SOLVER
    if train:
        decay = f" divided by 10 after {' and '.join(map(str, solver.STEPS))}" if solver.STEPS else ""
        notes.append(
            f"schedule for {train.num_training_images} images with objects: batch {solver.IMS_PER_BATCH}, number of "
            f"iterations {solver.MAX_ITER}, learning rate {solver.BASE_LR:g}{decay}, warm-up {solver.WARMUP_ITERS}; "
            f"evaluation every {cfg.TEST.EVAL_PERIOD}"
        )
    if not cfg.MODEL.MASK_ON:
        reason = ", because --train-json has no masks" if train and not train.has_masks else ""
        notes.append(f"boxes only: the model has no mask head{reason}")
    return notes
