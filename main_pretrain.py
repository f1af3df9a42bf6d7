"""Self-supervised pre-training of an encoder."""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch is imported: OpenMP threads that wait by spinning slow down every other process on their cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import data.datasets
import models.backbones
from data.loader import Batch, EpochSampler, build_dataset, build_loader, prefetch
from models import METHODS, Method, build_method
from models.norm import synchronize_batch_norms
from utils import compiler, config, distributed, resume, visualization
from utils.device import amp_dtype, choose_device, loader_workers, memory_gib
from utils.errors import UsageError
from utils.finite import FiniteGuard
from utils.meter import Meter
from utils.optimizers import build_optimizer, clip_gradients, set_hyperparameters, skip_if
from utils.run import Run
from utils.run_log import RunLog

if TYPE_CHECKING:
    from transfer.probe.online_probe import OnlineProbe


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the arguments of a run; the recipe of `--method` for `--arch` sets the defaults of the shared ones.

    Raises:
        UsageError: --patch-size is given for a ResNet.
    """
    recipe_parser = config.make_parser(__doc__, add_help=False)
    recipe_parser.add_argument("--method", default="slotcon")
    recipe_parser.add_argument("--arch")
    chosen = recipe_parser.parse_known_args(argv)[0]

    parser = config.make_parser(__doc__)
    parser.add_argument("--method", choices=tuple(METHODS), default="slotcon", help="pre-training method")
    data.datasets.add_arguments(parser.add_argument_group("data"))
    encoder_group = parser.add_argument_group("encoder")
    models.backbones.add_arguments(encoder_group)
    models.backbones.add_training_arguments(encoder_group)
    config.add_optimization_arguments(parser.add_argument_group("optimization"))
    compiler.add_arguments(parser.add_argument_group("speed"))
    config.add_run_arguments(parser.add_argument_group("run"))
    config.add_probe_arguments(parser.add_argument_group("probe"))
    if chosen.method in METHODS:
        method = METHODS[chosen.method]
        method.add_arguments(parser.add_argument_group(f"method {chosen.method}"))
        config.set_recipe(parser, method.recipe)
        if models.backbones.is_vit(chosen.arch or parser.get_default("arch")):
            config.set_recipe(parser, method.vit_recipe)
    args = parser.parse_args(argv)
    models.backbones.resolve_patch_size(args)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; invalid input ends it with one line and exit status 2."""
    try:
        pretrain(parse_args(argv))
    except UsageError as error:
        distributed.exit_with_error(str(error))
    except KeyboardInterrupt:
        distributed.exit_with_error(
            "interrupted; add --auto-resume to continue from the last checkpoint, if one was saved", status=130
        )
    # Not after an error: destroying the NCCL group would wait for ranks that are still in a collective.
    distributed.shutdown()


def pretrain(args: argparse.Namespace) -> None:
    """Start or resume a run, and train it to its end."""
    device = choose_device(args)
    distributed.initialize(device)
    dataset = build_dataset(args, METHODS[args.method].view_recipes(args))
    run = build_run(args, device, len(dataset))
    start_step, messages = resume.init_or_resume(run)
    probe = build_probe(args)
    distributed.check_same_on_all_ranks("--data-dir and --output-dir", (run.plan, start_step))
    summary = "\n".join([run.describe(), *messages, *run.notes])
    if args.dry_run:
        if distributed.is_main_process():
            print(summary)
        return

    folder, plan, active = Path(args.output_dir), run.plan, distributed.is_main_process()
    with RunLog(folder, plan.total_steps, start_step, plan.steps_per_epoch, active) as log:
        log.info(summary)
        if active:
            resume.write_config(folder, run)
        train(run, dataset, log, start_step, probe)
        log.finish()


