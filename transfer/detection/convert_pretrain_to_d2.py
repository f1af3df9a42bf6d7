"""Convert a checkpoint for detectron2: `python transfer/detection/convert_pretrain_to_d2.py IN.pth OUT.pkl`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transfer.convert import main

if __name__ == "__main__":
    main(target="detectron2")
