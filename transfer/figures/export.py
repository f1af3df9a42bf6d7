"""Export slot masks, scores and prototypes as files for other tools."""

import csv
import json
from collections import Counter
from io import BytesIO, StringIO
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from transfer.figures.extractor import CenterCrops, ExtractedBatch
from transfer.figures.prototype_stats import PrototypeStats
from utils.errors import UsageError
from utils.files import write_output
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
        self.folder, self.crops, self.num_prototypes = folder, crops, num_prototypes
        stems = Counter(self._stem(index) for index in range(len(crops)))
        self.ambiguous = {stem for stem, count in stems.items() if count > 1}
        self.rows: list[tuple[str, str, str, int, int, int, int]] = []
        for name in ("masks", "scores"):
            self._create(folder / name)

    def write_batch(self, batch: ExtractedBatch) -> None:
        """Write the masks and scores of a batch.

        Raises:
            UsageError: a file cannot be written.
        """
        scores = batch.scores.half().cpu().numpy()
        for position, (index, box) in enumerate(zip(batch.indices.tolist(), batch.boxes)):
            name = self._stem(index)
            if name in self.ambiguous:
                name = self._relative_path(index)
            paths = f"masks/{name}.png", f"scores/{name}.npz"
            for path in paths:
                self._create((self.folder / path).parent)
            assignment = assign_pixels(batch.scores[position], self.crops.size).cpu()
            self._write(paths[0], encode_mask(assignment, self.num_prototypes))
            self._write(paths[1], _encode_npz(scores=scores[position], crop=box.numpy()))
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
        self._write("prototypes.npz", _encode_npz(prototypes=prototypes, **arrays_on_cpu))
        array_file = BytesIO()
        np.save(array_file, prototypes)
        self._write("prototypes.npy", array_file.getvalue())

        table = StringIO()
        csv.writer(table).writerows([("image", "mask", "scores", "x0", "y0", "x1", "y1"), *self.rows])
        names = "".join(f"{self.crops.name(index)}\n" for index in range(len(self.crops)))
        kind = "8 bits with a palette" if self.num_prototypes <= 256 else "16 bits"
        sizes = {"images": len(self.rows), "side": self.crops.size, "kind": kind, "count": self.num_prototypes}
        texts = {
            "images.csv": table.getvalue(),
            "all_images.txt": names,
            "metadata.json": json.dumps(metadata, indent=2) + "\n",
            "README.txt": _README.format(model=metadata["model"], width=prototypes.shape[1], **sizes),
        }
        for name, text in texts.items():
            self._write(name, text.encode())

    def _relative_path(self, index: int) -> str:
        """Return the image's path without parts that lead out of the folder."""
        parts = PurePosixPath(self.crops.name(index)).parts
        return str(PurePosixPath(*(part for part in parts if part != "..")))

    def _stem(self, index: int) -> str:
        return str(PurePosixPath(self._relative_path(index)).with_suffix(""))

    def _write(self, name: str, content: bytes) -> None:
        write_output("--export", self.folder / name, lambda file: file.write(content))

    def _create(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--export {self.folder}: cannot be created ({error.strerror}); use another") from None


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


def _encode_npz(**arrays: np.ndarray) -> bytes:
    file = BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()
