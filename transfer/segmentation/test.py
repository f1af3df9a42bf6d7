"""Evaluate a fine-tuned model with mmsegmentation: `mim_dist_test.sh CONFIG CHECKPOINT GPUS` calls this."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transfer.segmentation import runs
from utils import distributed
from utils.errors import UsageError


def main(argv: Sequence[str] | None = None) -> None:
    """The command: mistakes of the user end in one line and exit status 2."""
    try:
        runs.import_mmseg()
        said = "what the fine-tuning wrote, such as iter_30000.pth"
        evaluate(runs.make_parser("Evaluate a fine-tuned model.", "CHECKPOINT", said).parse_args(argv))
    except UsageError as error:
        distributed.exit_with(str(error))


def evaluate(args: argparse.Namespace) -> None:
    """The config's metrics of a checkpoint, printed and in `results.json`.

    Raises:
        UsageError: the checkpoint is not there, or not of the config's model.
    """
    from mmengine.runner import Runner
    from mmengine.runner.checkpoint import load_checkpoint

    if not args.checkpoint.is_file():
        raise UsageError(f"CHECKPOINT {args.checkpoint}: no such file")
    config = runs.load_config(args)
    runner = Runner.from_cfg(config)
    try:
        state = load_checkpoint(runner.model, str(args.checkpoint), map_location="cpu", strict=True)
    except Exception as error:  # a damaged file raises whatever its reader stumbles over
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"CHECKPOINT {args.checkpoint}: not a model of {args.config} ({reason})") from None
    metrics = runner.test()
    if runner.rank == 0:
        runs.write_results(runner.work_dir, state.get("meta", {}).get("iter", 0), metrics, {})


if __name__ == "__main__":
    main()
