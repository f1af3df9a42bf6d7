#!/usr/bin/env bash
# Fine-tune a checkpoint on everything that has its data linked, and gather the numbers in one table; run again, it
# goes on where it stopped. transfer/README.md says what to install and where data is linked.
#   ./scripts/evaluate.sh CKPT [--seeds 3] [--gpus 8] [--only coco voc12aug ...] [--help]
set -euo pipefail
ROOT="$(cd "$(dirname "$0")/.." && pwd)"
PATH="$ROOT/.venv/bin:$PATH" exec python "$ROOT/transfer/evaluate.py" "$@"
