"""Export slot masks, scores and prototypes as files for other tools."""

from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from transfer.figures.export_folder import ExportFolder, encode_npz
from transfer.figures.extractor import CenterCrops, SlotBatch
from transfer.figures.prototype_stats import PrototypeStats
from utils.visualization import assign_pixels, palette

_README = """Slots of {model} in {images} images.

masks/NAME.png     index mask: the prototype of each pixel; {side} x {side}, {kind}.
scores/NAME.npz    scores: float16 ({count}, h, w), cosine similarity of the prototypes with each position of the map;
                   crop: int64 (4,), x0 y0 x1 y1 of the square in pixels of the image that mask and map cover.
images.csv         for each image: its file, mask, scores and crop.
prototypes.npy     float32 ({count}, {width}).
prototypes.npz     prototypes; images_using int64 ({count},), the number of images that use each;
                   area float64 ({count},), the area of each, in images; nearest int64 ({count}, k), its nearest images
                   as lines of all_images.txt, counted from 0, -1 for none; nearest_scores float32 ({count}, k).
all_images.txt     the files of the dataset, one per line.
metadata.json      model, dataset and settings.

A mask is the argmax over prototypes of the scores after bilinear interpolation (align_corners=False) to its size.
"""


class SlotExport:
    """A folder of masks and scores, written batch by batch, and of prototypes, written at the end."""

    def __init__(self, folder: Path, crops: CenterCrops, num_prototypes: int):
        self.files = ExportFolder(folder, crops, ("masks", "scores"))
        self.crops, self.num_prototypes = crops, num_prototypes
        self.rows: list[tuple[str, str, str, int, int, int, int]] = []

    def write_batch(self, batch: SlotBatch) -> None:
        """Write the masks and scores of a batch.

        Raises:
            UsageError: a file cannot be written.
        """
        scores = batch.scores.half().cpu().numpy()
        for position, (index, box) in enumerate(zip(batch.indices.tolist(), batch.boxes)):
            name = self.files.name(index)
            paths = f"masks/{name}.png", f"scores/{name}.npz"
            assignment = assign_pixels(batch.scores[position], self.crops.size).cpu()
            self.files.write(paths[0], encode_mask(assignment, self.num_prototypes))
            self.files.write(paths[1], encode_npz(scores=scores[position], crop=box.numpy()))
            self.rows.append((self.crops.name(index), *paths, *box.tolist()))

    def write_summary(self, stats: PrototypeStats, metadata: dict[str, object]) -> None:
        """Write the prototypes with their statistics, the lists of files, the metadata and a README.

        Raises:
            UsageError: a file cannot be written.
        """
        prototypes = stats.prototypes.float().cpu().numpy()
        arrays = {
            "images_using": stats.image_counts,
            "area": stats.area,
            "nearest": stats.nearest.indices,
            "nearest_scores": stats.nearest.scores,
        }
        arrays_on_cpu = {name: tensor.cpu().numpy() for name, tensor in arrays.items()}
        self.files.write("prototypes.npz", encode_npz(prototypes=prototypes, **arrays_on_cpu))
        array_file = BytesIO()
        np.save(array_file, prototypes)
        self.files.write("prototypes.npy", array_file.getvalue())

        names = "".join(f"{self.crops.name(index)}\n" for index in range(len(self.crops)))
        self.files.write("all_images.txt", names.encode())
        kind = "8 bits with a palette" if self.num_prototypes <= 256 else "16 bits"
        sizes = {"images": len(self.rows), "side": self.crops.size, "kind": kind, "count": self.num_prototypes}
        readme = _README.format(model=metadata["model"], width=prototypes.shape[1], **sizes)
        self.files.write_texts([("image", "mask", "scores", "x0", "y0", "x1", "y1"), *self.rows], metadata, readme)


def encode_mask(assignment: Tensor, num_prototypes: int) -> bytes:
    """Encode prototype numbers (H, W) as a PNG: 8 bits with a palette up to 256 prototypes, else 16 bits."""
    file = BytesIO()
    if num_prototypes > 256:
        Image.fromarray(assignment.numpy().astype(np.uint16)).save(file, format="png")
    else:
        image = Image.fromarray(assignment.to(torch.uint8).numpy(), mode="P")
        image.putpalette((palette(num_prototypes) * 255).round().to(torch.uint8).flatten().tolist())
        image.save(file, format="png")
    return file.getvalue()
