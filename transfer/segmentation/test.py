"""Evaluate a fine-tuned model with mmsegmentation: `mim_dist_test.sh CONFIG CHECKPOINT GPUS` calls this."""

import argparse
import pickle
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transfer.encoders import first_mismatch
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
    if first := first_mismatch(state["state_dict"], expected):
        raise UsageError(f"CHECKPOINT {args.checkpoint}: not a model of {args.config} ({first})")
    runs.launch(args)
    runner = Runner.from_cfg(config)
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    model.load_state_dict(state["state_dict"])
    metrics = runner.test()
    if runner.rank == 0:
        runs.write_results(Path(runner.work_dir) / "test.json", state["meta"]["iter"], metrics, {})


class _Inert:
    """Stands in a checkpoint for what is neither tensor nor container, so that none of its code runs."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __call__(self, *_: Any, **__: Any) -> "_Inert":
        return self

    def __setstate__(self, _: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Rebuilds tensors and containers alone."""

    # Exact objects: looking a name up, as `Unpickler.find_class` does, follows its dots to any builtin.
    _ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    }

    def find_class(self, module: str, name: str) -> Any:
        return self._ALLOWED.get((module, name), _Inert)


def read_fine_tuned(path: Path) -> dict[str, Any]:
    """`state_dict` and `meta` of a checkpoint that mmengine wrote; its pickled loss histories are left out unread.

    Raises:
        UsageError: it is missing, damaged, or not mmengine's.
    """
    if not path.is_file():
        raise UsageError(f"CHECKPOINT {path}: no such file")
    reader = SimpleNamespace(Unpickler=_Unpickler, load=lambda file, **_: _Unpickler(file).load(), __name__="inert")
    try:
        state = torch.load(path, map_location="cpu", weights_only=False, pickle_module=reader)
    except Exception:  # a damaged archive raises whatever its reader stumbles over
        raise UsageError(f"CHECKPOINT {path}: truncated or no checkpoint; use another") from None
    if not isinstance(state, dict) or not {"state_dict", "meta"} <= state.keys():
        raise UsageError(f"CHECKPOINT {path}: not a checkpoint of a fine-tuning, such as iter_30000.pth")
    return state


if __name__ == "__main__":
    main()
