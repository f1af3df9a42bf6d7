"""Show what the prototypes of a trained model gather: as figures, as a page to look through, as files."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Before torch: CPU threads that wait by spinning lose most of their speed to any other process on their cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from matplotlib.figure import Figure

from data.datasets import FOLDERS, SceneDataset, build_dataset
from models.backbones import ARCHITECTURES
from transfer.encoders import infer_arch
from transfer.trained_slots import TrainedSlots, load_slots
from utils import config, checkpoint, distributed
from utils.device import choose_device, loader_workers
from utils.errors import UsageError
from transfer.figures.export import Export
from transfer.figures.looking import Observer, Squares
from transfer.figures.maps import draw_maps
from transfer.figures.neighbors import draw_neighbors
from transfer.figures.page import build_page
from transfer.figures.sheet import FORMATS, save_figure, shorten, write
from transfer.figures.survey import Survey, draw_sample
from transfer.figures.tsne import draw_tsne
from transfer.figures.usage import draw_usage

FIGURES = ("neighbors", "maps", "tsne", "usage")
_TOPK_LARGEST = 100
_TSNE_IMAGES = 400


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments; every flag may be written with underscores, too."""
    parser = config.make_parser(__doc__)
    add_model(parser.add_argument_group("model; the checkpoint tells its sizes, and what is said is compared"))
    add_images(parser.add_argument_group("images; a checkpoint of this project tells where its own lie"))
    add_output(parser.add_argument_group("what to make"))
    return parser.parse_args(_with_dashes(sys.argv[1:] if argv is None else argv))


def add_model(group: argparse._ArgumentGroup) -> None:
    """Which model."""
    count = config.at_least(1)
    group.add_argument("--model-path", type=Path, required=True, metavar="CKPT", help="checkpoint, ours or released")
    group.add_argument("--encoder", choices=("teacher", "student"), help="which half of it; default the teacher")
    group.add_argument("--arch", choices=ARCHITECTURES, help="encoder")
    group.add_argument("--dim-hidden", type=count, help="width of the projector's hidden layers")
    group.add_argument("--dim-out", type=count, help="width D of projections and prototypes")
    group.add_argument("--num-prototypes", type=count, help="number K of prototypes")
    group.add_argument(
        "--output-stride", type=int, choices=(32, 16, 8), default=32, help="pixels to a cell, below 32 by dilation"
    )


def add_images(group: argparse._ArgumentGroup) -> None:
    """Which images, and how they are looked at."""
    count = config.at_least(1)
    group.add_argument("--data-dir", help="folder of the data set; the demo is made there")
    group.add_argument("--dataset", choices=tuple(FOLDERS), help="layout of the images in --data-dir")
    group.add_argument(
        "--image-size", type=config.at_least(32), help="side of the center square; default twice that of training"
    )
    group.add_argument("--max-images", type=count, help="only so many, spread evenly over the data set")
    group.add_argument("--batch-size", type=count, default=16, help="images at once")
    group.add_argument("--num-workers", type=config.at_least(0), default=8, help="processes that decode images")
    group.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: a GPU if there is one")


def add_output(group: argparse._ArgumentGroup) -> None:
    """What is made, and where it goes."""
    count = config.at_least(1)
    group.add_argument("--figure", choices=FIGURES, help="default neighbors, or none with --html or --export")
    group.add_argument("--save-path", type=Path, help="the figure's file, or its folder; default beside the checkpoint")
    group.add_argument("--html", type=Path, metavar="FILE", help="one page with every prototype")
    group.add_argument("--export", type=Path, metavar="DIR", help="masks, scores and prototypes as files")
    group.add_argument("--topk", type=count, default=5, help="nearest images of a prototype")
    group.add_argument("--sampling", type=count, default=20, help="prototypes drawn from the used ones; images of maps")
    group.add_argument("--idxs", type=config.at_least(0), nargs="+", help="these prototypes instead of drawn ones")
    group.add_argument("--alpha", type=config.between(0, 1), default=0.5, help="how dark the rest of a picture is")
    group.add_argument("--points", type=config.at_least(10), default=4000, help="cells in the figure tsne")
    group.add_argument("--dpi", type=config.at_least(20), default=150, help="pixels to an inch of a figure")
    group.add_argument("--seed", type=config.at_least(0), default=0, help="of what is drawn by chance")
    group.add_argument("--overwrite", action="store_true", help="replace files that are there")


