"""Write the checked annotations of a custom dataset, and register them in detectron2."""

import argparse
import json
from pathlib import Path

from transfer.detection.d2_custom_dataset import CustomDataset
from utils.errors import UsageError
from utils.files import atomic_write_text

DATASET_NAMES = {"train": "custom_train", "val": "custom_val"}
"""Split -> the name under which it is registered."""


def write_annotations(dataset: CustomDataset, output_dir: Path, machine_rank: int) -> None:
    """Write the annotations of each split to `annotations` in a run's folder, where detectron2 reads them.

    Raises:
        UsageError: the files cannot be written.
    """
    try:
        for split, coco in dataset.items():
            path = _annotations_path(output_dir, split, machine_rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(path, json.dumps(coco.content))
    except OSError as error:
        raise UsageError(f"OUTPUT_DIR {output_dir}: cannot be written ({error.strerror})") from None


def _annotations_path(output_dir: Path, split: str, machine_rank: int) -> Path:
    """Return a file of its own for each machine, since the folder may be shared or not."""
    suffix = f"_machine{machine_rank}" if machine_rank else ""
    return output_dir / "annotations" / f"{split}{suffix}.json"


def register(args: argparse.Namespace, output_dir: Path) -> None:
    """Register the splits that a command reads, in this process and in place of an earlier registration."""
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances

    folders = {"val": args.val_images} if args.eval_only else {"train": args.train_images, "val": args.val_images}
    for split, folder in folders.items():
        name = DATASET_NAMES[split]
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        path = _annotations_path(output_dir, split, args.machine_rank)
        register_coco_instances(name, {}, str(path), str(folder.absolute()))
