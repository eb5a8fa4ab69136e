#!/usr/bin/env bash
# Starts a Ray head on this machine, in the background, with token authentication on.
#
#   cluster/local/head.sh [options of `ray start`, for instance --num-cpus=2]
#
# Environment, with defaults:
#   HEAD_PORT=6379              port of the cluster's control service (GCS)
#   HEAD_DASHBOARD_PORT=8265    port of the dashboard and of the Jobs API, on 127.0.0.1
#   HEAD_CLIENT_PORT=10001      port of the Ray client server; outside 10002-19999, which workers use
#   HEAD_IP=                    address under which other nodes reach this one; Ray finds it when unset
#   HEAD_STATE=~/.maps_ray/head-$HEAD_PORT   folder of head.pid and head.log
#   HEAD_TEMP=/tmp/maps_ray-$UID-$HEAD_PORT  Ray's session folder; short, for socket paths end at 107 bytes
#   RAY_AUTH_TOKEN_PATH=~/.maps_ray/auth_token   the token; made when missing, mode 0600
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

port=${HEAD_PORT:-6379}
dashboard_port=${HEAD_DASHBOARD_PORT:-8265}
client_port=${HEAD_CLIENT_PORT:-10001}
state=${HEAD_STATE:-$HOME/.maps_ray/head-$port}
temp=${HEAD_TEMP:-/tmp/maps_ray-$UID-$port}
token_path=${RAY_AUTH_TOKEN_PATH:-$HOME/.maps_ray/auth_token}
start_seconds=90

[ -z "${RAY_AUTH_TOKEN:-}" ] || die "RAY_AUTH_TOKEN is set and would win over the file $token_path: unset it"
[ "${#temp}" -le 40 ] || die "HEAD_TEMP=$temp is longer than 40 characters: Ray's socket paths would not fit"
ray=$(program ray)
python=$(program python)
require_free_port 127.0.0.1 "$port" HEAD_PORT
require_free_port 127.0.0.1 "$dashboard_port" HEAD_DASHBOARD_PORT
require_free_port 127.0.0.1 "$client_port" HEAD_CLIENT_PORT

private_folder "$state"
private_folder "$temp"
mkdir -p "$(dirname "$token_path")"
if [ ! -s "$token_path" ]; then
    (umask 077 && "$python" -c 'import secrets; print(secrets.token_hex(32), end="")' >"$token_path")
fi
chmod 600 "$token_path"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token_path
# The entrypoint of a job is a shell command: `python` must be the one that has Ray.
PATH=$(dirname "$ray"):$PATH
# The driver of a job must find this head, not another cluster of the shell that started it.
unset RAY_ADDRESS
# One machine has no other node that work could be drained to.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0

# The head and all that it starts form one process group, which one signal stops. `ray stop` would end every Ray
# process of the user, other clusters' too.
# Port 0 takes a free one for the dashboard's agent, whose own is the same in every cluster.
set -m
nohup "$ray" start --head --block --disable-usage-stats \
    ${HEAD_IP:+--node-ip-address="$HEAD_IP"} --port="$port" --ray-client-server-port="$client_port" \
    --dashboard-host=127.0.0.1 --dashboard-port="$dashboard_port" --dashboard-agent-listen-port=0 \
    --temp-dir="$temp" "$@" >"$state/head.log" 2>&1 </dev/null &
pid=$!
set +m
printf '%s\n' "$pid" >"$state/head.pid"

ready() {
    "$python" - "http://127.0.0.1:$dashboard_port/api/jobs/" "$token_path" <<'PYTHON'
import sys
import urllib.request

url, token_path = sys.argv[1:]
with open(token_path) as file:
    headers = {"Authorization": f"Bearer {file.read().strip()}"}
try:
    urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5)
except OSError:
    sys.exit(1)
PYTHON
}

deadline=$((SECONDS + start_seconds))
until ready; do
    if ! kill -0 "$pid" 2>/dev/null; then
        tail -n 20 "$state/head.log" >&2
        die "the head ended while it started; its log is $state/head.log"
    fi
    if [ "$SECONDS" -ge "$deadline" ]; then
        kill -- "-$pid"
        die "no Jobs API on port $dashboard_port after $start_seconds s; the log is $state/head.log"
    fi
    sleep 0.5
done

cat <<TEXT
Ray head runs: pid $pid, log $state/head.log
dashboard: http://127.0.0.1:$dashboard_port (asks for the token in $token_path)

In this or another shell of this user:
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token_path
  ray job submit --address http://127.0.0.1:$dashboard_port --working-dir . -- python jobs/train.py jobs/tiny.yaml

Stop it:
  kill -- -$pid
TEXT
