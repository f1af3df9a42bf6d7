"""Fine-tune a pre-trained ResNet with detectron2, or evaluate a detector; flags come before the KEY VALUE pairs."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transfer.detection import d2_custom_dataset
from transfer.frameworks import data_root
from utils import distributed
from utils.config import at_least, make_parser
from utils.errors import UsageError


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse detectron2's flags and --auto-scale; `opts` is the rest of the line, alternating keys and values."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="a file of transfer/detection/configs")
    add("--resume", action="store_true", help="resume from the last checkpoint in OUTPUT_DIR, if any")
    add("--eval-only", action="store_true", help="evaluate the detector in MODEL.WEIGHTS")
    add("--num-gpus", type=at_least(0), default=1, help="GPUs per machine; 0 trains on the CPU")
    add("--num-machines", type=at_least(1), default=1, help="total number of machines")
    add("--machine-rank", type=at_least(0), default=0, help="rank of this machine, from 0")
    add("--dist-url", default="auto", help="tcp://FIRST_MACHINE:PORT for several machines")
    add("--max-val-images", type=at_least(1), metavar="N", help="evaluate only the first N images (default: all)")
    add(
        "--auto-scale",
        action="store_true",
        help="scale the configs' batch and learning rate from 8 GPUs to those in use, and the schedule inversely",
    )
    d2_custom_dataset.add_arguments(parser)
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of the config")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a usage error prints one line and exits with status 2."""
    args = parse_args(argv)
    os.environ.setdefault("DETECTRON2_DATASETS", str(data_root("detection")))
    try:
        import_trainer().run(args)
    except UsageError as error:
        distributed.exit_with_error(str(error))
    except KeyboardInterrupt:
        distributed.exit_with_error("interrupted; --resume continues from the last checkpoint", status=130)


def import_trainer() -> ModuleType:
    """Import detectron2, which reads DETECTRON2_DATASETS on import, and the module that uses it.

    Raises:
        UsageError: detectron2 or a package that it needs is missing.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about torch.jit.script, which detectron2 calls
            from transfer.detection import d2_trainer
    except ImportError as error:
        raise UsageError(
            f"detectron2 cannot be imported ({str(error).splitlines()[0]}); pip install -r "
            "transfer/requirements-detection.txt, then git clone https://github.com/facebookresearch/detectron2 and "
            "add its folder to PYTHONPATH (or compile it for speed: pip install --no-build-isolation -e detectron2)"
        ) from None
    return d2_trainer


if __name__ == "__main__":
    main()
