"""Fine-tune a converted encoder with mmsegmentation: `mim_dist_train.sh CONFIG PRETRAINED GPUS` calls this."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transfer.encoders import converted_from
from utils.checkpoint import first_mismatch
from transfer.segmentation import runs
from utils import checkpoint, distributed
from utils.checkpoint import Weights
from utils.errors import UsageError

_CONVERT = "convert one with transfer/segmentation/convert_pretrain_to_mm.py IN.pth OUT.pth"


def main(argv: Sequence[str] | None = None) -> None:
    """The command: mistakes of the user end in one line and exit status 2."""
    try:
        runs.import_mmseg()
        train(_parse_args(argv))
    except UsageError as error:
        distributed.exit_with_error(str(error))
    except KeyboardInterrupt:
        distributed.exit_with_error("stopped; --resume goes on from the last checkpoint", status=130)


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = runs.make_parser(
        "Fine-tune a converted encoder with mmsegmentation.", "PRETRAINED", "what convert_pretrain_to_mm.py wrote"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --work-dir")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn by chance")
    return parser.parse_args(argv)


def train(args: argparse.Namespace) -> None:
    """One run, from its start or from where it stopped, with the evaluations of its config.

    Raises:
        UsageError: before anything is written.
    """
    from mmengine.runner import Runner

    config = runs.load_config(args)
    weights, provenance = read_pretrained(args.pretrained, config)
    config.model.backbone.init_cfg = {"type": "Pretrained", "checkpoint": str(args.pretrained)}
    config.randomness = {"seed": args.seed}
    config.resume = args.resume
    if not args.resume and (Path(config.work_dir) / "last_checkpoint").exists():
        raise UsageError(f"--work-dir {config.work_dir}: holds a run; --resume goes on with it, or use another folder")
    runs.launch(args)
    if args.resume:
        # mmengine keeps pickled loss histories in a run's own checkpoints; torch's safe reader refuses them.
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    runner = Runner.from_cfg(config)
    for hook in _hooks(weights, provenance):
        runner.register_hook(hook)
    runner.train()


def read_pretrained(path: Path, config: Any) -> tuple[Weights, dict[str, Any]]:
    """The weights in a converted file, all of them the config's backbone's, and where they come from.

    Raises:
        UsageError: they are not; mmsegmentation would print that and train on a random backbone.
    """
    from mmseg.registry import MODELS

    if path.suffix == ".pkl":
        raise UsageError(f"PRETRAINED {path}: is made for detectron2; {_CONVERT}")
    state = checkpoint.load(path, "PRETRAINED")
    weights = checkpoint.extract_weights(state, f"PRETRAINED {path}")
    if "conv1.weight" not in weights and checkpoint.find_encoder(weights)[0]:
        raise UsageError(f"PRETRAINED {path}: is not converted; {_CONVERT}")
    with torch.device("meta"):
        backbone = MODELS.build({**config.model.backbone, "init_cfg": None})
    if first := first_mismatch(weights, backbone.state_dict()):
        wanted = f"{config.model.backbone.type}{config.model.backbone.get('depth', '')}"
        raise UsageError(f"PRETRAINED {path}: not the config's backbone, a {wanted} ({first}); {_CONVERT}")
    return weights, converted_from(state)


def _hooks(weights: Weights, provenance: dict[str, Any]) -> list[Any]:
    from mmengine.hooks import Hook
    from mmengine.model import is_model_wrapper

    class BackboneIsPretrained(Hook):
        """Stops a run whose backbone is not `weights`, whatever the framework made of them."""

        def before_train(self, runner: Any) -> None:
            if runner.iter > 0:
                return
            model = runner.model.module if is_model_wrapper(runner.model) else runner.model
            there = {name: value.cpu() for name, value in model.backbone.state_dict().items()}
            equal = sum(torch.equal(value, weights[name]) for name, value in there.items())
            runner.logger.info(f"{equal} of {len(there)} backbone tensors are those of PRETRAINED")
            if equal < len(there):
                raise UsageError(f"{len(there) - equal} backbone tensors are not PRETRAINED's; nothing was trained")

    class WriteResults(Hook):
        """`results.json`, after every evaluation."""

        def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
            if runner.rank == 0 and metrics:
                runs.write_results(Path(runner.work_dir) / "results.json", runner.iter, metrics, provenance)

    return [BackboneIsPretrained(), WriteResults()]


if __name__ == "__main__":
    main()
