"""The mmsegmentation dataset for a folder of images and masks, which configs/folder imports."""

from pathlib import Path
from typing import Any

from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from transfer.probe.labeled_features import LAYOUTS


@DATASETS.register_module()
class FolderDataset(BaseSegDataset):
    """One split of a folder in the probes' layout `folder`; images without a mask are left out.

    Args:
        split: `train` or `val`.
        options: of `BaseSegDataset`; `data_root` is the folder, and `metainfo["classes"]` names the classes.
    """

    def __init__(self, split: str, **options: Any):
        self.split = split
        super().__init__(**options)

    def load_data_list(self) -> list[dict[str, Any]]:
        """List the files of each pair, as `BaseSegDataset` does for one suffix."""
        pairs = LAYOUTS["folder"].pairs(Path(self.data_root), self.split)
        common = {"label_map": self.label_map, "reduce_zero_label": self.reduce_zero_label}
        return [common | {"img_path": str(image), "seg_map_path": str(mask), "seg_fields": []} for image, mask in pairs]
