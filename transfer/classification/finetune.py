"""Fine-tune a pre-trained encoder on labeled images, and measure its top-1 and top-5 accuracy."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Before torch is imported: OpenMP threads that wait by spinning slow down every other process on their cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transfer.classification.accuracy import evaluate
from transfer.classification.augmentation import (
    add_augmentation_arguments,
    build_mix,
    build_train_transform,
    build_val_transform,
)
from transfer.classification.classifier_training import evaluate_epoch, train, write_results
from transfer.classification.fine_tuning_run import build_run, describe, identify_classes, resolve_defaults
from transfer.classification.image_classifier import build_classifier
from transfer.classification.labeled_files import DATASETS, LabeledFiles, check_same_classes, list_labeled_files
from transfer.classification.labeled_images import TrainingImages, ValidationImages
from transfer.encoders import read_encoder
from utils import checkpoint, distributed, resume
from utils.config import at_least, between, make_parser
from utils.device import choose_device
from utils.errors import UsageError
from utils.run_log import RunLog

_USED_BY_EVAL_ONLY = (
    "checkpoint",
    "dataset",
    "data_dir",
    "max_val_images",
    "num_workers",
    "batch_size",
    "amp",
    "output_dir",
    "eval_only",
    "device",
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Exits with status 2 if --eval-only is given with a flag that it does not use.
    """
    parser = make_parser(__doc__)
    parser.add_argument("checkpoint", metavar="CKPT", help="any checkpoint that transfer/convert.py reads")
    parser.add_argument(
        "--encoder",
        choices=("teacher", "student"),
        help="which encoder of CKPT to use (default: the teacher, if there are two)",
    )
    _add_data_arguments(parser.add_argument_group("data"))
    add_augmentation_arguments(parser.add_argument_group("augmentation"))
    _add_optimization_arguments(parser.add_argument_group("optimization"))
    _add_run_arguments(parser.add_argument_group("run"))
    parser.set_defaults(init="", start_epoch=1)  # of pre-training, for utils.resume
    args = parser.parse_args(argv)
    if args.eval_only:
        changed = [name for name, value in vars(args).items() if value != parser.get_default(name)]
        if unused := [f"--{name.replace('_', '-')}" for name in changed if name not in _USED_BY_EVAL_ONLY]:
            parser.error(f"--eval-only does not use {', '.join(unused)}; omit {'it' if len(unused) == 1 else 'them'}")
    return args


def _add_data_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--dataset", choices=DATASETS, default="folder", help="layout of --data-dir")
    add("--data-dir", required=True, help="{train,val}/CLASS/*.jpg, or iNaturalist 2019 as it is distributed")
    add("--image-size", type=at_least(32), default=224, help="side of the images in pixels")
    add("--max-val-images", type=at_least(1), metavar="N", help="evaluate on N evenly spaced images (default: all)")
    add("--num-workers", type=at_least(0), default=8, help="DataLoader workers for each process")


def _add_optimization_arguments(group: argparse._ArgumentGroup) -> None:
    add, non_negative = group.add_argument, at_least(0, float)
    add(
        "--global-pool",
        choices=("avg", "token"),
        default="avg",
        help="classify the mean of the patch tokens, or the class token; a ResNet has the mean only",
    )
    add("--drop-path", type=between(0, 1), help="largest stochastic depth rate (default: 0.1 for ViTs, 0 for ResNets)")
    add(
        "--layer-decay",
        type=between(0, 1),
        help="learning rate decay per layer (default: 0.65 for ViTs, 1 for ResNets)",
    )
    add("--batch-size", type=at_least(1), default=1024, help="images per batch over all GPUs")
    add("--epochs", type=at_least(1), default=100, help="number of epochs")
    add("--base-lr", type=non_negative, default=5e-4, help="learning rate of the classifier for a batch of 256")
    add(
        "--warmup-epoch",
        type=at_least(0),
        help="epochs of linear warm-up from 0 (default: 5, but at most a tenth of --epochs)",
    )
    add("--weight-decay", type=non_negative, default=0.05, help="weight decay, not applied to biases and norms")
    add(
        "--amp",
        choices=("bf16", "fp16", "off"),
        help="mixed precision; default: bf16 on GPUs that support it, fp16 on older GPUs, off on CPUs",
    )


def _add_run_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--output-dir", default="./output/classification", help="folder of the run")
    add("--auto-resume", action="store_true", help="resume from current.pth in --output-dir if it exists")
    add("--resume", default="", metavar="FILE", help="resume from a checkpoint of a fine-tuning")
    add("--allow-changes", action="store_true", help="resume although arguments changed that affect the result")
    add("--eval-only", action="store_true", help="evaluate CKPT, which a fine-tuning saved, on the validation images")
    add("--print-freq", type=at_least(1), default=10, help="optimizer steps between reports")
    add("--seed", type=at_least(0), default=0, help="random seed of the classifier, order and augmentation")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: a GPU if there is one")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; invalid input ends it with one line and exit status 2."""
    args = parse_args(argv)
    try:
        evaluate_fine_tuned(args) if args.eval_only else fine_tune(args)
    except UsageError as error:
        distributed.exit_with_error(str(error))
    except KeyboardInterrupt:
        distributed.exit_with_error(
            "interrupted; add --auto-resume to continue from the last checkpoint, if one was saved", status=130
        )
    # Not after an error: destroying the NCCL group would wait for ranks that are still in a collective.
    distributed.shutdown()