def build_run(args: argparse.Namespace, device: torch.device, num_images: int) -> Run[Method]:
    """Build a freshly initialized run on `num_images` images; the same on all ranks."""
    plan = config.make_plan(args, num_images, distributed.world_size())
    notes = compiler.resolve_compile(args, device)
    torch.manual_seed(args.seed)
    method = build_method(args).to(device).to(memory_format=torch.channels_last)
    for name in method.view_sizes:
        method.encoder_q.check_image_size(getattr(args, name), f"--{name.replace('_', '-')}")
    if device.type == "cuda" and distributed.world_size() > 1:
        synchronize_batch_norms(method)
    notes += [*config.plan_notes(args), *method.notes(args.epochs)]
    if args.compile:
        compiler.compile_methods(method, method.compiled, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    return Run(args, plan, device, method, build_optimizer(args, method), scaler, notes)


def build_probe(args: argparse.Namespace) -> "OnlineProbe | None":
    """Build the linear probe of --probe-freq, whose libraries are imported only then."""
    if not args.probe_freq:
        return None
    from transfer.probe.online_probe import OnlineProbe

    return OnlineProbe(args)


def train(
    run: Run[Method],
    dataset: data.datasets.MultiViewDataset,
    log: RunLog,
    start_step: int,
    probe: "OnlineProbe | None",
) -> None:
    """Loop over the optimizer steps from `start_step`: train, report, save and probe."""
    args, plan, method = run.args, run.plan, run.method
    sampler = EpochSampler(plan, start_step, args.seed)
    loader = build_loader(dataset, sampler, loader_workers(args.num_workers), pin_memory=run.device.type == "cuda")
    model = distributed.wrap_ddp(method, run.device)
    guard = FiniteGuard(method, run.device)
    meter = Meter(run.device, plan.num_images, method.build_monitor(plan.steps_per_epoch))
    batches = prefetch(meter.timed(loader), run.device, dataset.view_recipes)
    for step in range(start_step, plan.total_steps):
        batch = train_step(run, model, batches, guard, meter, step)
        log.update_progress(step + 1)
        epoch, step_in_epoch = divmod(step + 1, plan.steps_per_epoch)
        ends_epoch, is_last = step_in_epoch == 0, epoch == args.epochs
        should_save = ends_epoch and (epoch % args.save_freq == 0 or is_last)
        should_probe = probe is not None and ends_epoch and (epoch % args.probe_freq == 0 or is_last)
        if (step + 1) % args.print_freq == 0 or should_save or should_probe:
            metrics, messages = meter.read(step + 1)
            metrics |= {
                "optim/lr": plan.lr_at(step),
                "optim/weight_decay": plan.weight_decay_at(step),
                "optim/teacher_momentum": plan.teacher_momentum_at(step),
                "speed/memory_gib": memory_gib(run.device),
            }
            if probe is not None and should_probe and distributed.is_main_process():
                metrics |= probe.measure(method.encoder_k, run.device)
            log.log_metrics(step + 1, metrics, messages)
        if should_save and distributed.is_main_process():
            resume.save(run, step + 1, epoch)
            add_images(run, batch, dataset, log, step + 1)
        if should_save or should_probe:
            distributed.barrier()


def train_step(
    run: Run[Method], model: torch.nn.Module, batches: Iterator[Batch], guard: FiniteGuard, meter: Meter, step: int
) -> Batch:
    """Take one optimizer step over --accum-steps batches without reading the device; return the last batch."""
    args, plan, dtype = run.args, run.plan, amp_dtype(run.args)
    set_hyperparameters(run.optimizer, plan.lr_at(step), plan.weight_decay_at(step))
    run.method.update_teacher(plan.teacher_momentum_at(step))
    guard.begin_step()
    if args.cuda_graphs:
        torch.compiler.cudagraph_mark_step_begin()
    outputs = []
    for number in range(args.accum_steps):
        batch = replace(next(batches), step=step, epoch=plan.epoch(step), seed=args.seed)
        distributed.seed_forward(args.seed, step, number)  # after `next`, because a new loader draws a number, too
        meter.record_batch(batch)
        is_last = number == args.accum_steps - 1
        with nullcontext() if is_last else distributed.no_sync(model):
            with torch.autocast(run.device.type, dtype, enabled=dtype is not None):
                output = model(batch)
            loss = output["loss"] * guard.check_loss(output["loss"])
            run.scaler.scale(loss / args.accum_steps).backward()
        outputs.append(output)
    run.scaler.unscale_(run.optimizer)
    norm = clip_gradients(run.method, args.clip_grad, args.clip_grad_per_parameter)
    # With float16, the scaler handles gradients that overflow.
    step_ok, bad_ranks = guard.end_step(None if run.scaler.is_enabled() else norm)
    meter.record_step(outputs, norm, step_ok, bad_ranks)
    skip_if(run.optimizer, 1 - step_ok)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    return batch


def add_images(
    run: Run[Method], batch: Batch, dataset: data.datasets.MultiViewDataset, log: RunLog, step: int, count: int = 8
) -> None:
    """Log the first views of a batch, and slot maps at twice their size of images spread over the dataset."""
    views = [visualization.denormalize(view[:count].cpu()) for view in batch.views]
    log.add_image(step, "views", visualization.view_grid(views))
    images = dataset.center_crops(count, 2 * run.args.image_size) / 255
    scores = run.method.slot_maps(visualization.normalize(images).to(run.device))
    if scores is not None:
        maps = visualization.slot_grid(images, scores.cpu())
        log.add_image(step, "slots", maps)
        visualization.save_png("--output-dir", Path(run.args.output_dir) / "slots.png", maps)


if __name__ == "__main__":
    main()
