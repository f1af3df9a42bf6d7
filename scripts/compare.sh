#!/usr/bin/env bash
# Pre-train SlotCon, the three presets of SlotFA, and its first preset with smaller sigmas, on the same images and with the same
# budget and seeds; then print one table of their linear probes and of those of the untrained encoders. The default budget suits a
# CPU; additional flags of main_pretrain.py override it. A second call continues an interrupted one.
#   DATA=/data/coco OUT=output/compare SEEDS="0 1 2" ./scripts/compare.sh [flags of main_pretrain.py]
# DATA has COCO's layout with semantic27/ (transfer/probe/README.md).
set -euo pipefail
ROOT="$(cd "$(dirname "$0")/.." && pwd)"
PATH="$ROOT/.venv/bin:$PATH"
OUT="${OUT:-output/compare}" DATA="${DATA:-data}"

train_and_probe() {
    local run="$OUT/$1/seed_$2" seed=$2
    shift 2
    if [ -e "$run/probe/results.json" ]; then return; fi
    python "$ROOT/main_pretrain.py" --dataset COCOplus --data-dir "$DATA" --image-size 96 --min-scale 0.2 \
        --arch resnet18 --dim-hidden 512 --dim-out 128 --num-prototypes 16 --teacher-temp 0.04 \
        --batch-size 37 --base-lr 8 --warmup-epoch 1 --epochs 9 --save-freq 9 \
        --seed "$seed" --output-dir "$run" --auto-resume "${METHOD[@]}" "$@"
    python "$ROOT/transfer/probe/linear_segmentation.py" "$run/current.pth" --baseline random \
        --dataset coco-stuff-27 --data-dir "$DATA" --seed "$seed" --cache "$run/features" --out "$run/probe"
    rm -r "$run/features"
}

for seed in ${SEEDS:-0 1 2}; do
    METHOD=(--method slotcon)
    train_and_probe SlotCon "$seed" "$@"
    METHOD=(--method slotfa)
    train_and_probe SlotFA_paper "$seed" "$@"
    METHOD=(--method slotfa --group-loss-weight 0.5 --fa-train-prototypes)
    train_and_probe SlotFA_contrast "$seed" "$@"
    METHOD=(--method slotfa --no-fa-gradient)
    train_and_probe SlotFA_released "$seed" "$@"
    for sigma in 0.5 0.1; do
        METHOD=(--method slotfa --fa-sigma-scale "$sigma" --fa-sigma-shift "$sigma")
        train_and_probe SlotFA_paper_sigma_$sigma "$seed" "$@"
    done
done

python - "$OUT" <<'PYTHON'
"""Print mean and sample standard deviation over the seeds of each run's linear probe."""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from tabulate import tabulate

runs = defaultdict(list)
for file in sorted(Path(sys.argv[1]).glob("*/seed_*/probe/results.json")):
    runs[file.parts[-4].replace("_", " ")].append(json.loads(file.read_text())["results"])


def spread(values):
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


rows = []
for name, results in runs.items():
    trained, untrained = ([result[key]["linear probe"] for result in results] for key in ("checkpoint", "untrained"))
    metrics = [(trained, "miou"), (trained, "accuracy"), (untrained, "miou")]
    rows.append([name, len(results), *(spread([scores[key] for scores in group]) for group, key in metrics)])
headers = ["run", "seeds", "mIoU", "pixel accuracy", "mIoU of the untrained encoder"]
print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))
PYTHON
