#!/usr/bin/env bash
# Checks the program on a GPU within MINUTES: correct, fast, and what it reaches. The machine needs PyTorch (2.11 or
# newer), torchvision and Python 3.12, no network, Ray or FFCV. GPU_CHECK_FOLDER keeps everything (runs/gpu_check).
#   launch/gpu_check.sh pack [--cifar10 FILE] [--labels FILE] [--resume OUT]   before, with a network: parts below 60 MiB
#   launch/gpu_check.sh unpack runs/gpu_parts/part-1 ...                       there, one or several parts at a time
#   launch/gpu_check.sh MINUTES [--out OUT] [--parts equal speed cluster labels]   the check; the same again goes on
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
export GPU_CHECK_FOLDER=${GPU_CHECK_FOLDER:-runs/gpu_check}
case ${1:-} in pack | unpack) exec "$python" tests/gpu/travel.py "$@" ;; esac
case $GPU_CHECK_FOLDER in /*) site=$GPU_CHECK_FOLDER/site ;; *) site=$PWD/$GPU_CHECK_FOLDER/site ;; esac
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "$python" -m tests.gpu.check "$@"
