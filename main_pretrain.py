"""Pre-train a method on scenes: arguments -> data -> method -> loop."""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

# Before torch: CPU threads that wait by spinning lose most of their speed to any other process on their cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import data.datasets
import models.backbones
from data.loader import Batch, EpochSampler, build_loader
from data.loader import prefetch
from models import METHODS, build_method
from models.norm import convert_sync_batchnorm
from transfer.probe import online
from utils import config, compiler, distributed, pictures, resume
from utils.device import amp_dtype, choose_device, loader_workers
from utils.errors import UsageError
from utils.finite import FiniteGuard
from utils.run_log import RunLog, memory_gib
from utils.meter import Meter
from utils.optimizers import build_optimizer, skip_if
from utils.config import make_plan
from utils.run import Run


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of a run; `--method` decides which flags there are."""
    first = config.make_parser(__doc__, add_help=False)
    first.add_argument("--method", default="slotcon")
    method = first.parse_known_args(argv)[0].method

    parser = config.make_parser(__doc__)
    parser.add_argument("--method", choices=tuple(METHODS), default="slotcon", help="what to pre-train")
    data.datasets.add_arguments(parser.add_argument_group("data"))
    models.backbones.add_arguments(parser.add_argument_group("encoder"))
    if method in METHODS:
        METHODS[method].add_arguments(parser.add_argument_group(f"method {method}"))
    config.add_optimization(parser.add_argument_group("optimization"))
    compiler.add_arguments(parser.add_argument_group("speed"))
    config.add_run(parser.add_argument_group("run"))
    online.add_arguments(parser.add_argument_group("probe"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """The command: mistakes of the user end in one line and exit status 2."""
    args = parse_args(argv)
    try:
        pretrain(args)
    except UsageError as error:
        distributed.exit_with_error(str(error))
    except KeyboardInterrupt:
        distributed.exit_with_error("stopped; --auto-resume goes on from the last checkpoint", status=130)
    distributed.shutdown()  # not after an error: with NCCL it would wait for ranks that may be waiting for this one


def pretrain(args: argparse.Namespace) -> None:
    """One run, from its start or from where it stopped, to its end."""
    device = choose_device(args)
    distributed.initialize(device)
    dataset = data.datasets.build_dataset(args)
    run = build_run(args, device, len(dataset))
    start, notes = resume.begin(run)
    notes += run.notes
    probe = online.OnlineProbe(args) if args.probe_freq else None
    distributed.check_same_on_all_ranks("--data-dir and --output-dir", (run.plan, start))
    if args.dry_run:
        if distributed.is_main_process():
            print("\n".join([run.describe(), *notes]))
        return

    folder = Path(args.output_dir)
    with RunLog(folder, run.plan.total_steps, start, run.plan.steps_per_epoch, active=distributed.is_main_process()) as log:
        log.say("\n".join([run.describe(), *notes]))
        if distributed.is_main_process():
            resume.write_config(folder, run)
        train(run, dataset, log, start, probe)
        log.finish()


def build_run(args: argparse.Namespace, device: torch.device, images: int) -> Run:
    """A freshly initialized run over so many images; the same on all ranks."""
    plan = make_plan(args, images, distributed.world_size())
    notes = compiler.resolve(args, device)
    torch.manual_seed(args.seed)
    method = build_method(args).to(device).to(memory_format=torch.channels_last)
    if device.type == "cuda" and distributed.world_size() > 1:
        convert_sync_batchnorm(method)
    if args.compile:
        compiler.compile_method(method, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    return Run(args, plan, device, method, build_optimizer(args, method), scaler, notes)


def train(
    run: Run, dataset: data.datasets.SceneDataset, log: RunLog, start: int, probe: online.OnlineProbe | None
) -> None:
    """The loop over optimizer steps from `start`: report every --print-freq; save, and probe, every so many epochs."""
    args, plan = run.args, run.plan
    sampler = EpochSampler(plan, start, args.seed)
    loader = build_loader(dataset, sampler, loader_workers(args.num_workers), pin_memory=run.device.type == "cuda")
    model = distributed.wrap_ddp(run.method, run.device)
    guard, meter = FiniteGuard(run.method, run.device), Meter(run.device, plan.images, plan.steps_per_epoch)
    batches = prefetch(meter.timed(loader), run.device, dataset.recipes)
    for step in range(start, plan.total_steps):
        batch = optimize(run, model, batches, guard, meter, step)
        log.advance(step + 1)
        epoch, within = divmod(step + 1, plan.steps_per_epoch)
        saving = within == 0 and (epoch % args.save_freq == 0 or epoch == args.epochs)
        probing = probe is not None and within == 0 and (epoch % args.probe_freq == 0 or epoch == args.epochs)
        if (step + 1) % args.print_freq == 0 or saving or probing:
            metrics, notes = meter.read(step + 1)
            times = {
                "lr": plan.lr(step),
                "teacher_momentum": plan.momentum(step),
                "memory_gib": memory_gib(run.device),
            }
            if probe is not None and probing and distributed.is_main_process():
                times |= probe.measure(run.method.encoder_k, run.device)
            log.report(step + 1, metrics | times, notes)
        if saving and distributed.is_main_process():
            resume.save(run, step + 1, epoch)
            draw(run, batch, dataset, log, step + 1)
        if saving or probing:
            distributed.barrier()


def optimize(
    run: Run, model: torch.nn.Module, batches: Iterator[Batch], guard: FiniteGuard, meter: Meter, step: int
) -> Batch:
    """One optimizer step over --accum-steps batches; the host never waits for the device. Returns the last batch."""
    args, dtype = run.args, amp_dtype(run.args)
    for group in run.optimizer.param_groups:
        group["lr"] = run.plan.lr(step)
    run.method.update_teacher(run.plan.momentum(step))
    guard.open_step()
    if args.cuda_graphs:
        torch.compiler.cudagraph_mark_step_begin()
    outputs = []
    for number in range(args.accum_steps):
        batch = replace(next(batches), step=step, epoch=run.plan.epoch(step), seed=args.seed)
        meter.saw(batch)
        last = number == args.accum_steps - 1
        with nullcontext() if last else distributed.no_sync(model):
            with torch.autocast(run.device.type, dtype, enabled=dtype is not None):
                output = model(batch)
            loss = output["loss"] * guard.watch(output["loss"])
            run.scaler.scale(loss / args.accum_steps).backward()
        outputs.append(output)
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.get_total_norm([p.grad for p in run.method.parameters() if p.grad is not None])
    if args.clip_grad:
        torch.nn.utils.clip_grads_with_norm_(run.method.parameters(), args.clip_grad, norm)
    # With float16 an overflow of the scaled gradients is the scaler's daily business.
    go, bad = guard.close_step(None if run.scaler.is_enabled() else norm)
    meter.add(outputs, norm, go, bad)
    skip_if(run.optimizer, 1 - go)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    return batch


def draw(run: Run, batch: Batch, dataset: data.datasets.SceneDataset, log: RunLog, step: int, count: int = 8) -> None:
    """A few views as the networks see them, and the slot maps of a few whole images, at twice the views' size."""
    log.picture(step, "views", pictures.view_grid([pictures.levels(view[:count].cpu()) for view in batch.views]))
    images = dataset.plain(count, 2 * run.args.image_size) / 255
    scores = run.method.slot_maps(pictures.normalize(images).to(run.device))
    if scores is not None:
        maps = pictures.slot_grid(images, scores.cpu())
        log.picture(step, "slots", maps)
        pictures.save(maps, Path(run.args.output_dir) / "slots.png")


if __name__ == "__main__":
    main()
