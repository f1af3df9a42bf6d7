"""Convert the encoder of any checkpoint for another framework: `python transfer/convert.py IN OUT --to FORMAT`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transfer.encoders import EncoderWeights, read_encoder
from transfer.formats import FORMATS, write_converted
from transfer.verify import load_image, verify
from utils import distributed
from utils.config import make_parser
from utils.errors import UsageError
from utils.files import check_writable

_BY_SUFFIX = {".pkl": "detectron2", ".safetensors": "safetensors"}


def main(argv: Sequence[str] | None = None, target: str | None = None) -> None:
    """Run the command; `target` is the framework of an entry point for one framework, which has no `--to`."""
    args = _parse_args(argv, target)
    try:
        convert(args)
    except UsageError as error:
        distributed.exit_with_error(str(error))


def _parse_args(argv: Sequence[str] | None, target: str | None) -> argparse.Namespace:
    parser = make_parser("Convert the encoder of a checkpoint for another framework.")
    parser.add_argument("input", metavar="IN", type=Path, help="any checkpoint: of this project, released, torchvision")
    parser.add_argument("output", metavar="OUT", type=Path, help="the file to write")
    if target is None:
        parser.add_argument(
            "--to",
            choices=tuple(FORMATS),
            help="target format (default: by the suffix of OUT: detectron2 for .pkl, safetensors for .safetensors, "
            "otherwise torchvision)",
        )
    parser.add_argument(
        "--encoder",
        choices=("teacher", "student"),
        help="which encoder to use (default: the teacher, if there are two)",
    )
    parser.add_argument(
        "--verify",
        metavar="IMAGE",
        nargs="?",
        const="",
        help="compare the features of IN and OUT on IMAGE (default: a rendered scene); an existing OUT is only "
        "compared, unless --overwrite is given",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    args = parser.parse_args(argv)
    args.to = target or args.to or _BY_SUFFIX.get(args.output.suffix, "torchvision")
    return args


def convert(args: argparse.Namespace) -> None:
    """Write OUT, and compare it with IN on request; a new OUT that fails the comparison is removed.

    Raises:
        UsageError: IN has no complete encoder, OUT cannot be written or exists already, or they differ.
    """
    image = None if args.verify is None else load_image(Path(args.verify) if args.verify else None)
    writes = image is None or args.overwrite or not os.path.isfile(args.output)
    if writes:
        encoder = read_encoder(args.input, args.encoder)
        _check_output(args, encoder)
        write_converted(args.output, encoder, args.to)
    if image is not None:
        try:
            comparison = verify(args.input, args.output, args.encoder, image, args.to)
        except BaseException:
            if writes:
                args.output.unlink()
            raise
    if writes:
        print(f"{args.output}: {_describe(encoder)}, for {args.to}")
    if image is not None:
        print(f"verified: {comparison}")


def _check_output(args: argparse.Namespace, encoder: EncoderWeights) -> None:
    suffix = {name: suffix for suffix, name in _BY_SUFFIX.items()}.get(args.to)
    if suffix and args.output.suffix != suffix:
        name = f"{args.output.stem}{suffix}"
        raise UsageError(f"OUT {args.output}: {args.to} recognizes its files by their suffix; name it {name}")
    if not suffix and args.output.suffix in _BY_SUFFIX:
        raise UsageError(f"OUT {args.output}: not the suffix of a {args.to} file; name it {args.output.stem}.pth")
    check_writable("OUT", args.output, args.overwrite)
    if args.output.exists() and args.output.samefile(args.input):
        raise UsageError(f"OUT {args.output}: is IN itself, which holds more than the encoder; use another name")
    if target := encoder.provenance.get("format"):
        source = encoder.provenance["source"]
        raise UsageError(f"IN {args.input}: already converted to {target} from {source}; give that file")


def _describe(encoder: EncoderWeights) -> str:
    provenance = encoder.provenance
    which = {"teacher": "teacher's ", "student": "student's "}.get(provenance["encoder"], "")
    method = f" of {provenance['method']}" if "method" in provenance else ""
    epoch = f" after epoch {provenance['epoch']}" if "epoch" in provenance else ""
    return f"{len(encoder.weights)} tensors of the {which}{encoder.arch}{method}{epoch}"


if __name__ == "__main__":
    main()
