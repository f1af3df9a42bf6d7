"""What a model sees, as files for other tools: index masks, scores, prototypes."""

import csv
import json
from collections import Counter
from io import BytesIO, StringIO
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.errors import UsageError
from transfer.figures.looking import Seen, Squares
from transfer.figures.regions import winners
from transfer.figures.sheet import write
from transfer.figures.survey import Survey
from utils.visualization import palette

_README = """Slots of {model}, of {images} images.

masks/NAME.png     the prototype that wins at each pixel: {side} x {side}, {kind}.
scores/NAME.npz    scores: float16 ({count}, h, w), cosines of the prototypes with each cell of the map;
                   crop: int64 (4,), x0 y0 x1 y1 of the square in pixels of the image, which mask and map cover.
images.csv         the file of each mask and scores, and its crop.
prototypes.npy     float32 ({count}, {width}).
prototypes.npz     prototypes; images_using int64 ({count},), in how many images each is used;
                   area float64 ({count},), what each wins, in images; nearest int64 ({count}, k), its nearest images
                   as lines of all_images.txt from 0, -1 for none; nearest_scores float32 ({count}, k).
all_images.txt     the files of the data set, a line each.
facts.json         where this comes from.

A mask is the arg-max over the prototypes of the scores, interpolated bilinearly (corners not aligned) to its size.
"""


class Export:
    """A folder that takes images as they are seen, and the prototypes at the end."""

    def __init__(self, folder: Path, squares: Squares, count: int):
        """`count` is the number K of prototypes."""
        self.folder, self.squares, self.count = folder, squares, count
        stems = Counter(self._stem(number) for number in range(len(squares)))
        self.ambiguous = {stem for stem, times in stems.items() if times > 1}
        self.rows: list[tuple[str, str, str, int, int, int, int]] = []
        for name in ("masks", "scores"):
            self._make(folder / name)

    def add(self, seen: Seen) -> None:
        """Write the masks and scores of a batch.

        Raises:
            UsageError: the disk does not take them.
        """
        scores = seen.scores.half().cpu().numpy()
        for place, (number, crop) in enumerate(zip(seen.numbers.tolist(), seen.crops)):
            name = self._stem(number)
            if name in self.ambiguous:
                name = self._safe(number)
            mask, arrays = self.folder / "masks" / f"{name}.png", self.folder / "scores" / f"{name}.npz"
            self._make(mask.parent)
            self._make(arrays.parent)
            write(mask, index_mask(winners(seen.scores[place], self.squares.size).cpu(), self.count))
            write(arrays, _npz(scores=scores[place], crop=crop.numpy()))
            x0, y0, x1, y1 = crop.tolist()
            here = mask.relative_to(self.folder), arrays.relative_to(self.folder)
            self.rows.append((self.squares.name(number), str(here[0]), str(here[1]), x0, y0, x1, y1))

    def finish(self, survey: Survey, facts: dict[str, object]) -> None:
        """Write the prototypes, what is known of each, and the list of files."""
        prototypes = survey.prototypes.float().cpu().numpy()
        arrays = {
            "images_using": survey.images_using,
            "area": survey.area,
            "nearest": survey.nearest.images,
            "nearest_scores": survey.nearest.scores,
        }
        on_host = {name: tensor.cpu().numpy() for name, tensor in arrays.items()}
        write(self.folder / "prototypes.npz", _npz(prototypes=prototypes, **on_host))
        file = BytesIO()
        np.save(file, prototypes)
        write(self.folder / "prototypes.npy", file.getvalue())
        table = StringIO()
        lines = csv.writer(table)
        lines.writerow(["image", "mask", "scores", "x0", "y0", "x1", "y1"])
        lines.writerows(self.rows)
        write(self.folder / "images.csv", table.getvalue().encode())
        names = [self.squares.name(number) for number in range(len(self.squares))]
        write(self.folder / "all_images.txt", "".join(f"{name}\n" for name in names).encode())
        write(self.folder / "facts.json", (json.dumps(facts, indent=2) + "\n").encode())
        kind = "8 bits, a palette" if self.count <= 256 else "16 bits"
        sizes = {"images": len(self.rows), "side": self.squares.size, "kind": kind, "count": self.count}
        words = _README.format(model=facts["model"], width=prototypes.shape[1], **sizes)
        write(self.folder / "README.txt", words.encode())

    def _safe(self, number: int) -> str:
        """The image's file without what would lead out of the folder."""
        return str(PurePosixPath(*(part for part in PurePosixPath(self.squares.name(number)).parts if part != "..")))

    def _stem(self, number: int) -> str:
        return str(PurePosixPath(self._safe(number)).with_suffix(""))

    def _make(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--export {self.folder}: cannot be made ({error.strerror}); use another folder") from None


def index_mask(won: Tensor, count: int) -> bytes:
    """A PNG of prototype numbers (H, W): of 8 bits, in colors, up to 256 prototypes, of 16 beyond."""
    file = BytesIO()
    if count > 256:
        Image.fromarray(won.numpy().astype(np.uint16)).save(file, format="png")
    else:
        picture = Image.fromarray(won.to(torch.uint8).numpy(), mode="P")
        picture.putpalette((palette(count) * 255).round().to(torch.uint8).flatten().tolist())
        picture.save(file, format="png")
    return file.getvalue()


def _npz(**arrays: np.ndarray) -> bytes:
    file = BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()
