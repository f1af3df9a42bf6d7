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

_BY_SUFFIX = {".pth": "torchvision", ".pt": "torchvision", ".pkl": "detectron2", ".safetensors": "safetensors"}


def main(argv: Sequence[str] | None = None, target: str | None = None) -> None:
    """Run the command; `target` is the framework of an entry point for one framework, which has no `--to`."""
    args = _parse_args(argv, target)
    try:
        convert(args)
    except UsageError as error:
        distributed.exit_with_error(str(error))


def _parse_args(argv: Sequence[str] | None, target: str | None) -> argparse.Namespace:
    parser = make_parser("Convert the encoder of a checkpoint for another framework.")
    parser.add_argument(
        "input",
        metavar="IN",
        type=Path,
        help="any checkpoint: of this project, released, of torchvision, timm or detectron2, or a converted file",
    )
    parser.add_argument("output", metavar="OUT", type=Path, help="the file to write")
    if target is None:
        parser.add_argument(
            "--to",
            choices=tuple(FORMATS),
            help="target format (default: by the suffix of OUT: detectron2 for .pkl, safetensors for .safetensors, "
            "torchvision for .pth and .pt)",
        )
    else:
        parser.set_defaults(to=target)
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
    return parser.parse_args(argv)


def convert(args: argparse.Namespace) -> None:
    """Write OUT, and compare it with IN on request; a new OUT that fails the comparison is removed.

    Raises:
        UsageError: IN has no complete encoder, OUT cannot be written or exists already, or they differ.
    """
    target = _choose_format(args)
    image = None if args.verify is None else load_image(Path(args.verify) if args.verify else None)
    writes = image is None or args.overwrite or not os.path.isfile(args.output)
    if writes:
        encoder = read_encoder(args.input, args.encoder, "IN")
        _check_output(args)
        count = write_converted(args.output, encoder, target)
    if image is not None:
        try:
            comparison = verify(args.input, args.output, args.encoder, image, target, flags=("IN", "OUT"))
        except BaseException:
            if writes:
                args.output.unlink()
            raise
    if writes:
        print(f"{args.output}: {count} tensors of the {_describe(encoder)}, for {target}")
    if image is not None:
        print(f"verified: {comparison}")


def _choose_format(args: argparse.Namespace) -> str:
    """Return the target format: that of `--to` or of the entry point, else the one that the suffix of OUT says.

    Raises:
        UsageError: the suffix of OUT is not one of the format, or of no format, or OUT is a folder.
    """
    suffix = args.output.suffix
    if args.output.is_dir():
        raise UsageError(f"OUT {args.output}: is a folder; name a file")
    if args.to and suffix not in FORMATS[args.to].suffixes:
        name = f"{args.output.stem}{FORMATS[args.to].suffixes[0]}"
        raise UsageError(f"OUT {args.output}: not the suffix of a {args.to} file; name it {name}")
    if not args.to and suffix not in _BY_SUFFIX:
        raise UsageError(f"OUT {args.output}: unknown suffix; use one of {' '.join(_BY_SUFFIX)}")
    return args.to or _BY_SUFFIX[suffix]


def _check_output(args: argparse.Namespace) -> None:
    check_writable("OUT", args.output, args.overwrite)
    if args.output.exists() and args.output.samefile(args.input):
        raise UsageError(f"OUT {args.output}: is IN itself; use another name")


def _describe(encoder: EncoderWeights) -> str:
    provenance = encoder.provenance
    which = {"teacher": "teacher's ", "student": "student's "}.get(provenance["encoder"], "")
    method = f" of {provenance['method']}" if "method" in provenance else ""
    epoch = f" after epoch {provenance['epoch']}" if "epoch" in provenance else ""
    return f"{which}{encoder.arch}{method}{epoch}"


if __name__ == "__main__":
    main()
