#!/usr/bin/env bash
# GTSA, ViT-S/16, COCO train2017, 100 epochs: the published recipe (arXiv 2304.08014).
#   DATA=/data/coco OUT=output/gtsa_coco_vit_small_100ep ./scripts/gtsa_coco_vit_small_100ep.sh [flags of main_pretrain.py]
# On several nodes, run on each: NNODES=2 NODE_RANK=0 MASTER_ADDR=first-node GPUS=4 ./scripts/gtsa_coco_vit_small_100ep.sh
set -euo pipefail
ROOT="$(cd "$(dirname "$0")/.." && pwd)"
PATH="$ROOT/.venv/bin:$PATH"

torchrun \
    --nproc_per_node "${GPUS:-8}" --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-29500}" \
    "$ROOT/main_pretrain.py" \
    --method gtsa \
    --dataset COCO --data-dir "${DATA:-data}" \
    --image-size 224 --min-scale 0.3 --local-size 96 --local-views 8 --num-workers 8 \
    --arch vit_small_patch16_224 --drop-path 0.1 \
    --dim-hidden 384 --dim-out 768 \
    --teacher-momentum 0.996 --correspondence-weight 0.5 --correspondence-epoch 11 --rotation-weight 0.5 \
    --batch-size 512 --accum-steps 1 --epochs 100 \
    --optimizer adamw --base-lr 5e-4 --weight-decay 0.04 --weight-decay-end 0.4 \
    --warmup-epoch 10 --warmup-multiplier inf --clip-grad 3 --clip-grad-per-parameter \
    --device cuda --amp bf16 --seed 0 \
    --output-dir "${OUT:-output/gtsa_coco_vit_small_100ep}" --auto-resume --print-freq 10 --save-freq 10 \
    "$@"
