"""Evaluate a fine-tuned model with mmsegmentation; `mim_dist_test.sh CONFIG CHECKPOINT GPUS` runs this."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transfer.results import write_json
from transfer.segmentation import mm_config
from transfer.segmentation.folder_config import uses_folder
from transfer.segmentation.folder_files import find_split
from transfer.segmentation.mm_weights import check_model, read_fine_tuned
from utils import distributed
from utils.errors import UsageError


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a usage error prints one line and exits with status 2."""
    try:
        mm_config.import_and_register_mmseg()
        parser = mm_config.make_mmseg_parser(
            "Evaluate a fine-tuned model.", "CHECKPOINT", "a checkpoint of a fine-tuning, such as iter_30000.pth"
        )
        evaluate(parser.parse_args(argv))
    except UsageError as error:
        distributed.exit_with_error(str(error))
    except KeyboardInterrupt:
        distributed.exit_with_error("interrupted", status=130)


def evaluate(args: argparse.Namespace) -> None:
    """Evaluate a checkpoint with the config's metrics, and write them to `test.json` in the work folder.

    The log and the config of the evaluation are written to `test/` in the work folder, because mmengine would
    overwrite the config of the training.

    Raises:
        UsageError: the checkpoint is missing, or not of the config's model, or the images to evaluate are missing.
    """
    from mmengine.model import is_model_wrapper
    from mmengine.runner import Runner

    cfg = mm_config.load_config(args, ["test_dataloader"])
    if uses_folder(cfg):
        find_split(cfg.test_dataloader.dataset)
    cfg.model.backbone.pop("init_cfg", None)  # a training's config names its PRETRAINED, which is not used here
    cfg.resume = False  # a resumed training's config has True
    state = read_fine_tuned(args.checkpoint, "CHECKPOINT")
    check_model(state["state_dict"], cfg, f"CHECKPOINT {args.checkpoint}")
    mm_config.launch_distributed(args)
    work_dir = Path(cfg.work_dir)
    cfg.work_dir = str(work_dir / "test")
    runner = Runner.from_cfg(cfg)
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    model.load_state_dict(state["state_dict"])
    metrics = runner.test()
    if runner.rank == 0:
        results = {"step": state["meta"]["iter"], "metrics": metrics}
        write_json(work_dir / "test.json", results)


if __name__ == "__main__":
    main()
