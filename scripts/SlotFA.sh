#!/usr/bin/env bash
# The *paper* preset of SlotFA on 4 GPUs, under the name of the released script. slotfa_coco_r50_800ep_released.sh runs the
# computation of the released code.
#   DATA=/data/coco OUT=output/SlotFA ./scripts/SlotFA.sh [flags of main_pretrain.py]
set -euo pipefail
GPUS="${GPUS:-4}" OUT="${OUT:-output/SlotFA}" exec "$(dirname "$0")/slotfa_coco_r50_800ep.sh" "$@"
