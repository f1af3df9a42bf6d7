"""Show what the prototypes of a trained model represent: figures, an HTML page, exported masks."""

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Before torch is imported: OpenMP threads that wait by spinning slow down every other process on their cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from matplotlib.figure import Figure

from data.datasets import FOLDERS, MultiViewDataset, build_dataset, evenly_spaced
from models.backbones import ARCHITECTURES
from transfer.encoders import infer_arch
from transfer.figures.export import SlotExport
from transfer.figures.extractor import CenterCrops, FeatureExtractor
from transfer.figures.layout import IMAGE_SUFFIXES, save_figure, shorten
from transfer.figures.maps import draw_maps
from transfer.figures.neighbors import draw_neighbors
from transfer.figures.page import build_page
from transfer.figures.prototype_stats import PrototypeStats
from transfer.figures.tsne import draw_tsne
from transfer.figures.usage import draw_usage
from transfer.slot_model import SlotModel, extract_slot_model
from utils import checkpoint, distributed
from utils.config import at_least, between, make_parser
from utils.device import choose_device, loader_workers
from utils.errors import UsageError
from utils.files import check_writable, write_output

FIGURES = ("neighbors", "maps", "tsne", "usage")
_MAX_TOPK = 100
_TSNE_IMAGES = 400


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
        help="checkpoint of this project, or a released one of SlotCon or SlotFA",
    )
    group.add_argument("--encoder", choices=("teacher", "student"), help="weights to use (default: teacher)")
    group.add_argument("--arch", choices=ARCHITECTURES, metavar="ARCH", help="encoder architecture, such as resnet50")
    group.add_argument("--dim-hidden", type=at_least(1), help="width of the projector's hidden layers")
    group.add_argument("--dim-out", type=at_least(1), help="width D of projections and prototypes")
    group.add_argument("--num-prototypes", type=at_least(1), help="number K of prototypes")
    group.add_argument(
        "--output-stride", type=int, choices=(32, 16, 8), default=32, help="stride of the feature map, by dilation"
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
        choices=FIGURES,
        help="figure to draw (default: neighbors; none if only --html or --export is given)",
    )
    group.add_argument("--save-path", type=Path, help="file or folder of the figure (default: next to the checkpoint)")
    group.add_argument("--html", type=Path, metavar="FILE", help="write a page with all prototypes")
    group.add_argument("--export", type=Path, metavar="DIR", help="write masks, scores and prototypes as files")
    group.add_argument("--topk", type=at_least(1), default=5, help="nearest images per prototype")
    group.add_argument(
        "--sampling", type=at_least(1), default=20, help="number of prototypes (neighbors) or images (maps) to sample"
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
    group.add_argument("--seed", type=at_least(0), default=0, help="seed of sampling and t-SNE")
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
    resolve_outputs(args)
    args.amp = "off"
    device = choose_device(args)
    model = load_model(args, state).to(device)
    del state
    image_size = args.image_size or 2 * int(number_or_default(train_args.get("image_size"), 224, minimum=16))
    crops = CenterCrops(find_images(args, train_args), image_size)
    extractor = FeatureExtractor(model, crops, device, args.batch_size, loader_workers(args.num_workers))
    indices = evenly_spaced(len(crops), args.max_images)

    if args.figure in ("maps", "tsne"):
        save_figure("--save-path", args.save_path, draw_images(args, extractor, indices))
    if args.html or args.export or args.figure in ("neighbors", "usage"):
        stats = compute_stats_and_export(args, extractor, model, indices)
        if args.figure in ("neighbors", "usage"):
            save_figure("--save-path", args.save_path, draw_stats(args, extractor, stats))
        if args.html:
            details = describe(args, extractor, stats.num_images)
            page = build_page(extractor, stats, args.alpha, details)
            write_output("--html", args.html, lambda file: file.write(page))
    for name, path in (("figure", args.save_path), ("page", args.html), ("export", args.export)):
        if path:
            print(f"{name}: {path}")


def resolve_outputs(args: argparse.Namespace) -> None:
    """Set the default figure and its path, and check before any work that all outputs can be made.

    Raises:
        UsageError: flags contradict each other, or an output cannot be written or exists.
    """
    if args.figure is None and (args.save_path or not (args.html or args.export)):
        args.figure = "neighbors"
    if args.topk > _MAX_TOPK:
        raise UsageError(f"--topk {args.topk}: use at most {_MAX_TOPK}")
    if args.idxs and args.figure not in ("neighbors", "maps"):
        raise UsageError("--idxs: only applies to --figure neighbors and --figure maps")
    if args.figure:
        name = f"slots_{args.figure}.png"
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


def load_model(args: argparse.Namespace, state: Mapping[str, Any]) -> SlotModel:
    """Return the slot model in the loaded --model-path, and verify the sizes and prototypes that the flags name.

    Raises:
        UsageError: the file has no slots, or other sizes.
    """
    model = extract_slot_model(state, args.model_path, args.encoder, args.output_stride, "--model-path")
    count, width = model.prototypes.shape
    actual = {
        "arch": infer_arch(model.encoder.state_dict(), str(args.model_path)),
        "dim_hidden": model.projector.state_dict()["mlp.0.bias"].numel(),
        "dim_out": width,
        "num_prototypes": count,
    }
    for name, value in actual.items():
        if getattr(args, name) not in (None, value):
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} {getattr(args, name)}: {args.model_path} has {value}; omit {flag} to use that")
    if args.idxs and max(args.idxs) >= count:
        raise UsageError(f"--idxs {max(args.idxs)}: {args.model_path} has prototypes 0 to {count - 1}")
    temperature = checkpoint.checkpoint_args(state).get("teacher_temp")
    model.grouping.temperature = number_or_default(temperature, model.grouping.temperature)
    return model


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


