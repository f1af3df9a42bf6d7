"""Convert the encoder of any checkpoint for another framework: `python transfer/convert.py IN OUT --to FORMAT`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transfer.encoders import EncoderWeights, read_encoder
from transfer.formats import FORMATS, write
from transfer.verify import load_image, verify
from utils import config, distributed
from utils.errors import UsageError

_BY_SUFFIX = {".pkl": "detectron2", ".safetensors": "safetensors"}


def main(argv: Sequence[str] | None = None, target: str | None = None) -> None:
    """The command; with `target`, an entry for one framework alone, which has no `--to`."""
    args = _parse_args(argv, target)
    try:
        convert(args)
    except UsageError as error:
        distributed.exit_with_error(str(error))


def _parse_args(argv: Sequence[str] | None, target: str | None) -> argparse.Namespace:
    parser = config.make_parser("Convert the encoder of a checkpoint for another framework.")
    parser.add_argument("input", metavar="IN", type=Path, help="any checkpoint: of this project, released, torchvision")
    parser.add_argument("output", metavar="OUT", type=Path, help="the file to write")
    if target is None:
        said = "framework (by OUT's suffix if not said: .pkl detectron2, .safetensors, else torchvision)"
        parser.add_argument("--to", choices=tuple(FORMATS), help=said)
    said = "which of two encoders (the teacher if not said, where there are two)"
    parser.add_argument("--encoder", choices=("teacher", "student"), help=said)
    said = "compare the features of IN and OUT on IMAGE (a drawn scene if not said); an OUT that exists stays as it is"
    parser.add_argument("--verify", metavar="IMAGE", nargs="?", const="", help=said)
    parser.add_argument("--overwrite", action="store_true", help="replace an OUT that exists")
    args = parser.parse_args(argv)
    args.to = target or args.to or _BY_SUFFIX.get(args.output.suffix, "torchvision")
    return args


def convert(args: argparse.Namespace) -> None:
    """Write OUT, and compare it with IN if asked to.

    Raises:
        UsageError: IN has no whole encoder, OUT cannot be written or is there already, or they differ.
    """
    image = None if args.verify is None else load_image(Path(args.verify) if args.verify else None)
    if args.overwrite or not _exists(args.output):
        encoder = read_encoder(args.input, args.encoder)
        _check_output(args, encoder)
        write(args.output, encoder, args.to)
        print(f"{args.output}: {_describe(encoder)}, for {args.to}")
    elif args.verify is None:
        raise UsageError(f"{args.output}: exists; --overwrite replaces it, --verify compares it with {args.input}")
    if image is not None:
        print(f"verified: {verify(args.input, args.output, args.encoder, image, args.to)}")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from None


def _check_output(args: argparse.Namespace, encoder: EncoderWeights) -> None:
    suffix = {name: suffix for suffix, name in _BY_SUFFIX.items()}.get(args.to)
    if suffix and args.output.suffix != suffix:
        raise UsageError(f"{args.output}: {args.to} knows its files by their name; call it {args.output.stem}{suffix}")
    if not suffix and args.output.suffix in _BY_SUFFIX:
        raise UsageError(f"{args.output}: a {args.to} file of another's name; call it {args.output.stem}.pth")
    if args.output.exists() and args.output.samefile(args.input):
        raise UsageError(f"{args.output}: is IN itself; its training would be lost, give another name")
    if not args.output.parent.is_dir():
        raise UsageError(f"{args.output}: its folder {args.output.parent} does not exist; make it first")
    if converted := encoder.provenance.get("format"):
        source = encoder.provenance["source"]
        raise UsageError(f"{args.input}: already converted to {converted}, from {source}; give that file")


def _describe(encoder: EncoderWeights) -> str:
    facts = encoder.provenance
    which = {"teacher": "teacher's ", "student": "student's "}.get(facts["encoder"], "")
    method = f" of {facts['method']}" if "method" in facts else ""
    epoch = f" after epoch {facts['epoch']}" if "epoch" in facts else ""
    return f"{len(encoder.weights)} tensors of the {which}{encoder.arch}{method}{epoch}"


if __name__ == "__main__":
    main()
