#!/usr/bin/env bash
# SlotFA by the script name and the 4 GPUs of the released repository, with the *paper* preset. The computation of the
# released code is slotfa_coco_r50_800ep_released.sh.
#   DATA=/data/coco OUT=output/SlotFA ./scripts/SlotFA.sh [more flags]
set -euo pipefail
GPUS="${GPUS:-4}" OUT="${OUT:-output/SlotFA}" exec "$(dirname "$0")/slotfa_coco_r50_800ep.sh" "$@"
