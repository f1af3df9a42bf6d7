#!/usr/bin/env bash
# Fine-tune a converted encoder with mmsegmentation. The total batch is 16 images; GPUS is 0 for the CPU.
#   transfer/segmentation/mim_dist_train.sh CONFIG PRETRAINED GPUS [flags of train.py, see --help]
set -euo pipefail
HERE="$(cd "$(dirname "$0")" && pwd)"
PATH="$HERE/../../.venv/bin:$PATH"
if [ "${1:-}" = --help ]; then
    exec python "$HERE/train.py" --help
elif [ $# -lt 3 ] || ! [[ $3 =~ ^[0-9]+$ ]]; then
    echo "usage: $0 CONFIG PRETRAINED GPUS [flags, see --help]; GPUS is a number, 0 for the CPU" >&2
    exit 2
elif [ "$3" -eq 0 ]; then
    export CUDA_VISIBLE_DEVICES=''
fi
exec python "$HERE/train.py" "$1" "$2" --gpus "$3" "${@:4}"
