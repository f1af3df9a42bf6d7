#!/usr/bin/env bash
# Format, lint, types and all tests, in the quickstart's environment plus the development tools.
#   ./scripts/test.sh [--full] [flags of pytest]      --full adds the tests that take minutes
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
install requirements.txt tests/requirements.txt transfer/requirements-segmentation.txt

MARKS=(-m "not full")
if [ "${1:-}" = --full ]; then
    MARKS=()
    shift
fi

ruff format --check .
ruff check .
mypy
OMP_NUM_THREADS=1 pytest --numprocesses 2 --dist worksteal ${MARKS[@]+"${MARKS[@]}"} "$@"
