"""Train a classifier, and save it and measure its accuracy after each epoch."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils import distribute_bn
from torch import nn
from torch.utils.data import DataLoader

from data.datasets import MAX_UNREADABLE_IN_A_ROW
from data.loader import EpochSampler
from transfer.classification.accuracy import Accuracy, evaluate
from transfer.classification.augmentation import Mix
from transfer.classification.fine_tuning_run import Classification
from transfer.classification.labeled_images import (
    NO_LABEL,
    LabeledBatch,
    TrainingImages,
    ValidationImages,
    collate,
    seed_generators,
)
from transfer.results import write_json
from utils import distributed, resume
from utils.device import amp_dtype, loader_workers, memory_gib
from utils.errors import UsageError
from utils.finite import FiniteGuard
from utils.meter import Meter
from utils.optimizers import clip_gradients, skip_if
from utils.run_log import RunLog


def train(
    run: Classification,
    images: TrainingImages,
    val_images: ValidationImages,
    mix: Mix,
    log: RunLog,
    start_step: int,
    provenance: dict[str, Any],
) -> None:
    """Loop over the optimizer steps from `start_step`; save and evaluate after each epoch.

    Raises:
        UsageError: too many images cannot be read, too many losses are not finite, or a file cannot be written.
    """
    args, plan = run.args, run.plan
    model = distributed.wrap_ddp(run.method.train(), run.device)
    guard, meter = FiniteGuard(run.method, run.device), Meter(run.device, plan.num_images)
    # Meter reads the fields `index` and `unreadable` of a batch, which a LabeledBatch has as well.
    batches: Any = meter.timed(_build_loader(run, images, start_step))
    for step in range(start_step, plan.total_steps):
        batch = next(batches)
        _check_readable(batch)
        _train_step(run, model, batch, mix, guard, meter, step)
        log.update_progress(step + 1)
        epoch, step_in_epoch = divmod(step + 1, plan.steps_per_epoch)
        if (step + 1) % args.print_freq and step_in_epoch:
            continue
        metrics, messages = meter.read(step + 1)
        metrics |= {"optim/lr": plan.lr_at(step), "speed/memory_gib": memory_gib(run.device)}
        if not step_in_epoch:
            _save(run, step + 1, epoch)
            accuracy = evaluate_epoch(run, val_images, log, epoch, provenance)
            metrics |= {"val/top1": accuracy.top1, "val/top5": accuracy.top5}
        log.log_metrics(step + 1, metrics, messages)


def _build_loader(run: Classification, images: TrainingImages, start_step: int) -> DataLoader[Any]:
    return DataLoader(
        images,
        batch_sampler=EpochSampler(run.plan, start_step, run.args.seed),
        num_workers=loader_workers(run.args.num_workers),
        collate_fn=collate,
        pin_memory=run.device.type == "cuda",
    )


def _check_readable(batch: LabeledBatch) -> None:
    if (batch.labels == NO_LABEL).any():
        last = batch.unreadable[-1]
        raise UsageError(
            f"--data-dir: {MAX_UNREADABLE_IN_A_ROW} images in a row cannot be read, as {last}; repair them"
        )


def _train_step(
    run: Classification, model: nn.Module, batch: Any, mix: Mix, guard: FiniteGuard, meter: Meter, step: int
) -> None:
    """Take one optimizer step without reading the device."""
    args, dtype = run.args, amp_dtype(run.args)
    for group in run.optimizer.param_groups:
        group["lr"] = run.plan.lr_at(step) * group["lr_scale"]
    meter.record_batch(batch)
    seed_generators(args.seed, step, distributed.rank())
    images = batch.images.to(run.device, memory_format=torch.channels_last, non_blocking=True)
    images, targets = mix(images, batch.labels.to(run.device, non_blocking=True))
    guard.begin_step()
    with torch.autocast(run.device.type, dtype, enabled=dtype is not None):
        logits = model(images)
    loss = F.cross_entropy(logits.float(), targets)
    run.scaler.scale(loss * guard.check_loss(loss)).backward()
    run.scaler.unscale_(run.optimizer)
    norm = clip_gradients(run.method, max_norm=0)
    step_ok, bad_ranks = guard.end_step(None if run.scaler.is_enabled() else norm)
    meter.record_step([{"loss": loss}], norm, step_ok, bad_ranks)
    skip_if(run.optimizer, 1 - step_ok)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()


def _save(run: Classification, step: int, epoch: int) -> None:
    """Save a checkpoint with the same batch norm statistics on all ranks; keep those of the last two epochs."""
    if distributed.world_size() > 1:
        distribute_bn(run.method, distributed.world_size(), reduce=True)
    if distributed.is_main_process():
        resume.save(run, step, epoch)
        Path(run.args.output_dir, f"ckpt_epoch_{epoch - 2}.pth").unlink(missing_ok=True)
    distributed.barrier()


def evaluate_epoch(
    run: Classification, images: ValidationImages, log: RunLog, epoch: int, provenance: dict[str, Any]
) -> Accuracy:
    """Evaluate the model after `epoch` epochs, log the accuracy and write it to `results.json`.

    Raises:
        UsageError: the file cannot be written.
    """
    accuracy = evaluate(run.method, images, run.args, run.device)
    log.info(f"epoch {epoch}: {accuracy}")
    if accuracy.unreadable:
        log.info(f"unreadable, counted as wrong: {', '.join(accuracy.unreadable)}")
    if distributed.is_main_process():
        results = {
            "top1": accuracy.top1,
            "top5": accuracy.top5,
            "epoch": epoch,
            "epochs": run.args.epochs,
            "images": {"train": run.plan.num_images, "val": accuracy.num_images},
            "unreadable": accuracy.unreadable,
            "recipe": run.metadata,
            "pretrained": provenance,
            "versions": resume.versions(),
            "git": resume.git_revision(),
        }
        write_results(Path(run.args.output_dir), results)
    return accuracy


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write `results.json` into a folder.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "results.json", results)
    except OSError as error:
        raise UsageError(f"--output-dir {folder}: cannot be written ({error.strerror}); use another folder") from None
