#!/usr/bin/env bash
# Sets up, then runs the tests on several hosts: a real SLURM, Ray over the network. The hosts are namespaces on this
# machine, which only root can make. Installs SLURM's Debian packages if they are missing; starts no service of theirs.
# Arguments are passed to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$(id -u)" -eq 0 ] || exec sudo "$0" "$@"
export PATH=$PATH:/usr/sbin:/sbin
launch/setup.sh test

declare -A debian_packages=([slurmctld]=slurmctld [slurmd]=slurmd [sbatch]=slurm-client [munged]=munge [ip]=iproute2
  [nsenter]=util-linux [pgrep]=procps [shellcheck]=shellcheck [modulecmd]=environment-modules)
missing=()
for program in "${!debian_packages[@]}"; do
  command -v "$program" >/dev/null || missing+=("${debian_packages[$program]}")
done
if [ ${#missing[@]} -gt 0 ]; then
  echo "test_slurm: installing ${missing[*]}"
  apt-get update -qq
  # RUNLEVEL=1: the daemons of the packages are not started
  RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
unset PYTHONDONTWRITEBYTECODE # the package is compiled once, not in each of the Pythons that the tests start
exec .venv/bin/python -m pytest -m "slurm and not slow" "${@:-tests/slurm}"
