#!/usr/bin/env bash
# Sets up, then checks style, types and behaviour. Arguments are passed to pytest; without any, two processes share the
# tests.
set -euo pipefail
cd "$(dirname "$0")/.."
launch/setup.sh test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyright
export OMP_NUM_THREADS=1          # each process has a core
unset PYTHONDONTWRITEBYTECODE     # the tests start Python often, which would compile the package each time
[ $# -gt 0 ] || set -- -n 2 --no-loadscope-reorder
exec .venv/bin/python -m pytest "$@"
