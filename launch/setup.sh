#!/usr/bin/env bash
# Sets this checkout up: Debian packages that FFCV compiles against, a virtual environment .venv, the pinned packages.
# Safe to run again: what is there already is skipped in seconds. PYTHON names another interpreter than python3.
set -euo pipefail
cd "$(dirname "$0")/.."

debian_packages=(g++ pkg-config libopencv-dev libturbojpeg0-dev python3-dev python3-venv)
stamp=.venv/.spice-dist-setup
wanted=$(cat pyproject.toml constraints.txt launch/setup.sh | sha256sum)

ffcv_libraries() { command -v g++ >/dev/null && command -v pkg-config >/dev/null && pkg-config --exists opencv4 libturbojpeg; }
python_headers() { "$python" -c 'import ensurepip, venv, sysconfig, os; open(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null; }

install_debian_packages() {
  local root=()
  if [ "$(id -u)" -ne 0 ]; then root=(sudo); fi
  if ! command -v apt-get >/dev/null || { [ "$(id -u)" -ne 0 ] && ! sudo -n true 2>/dev/null; }; then
    echo "setup: FFCV needs these packages, which cannot be installed from here: ${debian_packages[*]}" >&2
    echo "setup: install them and run this again; until then images are read through Pillow, which is slower" >&2
    return
  fi
  echo "setup: installing ${debian_packages[*]}"
  "${root[@]}" apt-get update -qq
  DEBIAN_FRONTEND=noninteractive "${root[@]}" apt-get install -y -qq --no-install-recommends "${debian_packages[@]}" >/dev/null
}

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
  exit 0
fi
python=${PYTHON:-python3}
if ! ffcv_libraries || ! python_headers; then install_debian_packages; fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "setup: $("$python" --version) is too old; Python 3.11 or newer is needed (PYTHON=... names one)" >&2
  exit 1
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
echo "setup: installing Python packages into .venv (a few GB with CUDA; minutes on a slow line)"
.venv/bin/python -m pip install -q --upgrade pip
.venv/bin/python -m pip install -q -c constraints.txt -e '.[dev]'
if ffcv_libraries && .venv/bin/python -m pip install -q -c constraints.txt -e '.[ffcv]'; then
  echo "$wanted" >"$stamp"
else # no stamp: once the libraries are there, the next call installs FFCV
  echo "setup: FFCV is not installed; images are read through Pillow, which is slower" >&2
fi
