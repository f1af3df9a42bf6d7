#!/usr/bin/env bash
# SlotCon, ViT-S/16, COCO train2017, 800 epochs. The optimization of the ViT is ours: the paper trains ResNets.
#   DATA=/data/coco OUT=output/slotcon_coco_vit_small_800ep ./scripts/slotcon_coco_vit_small_800ep.sh [flags of main_pretrain.py]
# On several nodes, run on each: NNODES=2 NODE_RANK=0 MASTER_ADDR=first-node GPUS=4 ./scripts/slotcon_coco_vit_small_800ep.sh
set -euo pipefail
ROOT="$(cd "$(dirname "$0")/.." && pwd)"
PATH="$ROOT/.venv/bin:$PATH"

torchrun \
    --nproc_per_node "${GPUS:-8}" --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-29500}" \
    "$ROOT/main_pretrain.py" \
    --method slotcon \
    --dataset COCO --data-dir "${DATA:-data}" \
    --image-size 224 --min-scale 0.08 --num-workers 8 \
    --arch vit_small_patch16_224 --drop-path 0.1 \
    --dim-hidden 4096 --dim-out 256 --num-prototypes 256 \
    --teacher-momentum 0.99 --teacher-temp 0.07 --student-temp 0.1 --center-momentum 0.9 \
    --group-loss-weight 0.5 --contrast-temp 0.2 \
    --batch-size 512 --accum-steps 1 --epochs 800 \
    --optimizer adamw --base-lr 5e-4 --weight-decay 0.04 --weight-decay-end 0.4 \
    --warmup-epoch 10 --warmup-multiplier inf --clip-grad 3 \
    --device cuda --amp bf16 --seed 0 \
    --output-dir "${OUT:-output/slotcon_coco_vit_small_800ep}" --auto-resume --print-freq 10 --save-freq 50 \
    "$@"
