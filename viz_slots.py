"""Show what a trained model represents, its prototypes or its features: figures, an HTML page, exported files."""

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# Before torch is imported: OpenMP threads that wait by spinning slow down every other process on their cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from data.datasets import FOLDERS, MultiViewDataset, build_dataset, evenly_spaced
from models.backbones import is_vit
from transfer.encoders import build_frozen_encoder, extract_encoder, infer_arch
from transfer.figures.extractor import CenterCrops, FeatureExtractor, SlotExtractor
from transfer.figures.feature_outputs import draw_features, write_features
from transfer.figures.layout import IMAGE_SUFFIXES, save_figure
from transfer.figures.loaded_model import ENCODER_FIGURES, SLOT_FIGURES, LoadedModel
from transfer.figures.slot_outputs import write_slots
from transfer.figures.vit_attention import encode
from transfer.slot_model import SlotModel, extract_slot_model, has_prototypes
from utils import checkpoint, distributed
from utils.config import at_least, between, make_parser
from utils.device import choose_device, loader_workers
from utils.errors import UsageError
from utils.files import check_writable

_MAX_TOPK = 100


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the arguments; every flag may also be written with underscores."""
    parser = make_parser(__doc__)
    add_model_arguments(parser.add_argument_group("model; sizes are read from the checkpoint, flags only verify them"))
    add_image_arguments(parser.add_argument_group("images; by default those that the model was trained on"))
    add_output_arguments(parser.add_argument_group("output"))
    return parser.parse_args(_replace_underscores(sys.argv[1:] if argv is None else argv))


def add_model_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags of the model."""
    group.add_argument(
        "--model-path",
        type=Path,
        required=True,
        metavar="CKPT",
        help="checkpoint of this project, a released one, or that of an encoder",
    )
    group.add_argument("--encoder", choices=("teacher", "student"), help="weights to use (default: teacher)")
    group.add_argument("--arch", help="encoder architecture, such as resnet50")
    group.add_argument("--dim-hidden", type=at_least(1), help="width of the projector's hidden layers")
    group.add_argument("--dim-out", type=at_least(1), help="width D of projections and prototypes")
    group.add_argument("--num-prototypes", type=at_least(1), help="number K of prototypes")
    group.add_argument(
        "--output-stride", type=int, choices=(32, 16, 8), default=32, help="stride of a ResNet's map, by dilation"
    )


def add_image_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags of the images."""
    group.add_argument("--data-dir", help="folder of the dataset; the demo is drawn there")
    group.add_argument("--dataset", choices=tuple(FOLDERS), help="layout of the images in --data-dir")
    group.add_argument(
        "--image-size", type=at_least(32), help="side of the center crop in pixels (default: twice that of training)"
    )
    group.add_argument("--max-images", type=at_least(1), help="use this many images, evenly spaced in the dataset")
    group.add_argument("--batch-size", type=at_least(1), default=16, help="images per batch")
    group.add_argument("--num-workers", type=at_least(0), default=8, help="DataLoader workers")
    group.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: a GPU if there is one")


def add_output_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags of the output."""
    group.add_argument(
        "--figure",
        type=lambda name: name.replace("neighbours", "neighbors"),  # the spelling of earlier versions
        choices=SLOT_FIGURES + ENCODER_FIGURES,
        help="figure to draw (default: neighbors, or pca without prototypes; none if only --html or --export is given)",
    )
    group.add_argument("--save-path", type=Path, help="file or folder of the figure (default: next to the checkpoint)")
    group.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page with all prototypes, or images without them"
    )
    group.add_argument("--export", type=Path, metavar="DIR", help="write masks and prototypes, or features, as files")
    group.add_argument("--topk", type=at_least(1), default=5, help="nearest images per prototype or patch")
    group.add_argument(
        "--sampling",
        type=at_least(1),
        help="number of prototypes (neighbors) or images to sample (default: 20; 200 for pages and exports of images)",
    )
    group.add_argument(
        "--idxs", type=at_least(0), nargs="+", help="numbers of the prototypes to show instead of sampled ones"
    )
    group.add_argument(
        "--alpha",
        type=between(0, 1),
        default=0.5,
        help="how much to darken an image outside the region, from 0 (not at all) to 1 (black)",
    )
    group.add_argument("--points", type=at_least(10), default=4000, help="number of feature-map positions in the t-SNE")
    group.add_argument("--dpi", type=at_least(20), default=150, help="pixels per inch")
    group.add_argument(
        "--seed",
        type=at_least(0),
        default=0,
        help="seed of the sampled prototypes, images and patches, and of the t-SNE",
    )
    group.add_argument("--overwrite", action="store_true", help="replace existing files")


