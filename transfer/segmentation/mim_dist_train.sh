#!/usr/bin/env bash
# Fine-tune a converted encoder with mmsegmentation; the total batch stays 16 whatever the number of GPUs, and 0 GPUs is the CPU.
#   transfer/segmentation/mim_dist_train.sh CONFIG PRETRAINED GPUS [more flags of train.py]
set -euo pipefail
if [ $# -lt 3 ] || ! [[ $3 =~ ^[0-9]+$ ]]; then
    echo "usage: $0 CONFIG PRETRAINED GPUS [more flags of train.py]; GPUS is a number, 0 for the CPU" >&2
    exit 2
fi
CONFIG=$1 PRETRAINED=$2 GPUS=$3
shift 3
HERE="$(cd "$(dirname "$0")" && pwd)"
PATH="$HERE/../../.venv/bin:$PATH"

if [ "$GPUS" -eq 0 ]; then
    CUDA_VISIBLE_DEVICES='' exec python "$HERE/train.py" "$CONFIG" "$PRETRAINED" "$@"
elif [ "$GPUS" -eq 1 ]; then
    exec python "$HERE/train.py" "$CONFIG" "$PRETRAINED" "$@"
fi
exec torchrun --nproc_per_node "$GPUS" --master_port "${MASTER_PORT:-29501}" "$HERE/train.py" "$CONFIG" "$PRETRAINED" "$@"
