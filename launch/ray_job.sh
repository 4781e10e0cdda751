#!/usr/bin/env bash
# Runs a spice-dist command as a job on a running Ray cluster and follows it to its end, with the job's exit code:
#   launch/ray_job.sh fit /shared/photos --clusters 12 --out /shared/runs/photos --workers 2:8
# Paths are those of the cluster's nodes. Ctrl-C stops only the following; `ray job stop ID` lets the run save and end.
#
#   RAY_API_SERVER_ADDRESS  the dashboard of the cluster (http://127.0.0.1:8265); it listens on the head's loopback, so
#                           from elsewhere: ssh -N -L 8265:127.0.0.1:8265 HEAD
#   RAY_AUTH_TOKEN_PATH     the file with the cluster's token, of mode 0600 (~/.ray/auth_token)
#   RAY                     the command ray here (.venv/bin/ray of this checkout)
#   SPICE_DIST              the command spice-dist there (spice-dist)
#   --insecure              as the first argument: go on though the cluster asks for no token
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
ray=${RAY:-$here/.venv/bin/ray}
address=${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}
token=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
fail() { echo "ray_job: $*" >&2; exit 1; }

insecure=()
if [ "${1:-}" = --insecure ]; then insecure=(--insecure); shift; fi
[ $# -gt 0 ] || fail "usage: launch/ray_job.sh [--insecure] fit DATA --out RUN ..."
read -ra program <<<"${SPICE_DIST:-spice-dist}"

# how the cluster answers somebody without a token: 200 is an open one, 401 and 403 are not
code=$(curl -s -o /dev/null -m 20 -w '%{http_code}' "$address/api/jobs/" || true)
case $code in
  200)
    [ ${#insecure[@]} -gt 0 ] || fail "the cluster at $address asks for no token: whoever reaches it runs code on it;" \
      "start it with RAY_AUTH_MODE=token, or give --insecure as the first argument"
    export RAY_AUTH_MODE=disabled
    ;;
  401 | 403)
    if [ -z "${RAY_AUTH_TOKEN:-}" ]; then
      [ -f "$token" ] || fail "no token in $token: copy the cluster's there (mode 0600), or name it in RAY_AUTH_TOKEN_PATH"
      [ -z "$(find -L "$token" -perm /077)" ] || fail "others can read the token in $token: chmod 600 $token"
    fi
    export RAY_AUTH_MODE=token
    ;;
  *) fail "no Ray dashboard answers at $address ($code); from elsewhere: ssh -N -L 8265:127.0.0.1:8265 HEAD" ;;
esac

case $1 in
  fit | pack | doctor | tune) cluster=(--address auto "${insecure[@]}") ;; # the only commands that use workers
  *) cluster=() ;;
esac
exec "$ray" job submit --address "$address" -- "${program[@]}" "$@" "${cluster[@]}"
