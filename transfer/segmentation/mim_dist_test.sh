#!/usr/bin/env bash
# Evaluate a fine-tuned model with mmsegmentation; the total batch stays 16 whatever the number of GPUs, and 0 GPUs is the CPU.
#   transfer/segmentation/mim_dist_test.sh CONFIG CHECKPOINT GPUS [more flags of test.py]
set -euo pipefail
if [ $# -lt 3 ] || ! [[ $3 =~ ^[0-9]+$ ]]; then
    echo "usage: $0 CONFIG CHECKPOINT GPUS [more flags of test.py]; GPUS is a number, 0 for the CPU" >&2
    exit 2
fi
CONFIG=$1 CHECKPOINT=$2 GPUS=$3
shift 3
HERE="$(cd "$(dirname "$0")" && pwd)"
PATH="$HERE/../../.venv/bin:$PATH"

if [ "$GPUS" -eq 0 ]; then
    CUDA_VISIBLE_DEVICES='' exec python "$HERE/test.py" "$CONFIG" "$CHECKPOINT" "$@"
elif [ "$GPUS" -eq 1 ]; then
    exec python "$HERE/test.py" "$CONFIG" "$CHECKPOINT" "$@"
fi
exec torchrun --nproc_per_node "$GPUS" --master_port "${MASTER_PORT:-29501}" "$HERE/test.py" "$CONFIG" "$CHECKPOINT" "$@"
