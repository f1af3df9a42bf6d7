"""Write what shows slots: figures, the page of all prototypes, and the export."""

import argparse
from collections.abc import Sequence

from matplotlib.figure import Figure

from transfer.figures.extractor import SlotExtractor
from transfer.figures.layout import save_figure
from transfer.figures.loaded_model import LoadedModel
from transfer.figures.maps import draw_maps
from transfer.figures.neighbors import draw_neighbors
from transfer.figures.prototype_page import build_page
from transfer.figures.prototype_stats import PrototypeStats
from transfer.figures.sampling import DEFAULT_SAMPLING, sample_sorted
from transfer.figures.slot_export import SlotExport
from transfer.figures.tsne import draw_tsne
from transfer.figures.usage import draw_usage
from utils.files import write_output

_TSNE_IMAGES = 400


def write_slots(args: argparse.Namespace, model: LoadedModel, extractor: SlotExtractor, indices: Sequence[int]) -> None:
    """Write what needs prototypes: one of the figures of slots, the page and the export."""
    if args.figure in ("maps", "tsne"):
        save_figure("--save-path", args.save_path, draw_images(args, model, extractor, indices))
    if args.html or args.export or args.figure in ("neighbors", "usage"):
        stats = compute_stats_and_export(args, model, extractor, indices)
        if args.figure in ("neighbors", "usage"):
            save_figure("--save-path", args.save_path, draw_stats(args, model, extractor, stats))
        if args.html:
            page = build_page(
                extractor, stats, args.alpha, model.describe(extractor.crops, args.dataset, stats.num_images)
            )
            write_output("--html", args.html, lambda file: file.write(page))


def compute_stats_and_export(
    args: argparse.Namespace, model: LoadedModel, extractor: SlotExtractor, indices: Sequence[int]
) -> PrototypeStats:
    """Apply the model to all images, collect the statistics of the prototypes, and write the export."""
    assert model.slots
    stats = PrototypeStats(model.slots.prototypes, model.slots.grouping.temperature, args.topk)
    export = SlotExport(args.export, extractor.crops, len(model.slots.prototypes)) if args.export else None
    for batch in extractor.extract(indices, "extracting"):
        stats.update(batch)
        if export:
            export.write_batch(batch)
    if export:
        metadata = model.metadata(extractor.crops, args.dataset) | {"temperature": stats.temperature}
        export.write_summary(stats, metadata)
    return stats


def draw_images(
    args: argparse.Namespace, model: LoadedModel, extractor: SlotExtractor, indices: Sequence[int]
) -> Figure:
    """Draw one of the figures of slots in sampled images, maps and tsne."""
    count = args.sampling or DEFAULT_SAMPLING if args.figure == "maps" else _TSNE_IMAGES
    sampled = sample_sorted(indices, count, args.seed)
    details = model.describe(extractor.crops, args.dataset, len(sampled))
    if args.figure == "maps":
        return draw_maps(extractor, sampled, args.dpi, details, args.idxs)
    return draw_tsne(extractor, sampled, args.points, args.seed, args.dpi, details)


def draw_stats(args: argparse.Namespace, model: LoadedModel, extractor: SlotExtractor, stats: PrototypeStats) -> Figure:
    """Draw one of the figures of slots in all images, neighbors and usage."""
    details = model.describe(extractor.crops, args.dataset, stats.num_images)
    if args.figure == "usage":
        return draw_usage(stats, args.dpi, details)
    sampled = args.idxs or sample_sorted(stats.used, args.sampling or DEFAULT_SAMPLING, args.seed)
    details = f"{details} · {len(stats.used)} of {len(stats.prototypes)} prototypes used"
    return draw_neighbors(extractor, stats, list(dict.fromkeys(sampled)), args.alpha, args.dpi, details)
