"""Evaluate a fine-tuned model with mmsegmentation: `mim_dist_test.sh CONFIG CHECKPOINT GPUS` calls this."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transfer.segmentation import runs
from utils import checkpoint, distributed
from utils.errors import UsageError


def main(argv: Sequence[str] | None = None) -> None:
    """The command: mistakes of the user end in one line and exit status 2."""
    try:
        runs.import_mmseg()
        said = "what the fine-tuning wrote, such as iter_30000.pth"
        evaluate(runs.make_parser("Evaluate a fine-tuned model.", "CHECKPOINT", said).parse_args(argv))
    except UsageError as error:
        distributed.exit_with_error(str(error))
    except KeyboardInterrupt:
        distributed.exit_with_error("stopped", status=130)


def evaluate(args: argparse.Namespace) -> None:
    """The config's metrics of a checkpoint, printed and in `test.json`; `results.json` is the training's.

    Raises:
        UsageError: the checkpoint is not there, or not of the config's model.
    """
    from mmengine.model import is_model_wrapper
    from mmengine.runner import Runner
    from mmseg.registry import MODELS

    config = runs.load_config(args)
    state = read_fine_tuned(args.checkpoint)
    with torch.device("meta"):
        expected = MODELS.build(config.model).state_dict()
    if first := checkpoint.first_mismatch(state["state_dict"], expected):
        raise UsageError(f"CHECKPOINT {args.checkpoint}: not a model of {args.config} ({first})")
    runs.launch(args)
    runner = Runner.from_cfg(config)
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    model.load_state_dict(state["state_dict"])
    metrics = runner.test()
    if runner.rank == 0:
        runs.write_results(Path(runner.work_dir) / "test.json", state["meta"]["iter"], metrics, {})


def read_fine_tuned(path: Path) -> dict[str, Any]:
    """Return a checkpoint that mmengine wrote during fine-tuning: `state_dict`, by the model's names, and `meta`.

    Raises:
        UsageError: it is missing, damaged, holds code (none of which runs), or is not mmengine's.
    """
    state = checkpoint.load(path, "CHECKPOINT")
    meta = state.get("meta")
    if "state_dict" not in state or not isinstance(meta, Mapping) or not isinstance(meta.get("iter"), int):
        raise UsageError(f"CHECKPOINT {path}: not a checkpoint of a fine-tuning, such as iter_30000.pth")
    return {"state_dict": checkpoint.extract_weights(state, f"CHECKPOINT {path}"), "meta": meta}


if __name__ == "__main__":
    main()