def _replace_underscores(argv: Sequence[str]) -> list[str]:
    """Replace underscores in flags: `--data_dir=some_folder` -> `--data-dir=some_folder`."""
    parts = [word.partition("=") if word.startswith("--") else ("", "", word) for word in argv]
    return ["".join((flag.replace("_", "-"), equals, value)) for flag, equals, value in parts]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; invalid input ends it with one line and exit status 2."""
    args = parse_args(argv)
    try:
        visualize(args)
    except UsageError as error:
        distributed.exit_with_error(str(error))
    except KeyboardInterrupt:
        distributed.exit_with_error("interrupted", status=130)


def visualize(args: argparse.Namespace) -> None:
    """Load the model and the images, then write the figure, the page and the export."""
    state = checkpoint.load(args.model_path, "--model-path")
    train_args = checkpoint.checkpoint_args(state)
    model = load_model(args, state)
    names_figure = args.figure is not None
    resolve_outputs(args, model)
    crops = CenterCrops(find_images(args, train_args), choose_image_size(args, train_args, model))
    indices = evenly_spaced(len(crops), args.max_images)
    verify_number_of_images(args, model, len(indices))
    args.amp = "off"
    device = choose_device(args)
    (model.slots or model.encoder).to(device)
    del state
    options = crops, device, args.batch_size, loader_workers(args.num_workers)
    if args.figure and not model.slots and not names_figure:
        figures = ", ".join(model.figures)
        print(f"{args.model_path} has no prototypes; figures: {figures}; --html shows images, --export writes features")

    features = FeatureExtractor(partial(encode, model.encoder), *options)
    if args.figure in ENCODER_FIGURES:
        save_figure("--save-path", args.save_path, draw_features(args, model, features, indices))
    if model.slots:
        write_slots(args, model, SlotExtractor(model.slots, *options), indices)
    else:
        write_features(args, model, features, indices)
    for name, path in (("figure", args.save_path), ("page", args.html), ("export", args.export)):
        if path:
            print(f"{name}: {path}")


def resolve_outputs(args: argparse.Namespace, model: LoadedModel) -> None:
    """Set the default figure and its path, and check before any work that all outputs can be made.

    Raises:
        UsageError: the model cannot have this figure, flags contradict each other, or an output cannot be written or
            exists.
    """
    if args.figure is None and (args.save_path or not (args.html or args.export)):
        args.figure = model.figures[0]
    if args.figure and args.figure not in model.figures:
        lacks = "prototypes" if args.figure in SLOT_FIGURES else f"class token, it is a {model.arch}"
        raise UsageError(f"--figure {args.figure}: {args.model_path} has no {lacks}; use {' or '.join(model.figures)}")
    if args.topk > _MAX_TOPK:
        raise UsageError(f"--topk {args.topk}: use at most {_MAX_TOPK}")
    if args.idxs and not model.slots:
        raise UsageError(f"--idxs {args.idxs[0]}: {args.model_path} has no prototypes; omit it")
    if args.idxs and args.figure not in ("neighbors", "maps"):
        raise UsageError("--idxs: only applies to --figure neighbors and --figure maps")
    if args.figure:
        name = f"{'slots' if args.figure in SLOT_FIGURES else 'features'}_{args.figure}.png"
        args.save_path = args.save_path or args.model_path.parent / name
        if args.save_path.is_dir():
            args.save_path /= name
        if args.save_path.suffix.lower() not in IMAGE_SUFFIXES:
            raise UsageError(
                f"--save-path {args.save_path}: unknown image format; use one of {' '.join(IMAGE_SUFFIXES)}"
            )
    for flag, path in (("--save-path", args.save_path), ("--html", args.html), ("--export", args.export)):
        if path:
            check_writable(flag, path, args.overwrite, folder=flag == "--export")


def verify_number_of_images(args: argparse.Namespace, model: LoadedModel, count: int) -> None:
    """Verify that there are other images where outputs show the nearest patches in other images.

    Raises:
        UsageError: there is only one image.
    """
    flag = "--figure patches" if args.figure == "patches" else "--html" if args.html and not model.slots else None
    if flag and count == 1:
        raise UsageError(f"{flag}: there is only one image; use a larger --max-images or --data-dir")


def load_model(args: argparse.Namespace, state: Mapping[str, Any]) -> LoadedModel:
    """Return the model in the loaded --model-path, and verify the sizes that the flags name.

    Raises:
        UsageError: the file has no encoder, or other sizes.
    """
    flag = "--model-path"
    if has_prototypes(checkpoint.extract_weights(state, f"{flag} {args.model_path}")):
        slots = _load_slot_model(args, state)
        arch = infer_arch(slots.encoder.state_dict(), flag)
        return LoadedModel(args.model_path, slots.encoder, arch, slots.which, slots)
    encoder = extract_encoder(state, args.model_path, args.encoder, flag)
    verify_sizes(args, {"arch": encoder.arch})
    which = encoder.provenance["encoder"]
    network = build_frozen_encoder(encoder, args.output_stride)
    return LoadedModel(args.model_path, network, encoder.arch, which, None)


def _load_slot_model(args: argparse.Namespace, state: Mapping[str, Any]) -> SlotModel:
    """Return the slot model in the loaded --model-path, and verify the sizes and prototypes that the flags name.

    Raises:
        UsageError: the file has no slots, or other sizes.
    """
    model = extract_slot_model(state, args.model_path, args.encoder, args.output_stride, "--model-path")
    count, width = model.prototypes.shape
    sizes = {
        "arch": infer_arch(model.encoder.state_dict(), str(args.model_path)),
        "dim_hidden": model.projector.state_dict()["mlp.0.bias"].numel(),
        "dim_out": width,
        "num_prototypes": count,
    }
    verify_sizes(args, sizes)
    if args.idxs and max(args.idxs) >= count:
        raise UsageError(f"--idxs {max(args.idxs)}: {args.model_path} has prototypes 0 to {count - 1}")
    temperature = checkpoint.checkpoint_args(state).get("teacher_temp")
    model.grouping.temperature = number_or_default(temperature, model.grouping.temperature)
    return model


def verify_sizes(args: argparse.Namespace, actual: Mapping[str, Any]) -> None:
    """Verify that the flags name the architecture and the sizes of the model; a model without slots has no sizes.

    Raises:
        UsageError: a flag names another one.
    """
    for name in ("arch", "dim_hidden", "dim_out", "num_prototypes"):
        value, expected = getattr(args, name), actual.get(name)
        if value not in (None, expected):
            flag = f"--{name.replace('_', '-')}"
            has = "no prototypes; omit it" if expected is None else f"{expected}; omit {flag} to use that"
            raise UsageError(f"{flag} {value}: {args.model_path} has {has}")


def choose_image_size(args: argparse.Namespace, train_args: Mapping[str, Any], model: LoadedModel) -> int:
    """Return --image-size, by default twice the size of training, for a ViT the nearest multiple of its patch size.

    Raises:
        UsageError: --image-size is not a multiple of the patch size.
    """
    if args.image_size:
        model.encoder.check_image_size(args.image_size)
        return args.image_size
    size = 2 * int(number_or_default(train_args.get("image_size"), 224, minimum=16))
    if not is_vit(model.arch):
        return size
    patch_size: int = model.encoder.stride
    return patch_size * max(1, round(size / patch_size))


def find_images(args: argparse.Namespace, train_args: Mapping[str, Any]) -> MultiViewDataset:
    """Build the dataset that the flags name, by default the one that the model was trained on.

    Raises:
        UsageError: it does not exist or has no images.
    """
    if args.dataset is None:
        args.dataset = train_args["dataset"] if train_args.get("dataset") in FOLDERS else "COCO"
    data_dir = args.data_dir or train_args.get("data_dir")
    if not data_dir:
        raise UsageError("--data-dir: the checkpoint names no folder of images; set --data-dir and --dataset")
    if args.data_dir is None and not Path(data_dir).is_dir():
        raise UsageError(f"--data-dir: the training images in {data_dir} do not exist; set --data-dir and --dataset")
    seed = train_args.get("seed") or 0
    return build_dataset(argparse.Namespace(dataset=args.dataset, data_dir=data_dir, seed=seed), recipes=())


def number_or_default(value: Any, default: float, minimum: float = 1e-6) -> float:
    """Return an argument of a checkpoint if it is a finite number of at least `minimum`, else `default`."""
    is_number = isinstance(value, int | float) and minimum <= value < math.inf
    return value if is_number else default


if __name__ == "__main__":
    main()
