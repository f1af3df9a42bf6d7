"""COCO-Stuff's 27 coarse classes, and their masks out of its pixel maps.

    python -m transfer.probe.cocostuff STUFFTHINGMAPS OUT      # or: python transfer/probe/cocostuff.py ...

STUFFTHINGMAPS holds `train2017/*.png` and `val2017/*.png` with values category - 1 (0..181) and 255 for unlabeled;
OUT gets the same names with values 0..26 and 255.
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

from utils import config, distributed
from utils.errors import UsageError
from utils.files import atomic_write

_VALUES = {
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
"""The values of the pixel maps that belong to each super-category: 12 of things, 15 of stuff."""

CLASSES = tuple(_VALUES)


def coarse_classes() -> NDArray[np.uint8]:
    """(256,): the class 0..26 of each value of the pixel maps, 255 for those of none."""
    table = np.full(256, 255, dtype=np.uint8)
    for label, values in enumerate(_VALUES.values()):
        for part in values.split():
            first, _, last = part.partition("-")
            table[int(first) : int(last or first) + 1] = label
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """The command: mistakes of the user end in one line and exit status 2."""
    parser = config.make_parser("Make masks of COCO-Stuff's 27 coarse classes out of its pixel maps.")
    parser.add_argument("maps", metavar="STUFFTHINGMAPS", type=Path, help="holds train2017 and val2017, or one of them")
    parser.add_argument("out", metavar="OUT", type=Path, help="the masks' folder, such as COCO/semantic27")
    args = parser.parse_args(argv)
    try:
        prepare(args.maps, args.out)
    except UsageError as error:
        distributed.exit_with_error(str(error))


def prepare(maps: Path, out: Path) -> None:
    """Write the masks that are not there yet.

    Raises:
        UsageError: there are no pixel maps, or one cannot be read or has other values.
    """
    files = sorted(maps.glob("*2017/*.png"))
    if not files:
        raise UsageError(f"{maps}: no pixel maps in it; train2017/*.png or val2017/*.png are looked for")
    table = coarse_classes()
    for file in tqdm(files, unit="mask", disable=not sys.stderr.isatty()):
        target = out / file.parent.name / file.name
        if target.exists():
            continue
        try:
            values = np.array(Image.open(file))
        except OSError as error:
            raise UsageError(f"{file}: cannot be read ({error})") from None
        if values.ndim != 2 or values.dtype != np.uint8 or ((values > 181) & (values < 255)).any():
            raise UsageError(f"{file}: no pixel map of COCO-Stuff (one channel, values 0 to 181 and 255)")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(target, partial(Image.fromarray(table[values]).save, format="png"))
        except OSError as error:
            raise UsageError(f"{out}: cannot be written ({error.strerror}); use another folder") from None
    print(f"{len(files)} masks in {out}")


if __name__ == "__main__":
    main()
