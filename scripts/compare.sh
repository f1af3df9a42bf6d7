#!/usr/bin/env bash
# SlotCon, SlotFA's three presets, and its first with smaller sigmas: the same photographs, budget and seeds, measured by the linear probe beside the
# untrained encoder. The budget is a CPU's; more flags of main_pretrain.py replace it. Run again, it goes on.
#   DATA=/data/coco OUT=output/compare SEEDS="0 1 2" ./scripts/compare.sh [more flags of main_pretrain.py]
# DATA is COCO's layout with semantic27/ (transfer/probe/README.md).
set -euo pipefail
ROOT="$(cd "$(dirname "$0")/.." && pwd)"
PATH="$ROOT/.venv/bin:$PATH"
OUT="${OUT:-output/compare}" DATA="${DATA:-data}"

one() {
    local name=$1 run="$OUT/$1/seed_$2" seed=$2
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
    one SlotCon "$seed" "$@"
    METHOD=(--method slotfa)
    one SlotFA_paper "$seed" "$@"
    METHOD=(--method slotfa --group-loss-weight 0.5 --fa-train-prototypes)
    one SlotFA_contrast "$seed" "$@"
    METHOD=(--method slotfa --no-fa-gradient)
    one SlotFA_released "$seed" "$@"
    for sigma in 0.5 0.1; do
        METHOD=(--method slotfa --fa-sigma-scale "$sigma" --fa-sigma-shift "$sigma")
        one SlotFA_paper_sigma_$sigma "$seed" "$@"
    done
done
python "$ROOT/transfer/probe/compare.py" "$OUT"
