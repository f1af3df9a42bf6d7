"""Convert a checkpoint for mmseg: `python transfer/segmentation/convert_pretrain_to_mm.py IN.pth OUT.pth`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transfer.convert import main

if __name__ == "__main__":
    main(target="mmseg")