def sample_sorted(candidates: Sequence[int], count: int, seed: int) -> list[int]:
    """Return at most `count` of the candidates, sampled without replacement, in the order of `candidates`."""
    chosen = np.random.default_rng(seed).permutation(len(candidates))[:count]
    return [candidates[position] for position in sorted(chosen.tolist())]


def compute_stats_and_export(
    args: argparse.Namespace, extractor: FeatureExtractor, model: SlotModel, indices: Sequence[int]
) -> PrototypeStats:
    """Apply the model to all images, collect the statistics of the prototypes, and write the export."""
    stats = PrototypeStats(model.prototypes, model.grouping.temperature, args.topk)
    export = SlotExport(args.export, extractor.crops, len(model.prototypes)) if args.export else None
    for batch in extractor.extract(indices, "extracting"):
        stats.update(batch)
        if export:
            export.write_batch(batch)
    if export:
        metadata = {"model": args.model_path.name, "encoder": model.which, "dataset": args.dataset}
        metadata |= {"image_size": extractor.crops.size, "output_stride": args.output_stride}
        export.write_summary(stats, metadata | {"temperature": stats.temperature})
    return stats


def draw_images(args: argparse.Namespace, extractor: FeatureExtractor, indices: Sequence[int]) -> Figure:
    """Draw one of the figures of sampled images, maps and tsne."""
    sampled = sample_sorted(indices, args.sampling if args.figure == "maps" else _TSNE_IMAGES, args.seed)
    details = describe(args, extractor, len(sampled))
    if args.figure == "maps":
        return draw_maps(extractor, sampled, args.dpi, details, args.idxs)
    return draw_tsne(extractor, sampled, args.points, args.seed, args.dpi, details)


def draw_stats(args: argparse.Namespace, extractor: FeatureExtractor, stats: PrototypeStats) -> Figure:
    """Draw one of the figures of all images, neighbors and usage."""
    details = describe(args, extractor, stats.num_images)
    if args.figure == "usage":
        return draw_usage(stats, args.dpi, details)
    prototypes = list(dict.fromkeys(args.idxs or sample_sorted(stats.used, args.sampling, args.seed)))
    details = f"{details} · {len(stats.used)} of {len(stats.prototypes)} prototypes used"
    return draw_neighbors(extractor, stats, prototypes, args.alpha, args.dpi, details)


def describe(args: argparse.Namespace, extractor: FeatureExtractor, num_images: int) -> str:
    """Return model, number of images, dataset and image size in one line."""
    path = args.model_path.absolute()
    student = " (student)" if extractor.model.which == "student" else ""
    model = shorten(f"{path.parent.name}/{path.name}", 44) + student
    images = f"{num_images:,} {'image' if num_images == 1 else 'images'}"
    return f"{model} · {images} of {args.dataset}, {extractor.crops.size} px"


if __name__ == "__main__":
    main()
