"""Fine-tune a pre-trained ResNet with detectron2, or evaluate a detector; flags come before the KEY VALUE pairs."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils import config, distributed
from utils.errors import UsageError


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """detectron2's own flags, and --auto-scale; `opts` takes over the rest of the line, KEY VALUE by KEY VALUE."""
    parser = config.make_parser(__doc__)
    whole, count = config.at_least(0), config.at_least(1)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="one of transfer/detection/configs")
    parser.add_argument("--resume", action="store_true", help="go on from OUTPUT_DIR's last checkpoint, if there")
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS, a whole detector")
    parser.add_argument("--num-gpus", type=whole, default=1, help="GPUs on each machine; 0 trains on the CPU")
    parser.add_argument("--num-machines", type=count, default=1, help="machines in all")
    parser.add_argument("--machine-rank", type=whole, default=0, help="number of this machine, from 0")
    parser.add_argument("--dist-url", default="auto", help="tcp://FIRST_MACHINE:PORT, where there are several machines")
    parser.add_argument(
        "--auto-scale",
        action="store_true",
        help="the configs are for 8 GPUs: scale batch and learning rate to those in use, and the schedule inversely",
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="changes to the config")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """The command: mistakes of the user end in one line and exit status 2."""
    args = parse_args(argv)
    os.environ.setdefault("DETECTRON2_DATASETS", str(ROOT / "transfer" / "detection" / "datasets"))
    try:
        load_finetune().run(args)
    except UsageError as error:
        distributed.exit_with_error(str(error))
    except KeyboardInterrupt:
        distributed.exit_with_error("stopped; --resume goes on from the last checkpoint", status=130)


def load_finetune() -> ModuleType:
    """The module that needs detectron2, which reads DETECTRON2_DATASETS as it is imported.

    Raises:
        UsageError: detectron2 or a package that it needs is missing.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch.jit.script, which detectron2 calls
            from transfer.detection import finetune
    except ImportError as error:
        raise UsageError(
            f"detectron2 cannot be imported ({str(error).splitlines()[0]}); pip install -r "
            "transfer/requirements-detection.txt, then git clone https://github.com/facebookresearch/detectron2 and "
            "put its folder on PYTHONPATH (or compile it, for speed: pip install --no-build-isolation -e detectron2)"
        ) from None
    return finetune


if __name__ == "__main__":
    main()
