#!/usr/bin/env bash
# Fine-tune a checkpoint on every dataset that is linked, and write one table of the metrics. Run again to resume.
# transfer/README.md describes the installation and where to link the data.
#   ./scripts/evaluate.sh CKPT [--seeds 3] [--gpus 8 or --device cpu] [--only coco voc12aug ...] [--help]
set -euo pipefail
ROOT="$(cd "$(dirname "$0")/.." && pwd)"
PATH="$ROOT/.venv/bin:$PATH" exec python "$ROOT/transfer/evaluate.py" "$@"