def _with_dashes(argv: Sequence[str]) -> list[str]:
    """`--data_dir=some_folder` -> `--data-dir=some_folder`."""
    flags = [word.partition("=") if word.startswith("--") else ("", "", word) for word in argv]
    return ["".join((flag.replace("_", "-"), equals, value)) for flag, equals, value in flags]


def main(argv: Sequence[str] | None = None) -> None:
    """The command: mistakes of the user end in one line and exit status 2."""
    args = parse_args(argv)
    try:
        visualize(args)
    except UsageError as error:
        distributed.exit_with_error(str(error))
    except KeyboardInterrupt:
        distributed.exit_with_error("stopped", status=130)


def visualize(args: argparse.Namespace) -> None:
    """Arguments -> model and images -> what was asked for."""
    args.amp = "off"
    device = choose_device(args)
    told = check_inputs(args)
    model = load_model(args, told).to(device)
    check_prototypes(args, len(model.prototypes))
    squares = Squares(find_images(args, told), args.image_size or 2 * told.get("image_size", 224))
    observer = Observer(model, squares, device, args.batch_size, loader_workers(args.num_workers))
    numbers = spread(len(squares), args.max_images)
    if args.figure in ("maps", "tsne"):
        save_figure(draw_some(args, observer, numbers), args.save_path)
    if args.html or args.export or args.figure in ("neighbors", "usage"):
        survey = take_survey(args, observer, model, numbers)
        if args.figure in ("neighbors", "usage"):
            save_figure(draw_all(args, observer, survey), args.save_path)
        if args.html:
            write(args.html, build_page(observer, survey, args.alpha, describe(args, observer, survey.images)))
    for name, path in (("figure", args.save_path), ("page", args.html), ("files", args.export)):
        if path:
            print(f"{name}: {path}")


def check_inputs(args: argparse.Namespace) -> dict[str, Any]:
    """Make sure of everything that can be known before any work, complete --save-path; the checkpoint's arguments.

    Raises:
        UsageError: a file or folder is missing or would be overwritten, or flags do not go together.
    """
    state = checkpoint.load(args.model_path, "--model-path")
    if args.figure is None and (args.save_path or not (args.html or args.export)):
        args.figure = "neighbors"
    if args.topk > _TOPK_LARGEST:
        raise UsageError(f"--topk {args.topk}: more than {_TOPK_LARGEST} images of a prototype fit on no page")
    if args.idxs and args.figure not in ("neighbors", "maps"):
        raise UsageError("--idxs: chooses prototypes of --figure neighbors or maps, and neither is drawn")
    if args.figure:
        name = f"slots_{args.figure}.png"
        args.save_path = args.save_path or args.model_path.parent / name
        if args.save_path.is_dir():
            args.save_path /= name
        if args.save_path.suffix.lower() not in FORMATS:
            raise UsageError(
                f"--save-path {args.save_path}: not a picture's name; end it in one of {' '.join(FORMATS)}"
            )
    for flag, path in (("--save-path", args.save_path), ("--html", args.html), ("--export", args.export)):
        if path:
            _check_output(flag, path, args.overwrite)
    told = state.get("args")
    return vars(told) if isinstance(told, argparse.Namespace) else dict(told) if isinstance(told, Mapping) else {}


def _check_output(flag: str, path: Path, overwrite: bool) -> None:
    parent = path.absolute().parent
    if not parent.is_dir():
        raise UsageError(f"{flag} {path}: the folder {parent} is not there; make it, or use another")
    if not os.access(parent, os.W_OK):
        raise UsageError(f"{flag} {path}: the folder {parent} cannot be written to; use another")
    if flag != "--export" and path.is_dir():
        raise UsageError(f"{flag} {path}: is a folder; name a file")
    if flag == "--export" and path.exists() and not path.is_dir():
        raise UsageError(f"{flag} {path}: is a file; name a folder")
    full = any(path.iterdir()) if path.is_dir() else path.exists()
    if full and not overwrite:
        raise UsageError(f"{flag} {path}: is there already; use another name, or --overwrite")


