"""The schedule of a training on a custom dataset, from its number of images."""

import math
from typing import Any

from transfer.custom_schedule import default_batch_size, default_iterations

_ADE20K_IMAGES = 20210
_LONGEST_WARM_UP = 1500


def set_schedule(cfg: Any, num_images: int, processes: int) -> None:
    """Set the batch size, the learning rate, the length and the intervals that are None in a config.

    They follow from the config's `ade20k_schedule`, the learning rate for a batch of 16 and the length on ADE20K.

    Args:
        num_images: number of training images.
        processes: number of processes that share a batch.
    """
    _set_missing(cfg.auto_scale_lr, "base_batch_size", default_batch_size(num_images, processes))
    batch_size = cfg.auto_scale_lr.base_batch_size
    iterations = default_iterations(num_images, batch_size, cfg.ade20k_schedule.max_iters, _ADE20K_IMAGES)
    _set_missing(cfg.train_cfg, "max_iters", iterations)
    optimizer, length = cfg.optim_wrapper.optimizer, cfg.train_cfg.max_iters
    _set_missing(optimizer, "lr", cfg.ade20k_schedule.lr * batch_size / 16)
    warm_up = min(_LONGEST_WARM_UP, length // 10)
    if warm_up < 2:  # mmengine would keep the first learning rate of the warm-up
        warm_up = 0
        cfg.param_scheduler = [schedule for schedule in cfg.param_scheduler if schedule.type != "LinearLR"]
    for schedule in cfg.param_scheduler:
        _set_missing(schedule, "begin", warm_up)
        _set_missing(schedule, "end", warm_up if schedule.type == "LinearLR" else length)
        _set_missing(schedule, "eta_min", optimizer.lr / 100)
    _set_missing(cfg.train_cfg, "val_interval", math.ceil(length / 5))
    _set_missing(cfg.default_hooks.checkpoint, "interval", min(2000, cfg.train_cfg.val_interval))
    _set_missing(cfg.default_hooks.logger, "interval", min(50, math.ceil(length / 20)))


def _set_missing(section: Any, key: str, value: float) -> None:
    """Set an entry of a config that exists and is None."""
    if key in section and section[key] is None:
        section[key] = value


def describe_schedule(cfg: Any) -> str:
    """Return a line with the length, the batch size, the learning rate and the interval of evaluations."""
    return (
        f"{cfg.train_cfg.max_iters} iterations of {cfg.auto_scale_lr.base_batch_size} images, learning rate "
        f"{cfg.optim_wrapper.optimizer.lr:g}, evaluation every {cfg.train_cfg.val_interval} iterations"
    )
