"""The 27 coarse classes of COCO-Stuff, and a command that makes masks of them from its pixel maps.

    python transfer/probe/cocostuff.py STUFFTHINGMAPS OUT

STUFFTHINGMAPS holds `train2017/*.png` and `val2017/*.png` with the values category - 1 (0..181) and 255 for unlabeled;
OUT receives files of the same names with the values 0..26 and 255.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transfer.probe.image_files import read_image
from utils.config import make_parser
from utils.distributed import exit_with_error
from utils.errors import UsageError
from utils.files import atomic_write, check_writable

_CLASS_VALUES = {
    "person": "0",
    "vehicle": "1-8",
    "outdoor": "9-14",
    "animal": "15-24",
    "accessory": "25-32",
    "sports": "33-42",
    "kitchen": "43-50",
    "food": "51-60",
    "furniture": "61-70",
    "electronic": "71-76",
    "appliance": "77-82",
    "indoor": "83-90",
    "textile": "91 92 103 104 108 130 136 140 151 166 167",
    "building": "94 95 127 150 157 165",
    "raw-material": "99 131 138 142",
    "furniture-stuff": "97 106 107 109 111 122 129 132 155 160 164",
    "floor": "100 113-117",
    "plant": "93 96 118 123 128 133 141 162 168",
    "food-stuff": "120 121 152 169",
    "ground": "110 124 125 135 139 143 144 146 148 153 158",
    "structural": "98 112 137 145 163",
    "water": "119 147 154 177 178",
    "wall": "170-176",
    "window": "179 180",
    "ceiling": "101 102",
    "sky": "105 156",
    "solid": "126 134 149 159 161 181",
}
"""The values of the pixel maps that belong to each coarse class: 12 classes of things, then 15 of stuff."""

CLASSES = tuple(_CLASS_VALUES)


def coarse_class_table() -> NDArray[np.uint8]:
    """Return the coarse class (0..26) of each of the 256 values of a pixel map; 255 for values without a class."""
    table = np.full(256, 255, dtype=np.uint8)
    for label, ranges in enumerate(_CLASS_VALUES.values()):
        for text in ranges.split():
            first, _, last = text.partition("-")
            table[int(first) : int(last or first) + 1] = label
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a usage error is printed in one line and ends with exit status 2."""
    parser = make_parser("Make masks of COCO-Stuff's 27 coarse classes from its pixel maps.")
    parser.add_argument("maps", metavar="STUFFTHINGMAPS", type=Path, help="folder with train2017, val2017 or both")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the masks, such as COCO/semantic27")
    args = parser.parse_args(argv)
    try:
        make_masks(args.maps, args.out)
    except UsageError as error:
        exit_with_error(str(error))


def make_masks(maps: Path, out: Path) -> None:
    """Write the coarse mask of every pixel map; masks that exist already are kept.

    Raises:
        UsageError: there are no pixel maps, one cannot be read or holds other values, or `out` is not writable.
    """
    files = sorted(maps.glob("*2017/*.png"))
    if not files:
        raise UsageError(f"{maps}: no pixel maps (train2017/*.png or val2017/*.png) in it")
    check_writable("OUT", out, overwrite=True, folder=True)
    table = coarse_class_table()
    for file in tqdm(files, unit="mask", disable=not sys.stderr.isatty()):
        target = out / file.parent.name / file.name
        if target.exists():
            continue
        mask = Image.fromarray(table[_read_pixel_map(file)])
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(target, partial(mask.save, format="png"))
        except OSError as error:
            raise UsageError(f"OUT {out}: cannot be written ({error.strerror}); use another folder") from None
    print(f"{len(files)} masks in {out}")


def _read_pixel_map(file: Path) -> NDArray[np.uint8]:
    values = np.array(read_image(file))
    if values.ndim != 2 or values.dtype != np.uint8 or ((values > 181) & (values < 255)).any():
        raise UsageError(f"{file}: not a pixel map of COCO-Stuff (one channel, values 0 to 181 and 255)")
    return values


if __name__ == "__main__":
    main()
