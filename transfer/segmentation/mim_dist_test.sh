#!/usr/bin/env bash
# Evaluate a fine-tuned model with mmsegmentation; a step is 16 images whatever the number of GPUs, and 0 GPUs is the CPU.
#   transfer/segmentation/mim_dist_test.sh CONFIG CHECKPOINT GPUS [more flags of test.py, which --help lists]
set -euo pipefail
HERE="$(cd "$(dirname "$0")" && pwd)"
PATH="$HERE/../../.venv/bin:$PATH"
if [ "${1:-}" = --help ]; then
    exec python "$HERE/test.py" --help
elif [ $# -lt 3 ] || ! [[ $3 =~ ^[0-9]+$ ]]; then
    echo "usage: $0 CONFIG CHECKPOINT GPUS [more flags, --help lists them]; GPUS is a number, 0 for the CPU" >&2
    exit 2
elif [ "$3" -eq 0 ]; then
    export CUDA_VISIBLE_DEVICES=''
fi
exec python "$HERE/test.py" "$1" "$2" --gpus "$3" "${@:4}"
