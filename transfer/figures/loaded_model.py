"""The model that the figures show: an encoder, with or without slots."""

from pathlib import Path
from typing import Any, NamedTuple

from transfer.figures.extractor import CenterCrops
from transfer.figures.layout import shorten
from transfer.figures.vit_attention import has_class_token
from transfer.slot_model import SlotModel

SLOT_FIGURES = ("neighbors", "maps", "tsne", "usage")
"""The figures that need prototypes."""
ENCODER_FIGURES = ("pca", "attention", "patches")
"""The figures of every encoder; `attention` needs a class token."""


class LoadedModel(NamedTuple):
    """An encoder, with the slots on it if the checkpoint has prototypes."""

    path: Path
    encoder: Any
    """A `models.backbones.Encoder`."""
    arch: str
    which: str
    """As in `SlotModel`."""
    slots: SlotModel | None

    @property
    def figures(self) -> tuple[str, ...]:
        """The figures that can be drawn, the default one first."""
        of_slots = SLOT_FIGURES if self.slots else ()
        return *of_slots, *(name for name in ENCODER_FIGURES if name != "attention" or has_class_token(self.encoder))

    def describe(self, crops: CenterCrops, dataset: str, num_images: int) -> str:
        """Return model, number of images, dataset and image size in one line."""
        path = self.path.absolute()
        student = " (student)" if self.which == "student" else ""
        name = shorten(f"{path.parent.name}/{path.name}", 44) + student
        images = f"{num_images:,} {'image' if num_images == 1 else 'images'}"
        return f"{name} · {images} of {dataset}, {crops.size} px"

    def metadata(self, crops: CenterCrops, dataset: str) -> dict[str, Any]:
        """Return the metadata of an export."""
        names = {"model": self.path.name, "encoder": self.which, "arch": self.arch, "dataset": dataset}
        return names | {"image_size": crops.size, "output_stride": self.encoder.stride}