def load_model(args: argparse.Namespace, told: Mapping[str, Any]) -> TrainedSlots:
    """The slots of --model-path, compared with what the flags say of them.

    Raises:
        UsageError: it has none, or others than the flags say.
    """
    model = load_slots(args.model_path, args.encoder, args.output_stride)
    encoder = {name.removeprefix("vit."): value for name, value in model.encoder.state_dict().items()}
    hidden, (count, width) = model.projector.state_dict()["mlp.0.bias"].numel(), model.prototypes.shape
    there = {"arch": args.arch and infer_arch(encoder, str(args.model_path))}
    there |= {"dim_hidden": hidden, "dim_out": width, "num_prototypes": count}
    for name, value in there.items():
        said = getattr(args, name)
        if said is not None and said != value:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} {said}: {args.model_path} has {value}; leave {flag} out, the file tells it")
    model.grouping.temperature = told.get("teacher_temp", model.grouping.temperature)
    return model


def check_prototypes(args: argparse.Namespace, count: int) -> None:
    """Make sure that --idxs are among `count` prototypes, and drop repetitions."""
    beyond = [number for number in args.idxs or () if number >= count]
    if beyond:
        raise UsageError(f"--idxs {beyond[0]}: {args.model_path} has prototypes 0 to {count - 1}")
    args.idxs = list(dict.fromkeys(args.idxs)) if args.idxs else None


def find_images(args: argparse.Namespace, told: Mapping[str, Any]) -> SceneDataset:
    """The data set that the flags name, or the one that the model was trained on.

    Raises:
        UsageError: it is not there, or has no images.
    """
    if args.dataset is None:
        args.dataset = told["dataset"] if told.get("dataset") in FOLDERS else "COCO"
    if args.data_dir is None:
        args.data_dir = told.get("data_dir", "")
        if not args.data_dir or not Path(args.data_dir).is_dir():
            known = f"the training's, {args.data_dir}, is not there" if args.data_dir else "the checkpoint names none"
            raise UsageError(f"--data-dir: {known}; name the images' folder, and --dataset its layout")
    wanted = {"dataset": args.dataset, "data_dir": args.data_dir, "seed": told.get("seed") or 0}
    return build_dataset(argparse.Namespace(image_size=224, min_scale=0.08, **wanted))


def spread(count: int, limit: int | None) -> list[int]:
    """`limit` of the numbers below `count`, evenly spread, or all of them."""
    limit = min(limit or count, count)
    return [number * count // limit for number in range(limit)]


def take_survey(args: argparse.Namespace, observer: Observer, model: TrainedSlots, numbers: Sequence[int]) -> Survey:
    """Look at all images once; what each of them shows is exported on the way if that was asked for."""
    survey = Survey(model.prototypes, model.grouping.temperature, args.topk)
    export = Export(args.export, observer.squares, len(model.prototypes)) if args.export else None
    for seen in observer.look(numbers, "images"):
        survey.add(seen)
        if export:
            export.add(seen)
    if export:
        facts = {"model": args.model_path.name, "encoder": args.encoder or "teacher", "dataset": args.dataset}
        sizes = {"image_size": observer.squares.size, "output_stride": args.output_stride}
        export.finish(survey, facts | sizes | {"temperature": survey.temperature})
    return survey


def draw_some(args: argparse.Namespace, observer: Observer, numbers: Sequence[int]) -> Figure:
    """The figures of a sample of the images."""
    count = args.sampling if args.figure == "maps" else _TSNE_IMAGES
    images = draw_sample(numbers, count, args.seed)
    facts = describe(args, observer, len(images))
    if args.figure == "maps":
        return draw_maps(observer, images, args.dpi, facts, args.idxs)
    return draw_tsne(observer, images, args.points, args.seed, args.dpi, facts)


def draw_all(args: argparse.Namespace, observer: Observer, survey: Survey) -> Figure:
    """The figures of what was found in all images."""
    facts = describe(args, observer, survey.images)
    if args.figure == "usage":
        return draw_usage(survey, args.dpi, facts)
    prototypes = args.idxs or draw_sample(survey.used, args.sampling, args.seed)
    facts = f"{facts} · {len(survey.used)} of {len(survey.prototypes)} prototypes used"
    return draw_neighbors(observer, survey, prototypes, args.alpha, args.dpi, facts)


def describe(args: argparse.Namespace, observer: Observer, images: int) -> str:
    """What was looked at by what, in a line."""
    path = args.model_path.absolute()
    who = shorten(f"{path.parent.name}/{path.name}", 44) + (" (student)" if args.encoder == "student" else "")
    return f"{who} · {images:,} {'image' if images == 1 else 'images'} of {args.dataset}, {observer.squares.size} px"


if __name__ == "__main__":
    main()
