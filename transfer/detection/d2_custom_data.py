"""Train on one's own COCO-style data: the settings that follow from the data, and its registration in detectron2."""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transfer.detection.coco_json import CocoData, read_coco
from utils.errors import UsageError
from utils.files import atomic_write_text

FLAGS = ("--train-json", "--train-images", "--val-json", "--val-images")
"""The flags of own data, which are used together."""
DATASETS = {"train": "custom_train", "val": "custom_val"}
"""The names under which the data is registered."""

_COCO_IMAGES = 117_266
"""Number of images with objects in COCO's train2017, for which the 1x schedule was chosen."""
_FROM_DATA = ("DATASETS.TRAIN", "DATASETS.TEST", "MODEL.ROI_HEADS.NUM_CLASSES")


@dataclass(frozen=True)
class CustomData:
    """The data of --train-json, --train-images, --val-json and --val-images."""

    train: CocoData
    val: CocoData


@dataclass(frozen=True)
class Schedule:
    """Batch, learning rate and length of a training run, in iterations."""

    batch_size: int
    learning_rate: float
    max_iter: int
    steps: tuple[int, ...]
    """Where the learning rate is divided by 10."""
    warmup: int
    period: int
    """Between two evaluations, and between two checkpoints."""
    precise_bn: int
    """Batches for the batch-norm statistics before each evaluation."""


def has_custom_data(args: argparse.Namespace) -> bool:
    """Return whether a command trains on its own data.

    Raises:
        UsageError: only some of the flags are given, or flags or KEY VALUE pairs that exclude them.
    """
    given = [flag for flag in FLAGS if getattr(args, flag[2:].replace("-", "_"))]
    if not given:
        return False
    missing = next((flag for flag in FLAGS if flag not in given), None)
    if missing:
        raise UsageError(f"{missing} is missing; {', '.join(FLAGS[:3])} and {FLAGS[3]} go together")
    if args.auto_scale:
        raise UsageError("--auto-scale: own data has a schedule of its own; change it by SOLVER.IMS_PER_BATCH")
    for key in args.opts[::2]:
        if key in _FROM_DATA:
            raise UsageError(f"{key}: follows from --train-json and --val-json; leave it out")
    return True


def read_custom_data(args: argparse.Namespace) -> CustomData | None:
    """Read and check the data of a command; None if it has none of its own.

    Raises:
        UsageError: as `has_custom_data` and `read_coco`.
    """
    if not has_custom_data(args):
        return None
    train = read_coco("train", args.train_json, args.train_images)
    return CustomData(train, read_coco("val", args.val_json, args.val_images, train.classes))


