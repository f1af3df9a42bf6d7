"""Fine-tune a converted encoder with mmsegmentation; `mim_dist_train.sh CONFIG PRETRAINED GPUS` runs this."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transfer.results import write_json
from transfer.segmentation import folder_config, mm_config
from transfer.segmentation.folder_files import LabeledSplit, check_files, describe_data, find_split
from transfer.segmentation.folder_schedule import describe_schedule, set_schedule
from transfer.segmentation.mm_weights import check_model, read_fine_tuned, read_pretrained
from utils import distributed
from utils.checkpoint import Weights
from utils.errors import UsageError


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a usage error prints one line and exits with status 2."""
    try:
        mm_config.import_and_register_mmseg()
        train(parse_args(argv))
    except UsageError as error:
        distributed.exit_with_error(str(error))
    except KeyboardInterrupt:
        distributed.exit_with_error("interrupted; --resume continues from the last checkpoint", status=130)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = mm_config.make_mmseg_parser(
        "Fine-tune a converted encoder with mmsegmentation.", "PRETRAINED", "an encoder from convert_pretrain_to_mm.py"
    )
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint in --work-dir, if any")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    folder_config.add_arguments(parser)
    return parser.parse_args(argv)


def train(args: argparse.Namespace) -> None:
    """Train a model from a converted encoder, or resume its run, with the evaluations of its config.

    Raises:
        UsageError: before anything is written.
    """
    from mmengine.runner import Runner

    cfg, splits = load_training_config(args)
    weights, provenance = read_pretrained(args.pretrained, cfg)
    cfg.model.backbone.init_cfg = {"type": "Pretrained", "checkpoint": str(args.pretrained)}
    cfg.randomness = {"seed": args.seed}
    cfg.resume = args.resume
    resumes = _check_work_dir(cfg, args)
    if splits and "RANK" not in os.environ:  # once, before the ranks start
        num_classes = len(cfg.train_dataloader.dataset.metainfo.classes)
        if not resumes and (largest := check_files(*splits, num_classes)) < num_classes - 1:
            print(f"no training mask has a class above {largest}, of the classes 0 to {num_classes - 1}")
        print(f"{describe_data(*splits, num_classes)}\n{describe_schedule(cfg)}", flush=True)
    mm_config.launch_distributed(args)
    if args.resume:
        # mmengine stores pickled loss histories in a checkpoint, which torch's default reader refuses.
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    runner = Runner.from_cfg(cfg)
    for hook in _make_hooks(weights, provenance):
        runner.register_hook(hook)
    runner.train()


def load_training_config(args: argparse.Namespace) -> tuple[Any, tuple[LabeledSplit, LabeledSplit] | None]:
    """Load the config of a training, with its schedule and the batch size per process.

    Returns:
        The config, and the training and validation split of a custom dataset, or None for another dataset.

    Raises:
        UsageError: as `mm_config.load_config`; or the batch does not divide over the GPUs, or images or masks are
            missing.
    """
    cfg = mm_config.load_config(args, ["train_dataloader", "val_dataloader"])
    processes, splits = mm_config.count_processes(args), None
    if folder_config.uses_folder(cfg):
        splits = find_split(cfg.train_dataloader.dataset), find_split(cfg.val_dataloader.dataset)
        set_schedule(cfg, len(splits[0].pairs), processes)
    mm_config.set_batch_size(cfg, processes)
    return cfg, splits


def _check_work_dir(cfg: Any, args: argparse.Namespace) -> bool:
    """Check that a new run overwrites no other, and that a resumed run's checkpoint can be used.

    Returns:
        Whether there is a checkpoint to resume from.

    Raises:
        UsageError: the folder contains another run, or the checkpoint is damaged, holds code, or is of another model.
    """
    last = Path(cfg.work_dir) / "last_checkpoint"
    if not last.exists():
        return False
    if not args.resume:
        raise UsageError(f"--work-dir {cfg.work_dir}: already contains a run; add --resume, or use another folder")
    path = Path(last.read_text().strip())
    check_model(read_fine_tuned(path, "--resume")["state_dict"], cfg, f"--resume {path}")
    return True


def _make_hooks(weights: Weights, provenance: dict[str, Any]) -> list[Any]:
    """Return the mmengine hooks that compare the backbone with `weights`, and that write `results.json`."""
    from mmengine.hooks import Hook
    from mmengine.model import is_model_wrapper

    class CheckBackbone(Hook):
        """Stop a new run whose backbone is not exactly `weights` before its first step."""

        def before_train(self, runner: Any) -> None:
            if runner.iter > 0:
                return
            model = runner.model.module if is_model_wrapper(runner.model) else runner.model
            tensors = {name: value.cpu() for name, value in model.backbone.state_dict().items()}
            equal = sum(torch.equal(value, weights[name]) for name, value in tensors.items())
            runner.logger.info(f"{equal} of {len(tensors)} backbone tensors are equal to PRETRAINED's")
            if equal < len(tensors):
                raise UsageError(
                    f"{len(tensors) - equal} backbone tensors were not loaded from PRETRAINED; nothing was trained"
                )

    class WriteResults(Hook):
        """Write `results.json` after each evaluation."""

        def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
            if runner.rank == 0 and metrics:
                results = {"step": runner.iter, "metrics": metrics, "pretrained": provenance}
                write_json(Path(runner.work_dir) / "results.json", results)

    return [CheckBackbone(), WriteResults()]


if __name__ == "__main__":
    main()
