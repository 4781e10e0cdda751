#!/usr/bin/env bash
# Sets up, then checks style, types and behaviour. Arguments are passed to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
launch/setup.sh test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyright
exec .venv/bin/python -m pytest "$@"
