#!/usr/bin/env bash
# Sets up what runs, then runs the main job: clusters scikit-learn's 1,797 handwritten digits into runs/digits.
# Arguments are passed on, such as --seed 1 --out runs/digits-1.
set -euo pipefail
cd "$(dirname "$0")/.."
launch/setup.sh run
exec .venv/bin/spice-dist fit digits --out runs/digits "$@"
