#!/usr/bin/env bash
# Format, lint, types and all tests, in the quickstart's environment plus the development tools.
#   ./scripts/test.sh [more flags of pytest]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
install requirements.txt tests/requirements.txt

ruff format --check .
ruff check .
mypy
OMP_NUM_THREADS=1 pytest --numprocesses 2 "$@"
