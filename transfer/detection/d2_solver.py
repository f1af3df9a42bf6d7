"""Batch size, learning rate and length of a training run on a custom dataset, by the names of detectron2's config."""

import math
from dataclasses import dataclass

from transfer.custom_schedule import default_batch_size, default_iterations

BASE_LR = {"SGD": 0.02, "ADAMW": 0.0001}
"""Optimizer, as in SOLVER.OPTIMIZER -> the learning rate of the configs for COCO, with batches of 16."""

_COCO_1X_ITERATIONS = 90_000
_COCO_IMAGES = 117_266
"""Number of images with objects in COCO's train2017, for which the 1x schedule was chosen."""


@dataclass(frozen=True)
class SolverSettings:
    """Values of SOLVER and TEST in detectron2's config; lengths are in iterations."""

    ims_per_batch: int
    base_lr: float
    max_iter: int
    steps: tuple[int, ...]
    """Where the learning rate is divided by 10."""
    warmup_iters: int
    eval_period: int
    """Between two evaluations, and between two checkpoints."""
    precise_bn_iters: int
    """Batches for the batch-norm statistics before each evaluation."""


def default_solver_settings(
    num_images: int,
    processes: int = 1,
    ims_per_batch: int | None = None,
    max_iter: int | None = None,
    optimizer: str = "SGD",
) -> SolverSettings:
    """Return the settings for a training set; those for COCO's number of images are the 1x schedule.

    Args:
        num_images: number of images with objects.
        ims_per_batch: over all processes; None for the default.
        max_iter: None for the default.
        optimizer: a key of `BASE_LR`.
    """
    if ims_per_batch is None:
        ims_per_batch = default_batch_size(num_images, processes)
    if max_iter is None:
        max_iter = default_iterations(num_images, ims_per_batch, _COCO_1X_ITERATIONS, _COCO_IMAGES)
    steps = {max_iter * 2 // 3, max_iter * 8 // 9} - {0}
    return SolverSettings(
        ims_per_batch,
        base_lr=BASE_LR[optimizer] * ims_per_batch / 16,
        max_iter=max_iter,
        steps=tuple(sorted(steps)),
        warmup_iters=min(1000, max_iter // 10),
        eval_period=math.ceil(max_iter / 5),
        precise_bn_iters=min(200, math.ceil(num_images / ims_per_batch)),
    )