def schedule_for(
    num_images: int, processes: int = 1, batch_size: int | None = None, max_iter: int | None = None
) -> Schedule:
    """Return the schedule of a training set; that of COCO's size is the 1x schedule.

    The number of iterations with 16 images grows with the square root of the number of images. Smaller batches have a
    proportionally smaller learning rate and proportionally more iterations.

    Args:
        num_images: number of images with objects.
        batch_size: over all processes; None for 16, or for fewer where there are fewer images.
        max_iter: number of iterations; None for the one that follows from the number of images.

    Raises:
        UsageError: there are fewer images than processes.
    """
    if num_images < processes:
        raise UsageError(f"--train-json: {num_images} images with objects are too few for {processes} GPUs")
    batch_size = batch_size or min(16, num_images) // processes * processes
    max_iter = max_iter or math.ceil(90_000 * math.sqrt(num_images / _COCO_IMAGES) * 16 / batch_size)
    steps = {max_iter * 2 // 3, max_iter * 8 // 9} - {0}
    return Schedule(
        batch_size,
        learning_rate=0.02 * batch_size / 16,
        max_iter=max_iter,
        steps=tuple(sorted(steps)),
        warmup=min(1000, max_iter // 10),
        period=math.ceil(max_iter / 5),
        precise_bn=min(200, math.ceil(num_images / batch_size)),
    )


def configure(cfg: Any, data: CustomData, opts: Sequence[str], processes: int) -> list[str]:
    """Set what follows from the data in a config, except what the KEY VALUE pairs `opts` set. Return notes for the log.

    Raises:
        UsageError: some objects have masks and others do not, or there are fewer images than processes.
    """
    overridden = set(opts[::2])
    batch_size = cfg.SOLVER.IMS_PER_BATCH if "SOLVER.IMS_PER_BATCH" in overridden else None
    max_iter = cfg.SOLVER.MAX_ITER if "SOLVER.MAX_ITER" in overridden else None
    schedule = schedule_for(data.train.num_training_images, processes, batch_size, max_iter)
    settings = {
        "DATASETS.TRAIN": (DATASETS["train"],),
        "DATASETS.TEST": (DATASETS["val"],),
        "MODEL.ROI_HEADS.NUM_CLASSES": len(data.train.classes),
        "MODEL.MASK_ON": data.train.num_masks > 0,
        "INPUT.MASK_FORMAT": "bitmask" if data.train.has_encoded_masks else "polygon",
        "SOLVER.IMS_PER_BATCH": schedule.batch_size,
        "SOLVER.BASE_LR": schedule.learning_rate,
        "SOLVER.MAX_ITER": schedule.max_iter,
        "SOLVER.STEPS": schedule.steps,
        "SOLVER.WARMUP_ITERS": schedule.warmup,
        "SOLVER.CHECKPOINT_PERIOD": schedule.period,
        "TEST.EVAL_PERIOD": schedule.period,
        "TEST.PRECISE_BN.NUM_ITER": schedule.precise_bn,
    }
    for key, value in settings.items():
        if key not in overridden:
            cfg.merge_from_list([key, value])
    if cfg.MODEL.MASK_ON:
        _check_masks(data)
    return _describe(cfg, data)


def _check_masks(data: CustomData) -> None:
    for split, coco in (("train", data.train), ("val", data.val)):
        count = len(coco.objects)
        if coco.num_masks < count:
            raise UsageError(
                f"--{split}-json: {count - coco.num_masks} of {count} objects have no mask; add the masks, or "
                "MODEL.MASK_ON False to train boxes only"
            )


def _describe(cfg: Any, data: CustomData) -> list[str]:
    """Return a line on each set, on the schedule, and on the mask head if it is left out."""
    notes = []
    for split, coco in (("train", data.train), ("val", data.val)):
        images, ignored = len(coco.content["images"]), coco.num_ignored
        note = f"--{split}-json: {images} images, {len(coco.objects)} objects, number of classes {len(coco.classes)}"
        notes.append(note + (f"; {ignored} annotations without area are ignored" if ignored else ""))
    solver = cfg.SOLVER
    notes.append(
        f"schedule for {data.train.num_training_images} images with objects: batch {solver.IMS_PER_BATCH}, learning "
        f"rate {solver.BASE_LR:g} divided by 10 after {' and '.join(map(str, solver.STEPS))} of {solver.MAX_ITER} "
        f"iterations, warm-up {solver.WARMUP_ITERS}; evaluation every {cfg.TEST.EVAL_PERIOD}"
    )
    if not cfg.MODEL.MASK_ON:
        reason = "" if data.train.num_masks else ", because --train-json has no masks"
        notes.append(f"boxes only: the model has no mask head{reason}")
    return notes


def write_annotations(data: CustomData, output_dir: Path) -> None:
    """Write the checked annotations to `annotations` in a run's folder, where detectron2 reads them.

    Raises:
        UsageError: the files cannot be written.
    """
    try:
        for split, coco in (("train", data.train), ("val", data.val)):
            path = annotations_path(output_dir, split)
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(path, json.dumps(coco.content))
    except OSError as error:
        raise UsageError(f"OUTPUT_DIR {output_dir}: cannot be written ({error.strerror})") from None


def annotations_path(output_dir: Path, split: str) -> Path:
    """Return the file of the checked annotations of `train` or `val`."""
    return output_dir / "annotations" / f"{split}.json"


def register(args: argparse.Namespace, output_dir: Path) -> None:
    """Register the data in this process under the names `DATASETS`, in place of an earlier registration."""
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances

    for split, folder in (("train", args.train_images), ("val", args.val_images)):
        if DATASETS[split] in DatasetCatalog.list():
            DatasetCatalog.remove(DATASETS[split])
            MetadataCatalog.remove(DATASETS[split])
        path = annotations_path(output_dir, split)
        register_coco_instances(DATASETS[split], {}, str(path), str(folder.absolute()))