def fine_tune(args: argparse.Namespace) -> None:
    """Start or resume a fine-tuning, and train it to its end.

    Raises:
        UsageError: before anything is written, if an input is invalid.
    """
    device = choose_device(args)
    distributed.initialize(device)
    # A moved file does not change the result; its checksum is saved among the arguments instead of its path.
    encoder = read_encoder(vars(args).pop("checkpoint"), args.encoder)
    train_files, val_files = _list_splits(args)
    resolve_defaults(args, encoder, train_files.classes)
    run = build_run(args, device, encoder, len(train_files.files), len(train_files.classes))
    train_images = TrainingImages(train_files, build_train_transform(args), args.seed)
    val_images = ValidationImages(val_files, build_val_transform(args.image_size))
    mix = build_mix(args, len(train_files.classes))
    start_step, messages = resume.init_or_resume(run)
    distributed.check_same_on_all_ranks("--data-dir and --output-dir", (run.plan, start_step))

    folder, plan, active = Path(args.output_dir), run.plan, distributed.is_main_process()
    with RunLog(folder, plan.total_steps, start_step, plan.steps_per_epoch, active) as log:
        log.info("\n".join([describe(run, encoder, len(val_images)), *messages]))
        if active:
            resume.write_config(folder, run)
        if start_step < plan.total_steps:
            train(run, train_images, val_images, mix, log, start_step, encoder.provenance)
        else:
            evaluate_epoch(run, val_images, log, args.epochs, encoder.provenance)
        log.finish()


def _list_splits(args: argparse.Namespace) -> tuple[LabeledFiles, LabeledFiles]:
    """Return the files of both splits, of which `--max-val-images` limits the second.

    Raises:
        UsageError: a split is missing or damaged, or their classes differ.
    """
    train_files = list_labeled_files(args.dataset, Path(args.data_dir), "train")
    val_files = list_labeled_files(args.dataset, Path(args.data_dir), "val")
    check_same_classes(train_files, val_files)
    return train_files, val_files.limit(args.max_val_images)


def evaluate_fine_tuned(args: argparse.Namespace) -> None:
    """Measure the accuracy of a fine-tuned classifier, and write it to `results.json` in --output-dir.

    Raises:
        UsageError: the checkpoint is not of a fine-tuning, has values that are not finite or other classes than the
            data, or --output-dir has results.
    """
    if any(Path(args.output_dir, name).exists() for name in ("metrics.jsonl", "results.json")):
        raise UsageError(f"--output-dir {args.output_dir}: already has results; use another folder with --eval-only")
    device = choose_device(args)
    distributed.initialize(device)
    state = checkpoint.load(args.checkpoint, "checkpoint")
    saved = checkpoint.checkpoint_args(state)
    weights, epoch = state.get("model"), state.get("epoch")
    has_arguments = {"arch", "classes", "global_pool", "image_size"} <= saved.keys()
    if not has_arguments or not isinstance(weights, Mapping) or not isinstance(epoch, int):
        raise UsageError(
            f"checkpoint {args.checkpoint}: not one that a fine-tuning saved; omit --eval-only to train it"
        )
    files = list_labeled_files(args.dataset, Path(args.data_dir), "val")
    if identify_classes(files.classes) != saved["classes"]:
        raise UsageError(
            f"--data-dir {args.data_dir}: has the classes ({identify_classes(files.classes)}), and the checkpoint "
            f"({saved['classes']}); use the data that it was trained on"
        )
    files = files.limit(args.max_val_images)
    model = build_classifier(saved["arch"], len(files.classes), saved["image_size"], saved["global_pool"])
    checkpoint.load_strict(model, weights, f"checkpoint {args.checkpoint}")
    checkpoint.check_finite(weights, f"checkpoint {args.checkpoint}")
    images = ValidationImages(files, build_val_transform(saved["image_size"]))
    accuracy = evaluate(model.to(device), images, args, device)
    if distributed.is_main_process():
        results: dict[str, Any] = {"top1": accuracy.top1, "top5": accuracy.top5, "epoch": epoch}
        results |= {"images": {"val": accuracy.num_images}, "unreadable": accuracy.unreadable, "recipe": saved}
        write_results(Path(args.output_dir), results)
        print(f"{accuracy}; written to {args.output_dir}/results.json")


if __name__ == "__main__":
    main()
