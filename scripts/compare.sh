#!/usr/bin/env bash
# Pre-train SlotCon, the three presets of SlotFA, and preset *paper* with sigmas 0.5 and 0.1. All runs have the same images,
# budget and seeds. Then print one table of their linear probes and of those of randomly initialized encoders.
# The default budget is for a CPU; flags of main_pretrain.py override it. Run again to continue after an interruption.
#   DATA=/data/coco OUT=output/compare SEEDS="0 1 2" ./scripts/compare.sh [flags of main_pretrain.py]
# DATA has COCO's layout with semantic27/ (transfer/probe/README.md).
set -euo pipefail
ROOT="$(cd "$(dirname "$0")/.." && pwd)"
PATH="$ROOT/.venv/bin:$PATH"
OUT="${OUT:-output/compare}" DATA="${DATA:-data}"

train_and_probe() {
    local run="$OUT/$1/seed_$2" seed=$2
    shift 2
    local flags=(--image-size 96 --min-scale 0.2
        --arch resnet18 --dim-hidden 512 --dim-out 128 --num-prototypes 16 --teacher-temp 0.04
        --batch-size 37 --base-lr 8 --warmup-epoch 1 --epochs 9 --save-freq 9
        --seed "$seed" "${METHOD[@]}" "$@")
    if [ -e "$run/flags" ] && [ "$(cat "$run/flags")" != "${flags[*]}" ]; then
        echo "$run was trained with the flags in $run/flags: use the same flags or another OUT" >&2
        exit 2
    fi
    if [ -e "$run/probe/results.json" ]; then return; fi
    python "$ROOT/main_pretrain.py" --dataset COCOplus --data-dir "$DATA" --output-dir "$run" --auto-resume "${flags[@]}"
    printf '%s\n' "${flags[*]}" > "$run/flags"
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

python "$ROOT/scripts/compare_table.py" "$OUT"
