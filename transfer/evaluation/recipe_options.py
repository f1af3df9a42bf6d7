"""The options of evaluate.py that change recipes: --max-val-images, and one for each task, as --detection-options."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace

from transfer.evaluation.fine_tunings import RELEASED, FineTuning
from transfer.evaluation.training_time import RunLength, change_epochs
from transfer.frameworks import CONFIG_GPUS
from utils.errors import UsageError

Options = Mapping[str, str]
"""Key of a config, or flag of train_net.py, train.py or finetune.py -> its value, empty for a flag without one."""

_RESERVED_KEYS = {
    "detection": ("MODEL.WEIGHTS", "OUTPUT_DIR", "SEED"),
    "segmentation": (
        "work_dir",
        "load_from",
        "resume",
        "randomness",
        "launcher",
        "model.init_cfg",
        "model.pretrained",
        "model.backbone.init_cfg",
        "model.backbone.pretrained",
    ),
    "classification": (
        "--encoder",
        "--dataset",
        "--data-dir",
        "--output-dir",
        "--seed",
        "--device",
        "--auto-resume",
        "--resume",
        "--allow-changes",
        "--eval-only",
        "--max-val-images",
    ),
}
"""Task -> the keys of weights, data, folders and seeds, which the commands of evaluate.py set."""

_LENGTH_KEYS = {
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
        "max_val_images": "--max-val-images",
    },
    "classification": {
        "epochs": "--epochs",
        "batch_size": "--batch-size",
        "max_val_images": "--max-val-images",
    },
}
"""Task -> field of `RunLength` -> the option that sets it."""


def parse_options(task: str, text: str) -> Options:
    """Parse the value of --detection-options, --segmentation-options or --classification-options.

    Raises:
        UsageError: it is not KEY VALUE pairs and --auto-scale for detection, because other flags would break or repeat
            those of the published commands, KEY=VALUE words for segmentation, or flags for classification; or a key is
            one that evaluate.py sets.
    """
    flag = f"--{task}-options"
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{flag} {text}: {str(error).lower()}") from None
    options = _PARSERS[task](flag, words)
    for reserved in _RESERVED_KEYS[task]:
        if key := next((key for key in options if key == reserved or key.startswith(f"{reserved}.")), None):
            raise UsageError(f"{flag}: {key} cannot be changed, because this command sets it for each run")
    return options


def _parse_pairs(flag: str, words: list[str]) -> Options:
    options, remaining = {}, iter(words)
    for key in remaining:
        if key.startswith("--") and key != "--auto-scale":
            raise UsageError(f"{flag}: {key} is not supported; only --auto-scale and KEY VALUE pairs")
        value = "" if key == "--auto-scale" else next(remaining, None)
        if value is None:
            raise UsageError(f"{flag}: {key} has no value")
        options[key] = value
    return options


def _parse_assignments(flag: str, words: list[str]) -> Options:
    if wrong := next((word for word in words if "=" not in word or word.startswith("-")), None):
        raise UsageError(f"{flag}: {wrong} is not supported; only KEY=VALUE")
    return dict(word.split("=", 1) for word in words)


def _parse_flags(flag: str, words: list[str]) -> Options:
    options: dict[str, str] = {}
    for word in words:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            if name in options:
                raise UsageError(f"{flag}: {name} is given twice; omit one of the two")
            options[name] = value
        elif options and not options[name]:
            options[name] = word
        else:
            raise UsageError(f"{flag}: {word} is not supported; only flags of finetune.py, each with at most one value")
    return options


_PARSERS: dict[str, Callable[[str, list[str]], Options]] = {
    "detection": _parse_pairs,
    "segmentation": _parse_assignments,
    "classification": _parse_flags,
}


def add_max_val_images(fine_tuning: FineTuning, options: Options, count: int | None) -> Options:
    """Return `options` with --max-val-images if it is given and the framework of the fine-tuning supports it."""
    if not count or fine_tuning.evaluates_all_images:
        return options
    return {"--max-val-images": str(count), **options}


def describe_recipe(fine_tuning: FineTuning, options: Options) -> str:
    """Return the recipe of a fine-tuning with these options, for the table."""
    if not options:
        return fine_tuning.recipe
    changes = "changed: " + " ".join(f"{key}={value}" if value else key for key, value in options.items())
    return changes if fine_tuning.recipe == RELEASED else f"{fine_tuning.recipe}, {changes}"


def change_length(fine_tuning: FineTuning, options: Options, processes: int) -> RunLength:
    """Return the length of a fine-tuning with these options.

    Args:
        processes: number of GPUs, or 1 on the CPU, to which --auto-scale scales.

    Raises:
        UsageError: an option that sets the length is not a whole number.
    """
    given = {field: key for field, key in _LENGTH_KEYS[fine_tuning.task].items() if key in options}
    for key in given.values():
        if not options[key].isdecimal():
            raise UsageError(f"--{fine_tuning.task}-options: {key} is '{options[key]}', not a whole number")
    length = replace(fine_tuning.length, **{field: int(options[key]) for field, key in given.items()})
    if length.epochs:
        changed = change_epochs(fine_tuning.length, length.epochs, length.batch_size)
        return replace(changed, max_val_images=length.max_val_images)
    if "--auto-scale" not in options:
        return length
    factor = processes / CONFIG_GPUS
    return replace(
        length,
        iterations=round(length.iterations / factor),
        batch_size=round(length.batch_size * factor),
        eval_period=round(length.eval_period / factor),
    )
