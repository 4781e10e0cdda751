#!/usr/bin/env bash
# Sets this checkout up: a virtual environment .venv with the pinned packages. What is there already is skipped in
# seconds. PYTHON names another interpreter than python3. The argument says what is wanted:
#   run      what runs on one machine: no compiler, no Debian packages but Python's own
#   cluster  (default) and FFCV, with the Debian packages that it compiles against, and Ray's job server
#   test     and what the tests need
set -euo pipefail
cd "$(dirname "$0")/.."

debian_packages=(g++ pkg-config libopencv-dev libturbojpeg0-dev python3-dev python3-venv)
declare -A extras=([run]="photos" [cluster]="photos,cluster" [test]="photos,cluster,dev")
level=${1:-cluster}
if [ $# -gt 1 ] || [ -z "${extras[$level]:-}" ]; then
  echo "setup: usage: launch/setup.sh [run|cluster|test], not $*" >&2
  exit 1
fi
if [ "$level" = test ]; then debian_packages+=(chromium); fi  # which the tests of the report drive
wanted=$(cat pyproject.toml constraints.txt launch/setup.sh | sha256sum)

is_done() { [ -f ".venv/.spice-dist-$1" ] && [ "$(cat ".venv/.spice-dist-$1")" = "$wanted" ]; }
ffcv_libraries() { command -v g++ >/dev/null && command -v pkg-config >/dev/null && pkg-config --exists opencv4 libturbojpeg; }
python_modules() { "$python" -c 'import ensurepip, venv' 2>/dev/null; }
python_headers() { "$python" -c 'import sysconfig, os; open(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null; }
browser() { [ "$level" != test ] || command -v chromium >/dev/null; }

install_debian_packages() {
  local root=()
  if [ "$(id -u)" -ne 0 ]; then root=(sudo); fi
  if ! command -v apt-get >/dev/null || { [ "$(id -u)" -ne 0 ] && ! sudo -n true 2>/dev/null; }; then
    echo "setup: these packages are missing and cannot be installed from here: $*" >&2
    echo "setup: install them and run this again" >&2
    return
  fi
  echo "setup: installing $*"
  "${root[@]}" apt-get update -qq
  DEBIAN_FRONTEND=noninteractive "${root[@]}" apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

case $level in # each holds those before it
  run) enough=(run cluster test) ;;
  cluster) enough=(cluster test) ;;
  *) enough=(test) ;;
esac
for level_done in "${enough[@]}"; do
  if is_done "$level_done"; then exit 0; fi
done
python=${PYTHON:-python3}
if [ "$level" = run ]; then
  python_modules || install_debian_packages python3-venv
elif ! ffcv_libraries || ! python_modules || ! python_headers || ! browser; then
  install_debian_packages "${debian_packages[@]}"
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "setup: $("$python" --version) is too old; Python 3.11 or newer is needed (PYTHON=... names one)" >&2
  exit 1
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
echo "setup: installing Python packages into .venv (a few GB with CUDA; minutes on a slow line)"
.venv/bin/python -m pip install -q --upgrade pip
.venv/bin/python -m pip install -q -c constraints.txt -e ".[${extras[$level]}]"
if [ "$level" = run ] || { ffcv_libraries && .venv/bin/python -m pip install -q -c constraints.txt -e '.[ffcv]'; }; then
  echo "$wanted" >".venv/.spice-dist-$level"
else # no stamp: once the libraries are there, the next call installs FFCV
  echo "setup: FFCV is not installed; JPEG is decoded by torchvision, which is slower" >&2
fi
