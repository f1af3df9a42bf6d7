"""A folder of exported files: a name for each image, atomic writes, compressed arrays."""

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from io import BytesIO, StringIO
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from transfer.figures.extractor import CenterCrops
from utils.errors import UsageError
from utils.files import write_output


class ExportFolder:
    """The folder of `--export`, into which files are written below a name for each image."""

    def __init__(self, folder: Path, crops: CenterCrops, kinds: Sequence[str]):
        """Create the folder.

        Args:
            folder: to write into.
            crops: the images.
            kinds: folders to create in it, one for each kind of file.

        Raises:
            UsageError: a folder cannot be created.
        """
        self.folder, self.crops = folder, crops
        stems = Counter(self._stem(index) for index in range(len(crops)))
        self._ambiguous = {stem for stem, count in stems.items() if count > 1}
        for kind in kinds:
            self._create(folder / kind)

    def name(self, index: int) -> str:
        """Return the name of an image's files: its path without suffix, or with it if that is not unique."""
        stem = self._stem(index)
        return self._relative_path(index) if stem in self._ambiguous else stem

    def write(self, name: str, content: bytes) -> None:
        """Write a file, and create the folders of its name.

        Raises:
            UsageError: the file cannot be written.
        """
        path = self.folder / name
        self._create(path.parent)
        write_output("--export", path, lambda file: file.write(content))

    def write_table(self, name: str, rows: Sequence[Sequence[Any]]) -> None:
        """Write rows, the first of which is the head, as a CSV file.

        Raises:
            UsageError: the file cannot be written.
        """
        table = StringIO()
        csv.writer(table).writerows(rows)
        self.write(name, table.getvalue().encode())

    def write_texts(self, rows: Sequence[Sequence[Any]], metadata: Mapping[str, Any], readme: str) -> None:
        """Write `images.csv`, whose first row is its head, `metadata.json` and `README.txt`.

        Raises:
            UsageError: a file cannot be written.
        """
        self.write_table("images.csv", rows)
        self.write("metadata.json", (json.dumps(metadata, indent=2) + "\n").encode())
        self.write("README.txt", readme.encode())

    def _relative_path(self, index: int) -> str:
        """Return the image's path without parts that lead out of the folder."""
        parts = PurePosixPath(self.crops.name(index)).parts
        return str(PurePosixPath(*(part for part in parts if part != "..")))

    def _stem(self, index: int) -> str:
        return str(PurePosixPath(self._relative_path(index)).with_suffix(""))

    def _create(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--export {self.folder}: cannot be created ({error.strerror}); use another") from None


def encode_npz(**arrays: np.ndarray) -> bytes:
    """Return the content of a compressed `.npz` file."""
    file = BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()
