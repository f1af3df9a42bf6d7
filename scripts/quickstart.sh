#!/usr/bin/env bash
# Install the requirements into .venv, pre-train a small SlotFA on the demo scenes for a few minutes, draw the nearest
# images of its prototypes, and compare a linear probe with that of the untrained encoder on validation scenes.
#   ./scripts/quickstart.sh [flags of main_pretrain.py]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
install requirements.txt

OUT="${OUT:-output/quickstart_$(date +%Y%m%d_%H%M%S)}"
python main_pretrain.py \
    --method slotfa --group-loss-weight 0.5 --fa-train-prototypes \
    --dataset demo --data-dir data --image-size 96 --min-scale 0.2 \
    --arch resnet18 --dim-hidden 512 --dim-out 128 --num-prototypes 16 --teacher-temp 0.04 \
    --batch-size 32 --optimizer lars --base-lr 8 --warmup-epoch 1 --epochs 5 \
    --save-freq 5 --num-workers 2 --output-dir "$OUT" "$@"

python viz_slots.py --model-path "$OUT/current.pth" --max-images 200 --sampling 8
python transfer/probe/linear_segmentation.py "$OUT/current.pth" --baseline random \
    --dataset demo --data-dir data --size 192 --train-images 200 --val-images 200 --num-workers 2 \
    --cache "$OUT/features" --out "$OUT/probe"
