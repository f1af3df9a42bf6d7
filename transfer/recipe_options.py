"""The options of evaluate.py that change recipes: --detection-options and --segmentation-options."""

import shlex
from collections.abc import Mapping
from dataclasses import replace

from transfer.finetuning import CONFIG_GPUS, RELEASED, FineTuning
from transfer.training_time import Schedule
from utils.errors import UsageError

Options = Mapping[str, str]
"""Key of a config, or flag of train_net.py -> its value; the value of --auto-scale is empty."""

_DETECTION_FLAGS = ("--auto-scale", "--max-val-images")

_SCHEDULE_KEYS = {
    "detection": {
        "iterations": "SOLVER.MAX_ITER",
        "batch_size": "SOLVER.IMS_PER_BATCH",
        "eval_period": "TEST.EVAL_PERIOD",
        "precise_bn": "TEST.PRECISE_BN.NUM_ITER",
        "max_val_images": "--max-val-images",
    },
    "segmentation": {
        "iterations": "train_cfg.max_iters",
        "batch_size": "auto_scale_lr.base_batch_size",
        "eval_period": "train_cfg.val_interval",
        "max_val_images": "val_dataloader.dataset.indices",
    },
}
"""Task -> field of `Schedule` -> the option that sets it."""


def parse_options(task: str, text: str) -> Options:
    """Parse the value of --detection-options or --segmentation-options.

    Raises:
        UsageError: it is not KEY VALUE pairs and the flags of train_net.py above, or for segmentation KEY=VALUE words.
            Other flags would break or repeat those of the published commands.
    """
    flag = f"--{task}-options"
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{flag} {text}: {str(error).lower()}") from None
    if task == "segmentation":
        if wrong := next((word for word in words if "=" not in word or word.startswith("-")), None):
            raise UsageError(f"{flag}: {wrong} is not supported; only KEY=VALUE")
        return dict(word.split("=", 1) for word in words)
    options, remaining = {}, iter(words)
    for key in remaining:
        if key.startswith("--") and key not in _DETECTION_FLAGS:
            raise UsageError(f"{flag}: {key} is not supported; only {', '.join(_DETECTION_FLAGS)} and KEY VALUE pairs")
        value = "" if key == "--auto-scale" else next(remaining, None)
        if value is None:
            raise UsageError(f"{flag}: {key} has no value")
        options[key] = value
    return options


def describe_recipe(fine_tuning: FineTuning, options: Options) -> str:
    """Return the recipe of a fine-tuning with these options, for the table."""
    if not options:
        return fine_tuning.recipe
    changes = "changed: " + " ".join(f"{key}={value}" if value else key for key, value in options.items())
    return changes if fine_tuning.recipe == RELEASED else f"{fine_tuning.recipe}, {changes}"


def change_schedule(fine_tuning: FineTuning, options: Options, processes: int) -> Schedule:
    """Return the length of a fine-tuning with these options.

    Args:
        processes: number of GPUs, or 1 on the CPU, to which --auto-scale scales.

    Raises:
        UsageError: an option that sets the length is not a whole number.
    """
    given = {field: key for field, key in _SCHEDULE_KEYS[fine_tuning.task].items() if key in options}
    for key in given.values():
        if not options[key].isdecimal():
            raise UsageError(f"--{fine_tuning.task}-options: {key} is '{options[key]}', not a whole number")
    schedule = replace(fine_tuning.schedule, **{field: int(options[key]) for field, key in given.items()})
    if "--auto-scale" not in options:
        return schedule
    factor = processes / CONFIG_GPUS
    return replace(
        schedule,
        iterations=round(schedule.iterations / factor),
        batch_size=round(schedule.batch_size * factor),
        eval_period=round(schedule.eval_period / factor),
    )
