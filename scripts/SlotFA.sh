#!/usr/bin/env bash
# For users of the released repository: its script's name and 4 GPUs x 128, with the augmented loss that trains (preset
# *paper*). What the released code computes is slotfa_coco_r50_800ep_released.sh.
#   DATA=/data/coco OUT=output/SlotFA ./scripts/SlotFA.sh [more flags]
set -euo pipefail
GPUS="${GPUS:-4}" OUT="${OUT:-output/SlotFA}" exec "$(dirname "$0")/slotfa_coco_r50_800ep.sh" "$@"
