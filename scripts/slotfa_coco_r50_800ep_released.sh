#!/usr/bin/env bash
# SlotFA, ResNet-50, COCO train2017, 800 epochs, *released* preset: the augmented loss is computed and logged without gradient.
# 4 GPUs with 128 images each.
#   DATA=/data/coco OUT=output/slotfa_coco_r50_800ep_released ./scripts/slotfa_coco_r50_800ep_released.sh [flags of main_pretrain.py]
# On several nodes, run on each: NNODES=2 NODE_RANK=0 MASTER_ADDR=first-node GPUS=4 ./scripts/slotfa_coco_r50_800ep_released.sh
set -euo pipefail
ROOT="$(cd "$(dirname "$0")/.." && pwd)"
PATH="$ROOT/.venv/bin:$PATH"

torchrun \
    --nproc_per_node "${GPUS:-4}" --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-29500}" \
    "$ROOT/main_pretrain.py" \
    --method slotfa \
    --dataset COCO --data-dir "${DATA:-data}" \
    --image-size 224 --min-scale 0.08 --num-workers 8 \
    --arch resnet50 --output-stride 32 \
    --dim-hidden 4096 --dim-out 256 --num-prototypes 256 \
    --teacher-momentum 0.99 --teacher-temp 0.07 --student-temp 0.1 --center-momentum 0.9 \
    --group-loss-weight 1.0 --contrast-temp 0.2 \
    --fa-sigma-scale 1 --fa-sigma-shift 1 --fa-loss-weight 1 --fa-slot-ratio 1 --fa-level projection \
    --no-fa-gradient \
    --batch-size 512 --accum-steps 1 --epochs 800 \
    --optimizer lars --base-lr 1.0 --weight-decay 1e-5 --momentum 0.9 \
    --warmup-epoch 5 --warmup-multiplier 100 --clip-grad 0 \
    --device cuda --amp bf16 --seed 0 \
    --output-dir "${OUT:-output/slotfa_coco_r50_800ep_released}" --auto-resume --print-freq 10 --save-freq 50 \
    "$@"
