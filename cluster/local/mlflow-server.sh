#!/usr/bin/env bash
# Runs an MLflow tracking server in the foreground; Ctrl-C or SIGTERM stops it.
#
#   cluster/local/mlflow-server.sh [options of `mlflow server`]
#
# Environment, with defaults; the names starting with MLFLOW_ are MLflow's own, but for MLFLOW_STATE:
#   MLFLOW_HOST=127.0.0.1
#   MLFLOW_PORT=5000
#   MLFLOW_STATE=~/.maps_ray/mlflow          folder of the two defaults below
#   MLFLOW_BACKEND_STORE_URI=sqlite:///$MLFLOW_STATE/mlflow.db
#       Postgres: postgresql://user@host:5432/database with the password in PGPASSWORD or ~/.pgpass, not in the URI
#   MLFLOW_ARTIFACTS_DESTINATION=$MLFLOW_STATE/artifacts     a folder, or s3://bucket/path
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

host=${MLFLOW_HOST:-127.0.0.1}
port=${MLFLOW_PORT:-5000}
state=${MLFLOW_STATE:-$HOME/.maps_ray/mlflow}
mlflow=$(program mlflow)
python=$(program python)

require_free_port "$host" "$port" MLFLOW_PORT
mkdir -p "$state"
state=$(cd "$state" && pwd)
# MLflow reads both from the environment; on the command line every user of the machine could read them.
export MLFLOW_BACKEND_STORE_URI=${MLFLOW_BACKEND_STORE_URI:-sqlite:///$state/mlflow.db}
export MLFLOW_ARTIFACTS_DESTINATION=${MLFLOW_ARTIFACTS_DESTINATION:-$state/artifacts}
# MLflow's job workers serve its language-model features; nothing here uses them.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false

case $MLFLOW_BACKEND_STORE_URI in
    postgres*)
        "$python" -c 'import psycopg' 2>/dev/null ||
            die "a Postgres database needs the driver psycopg: pip install 'maps_ray[postgres]'"
        ;;
esac
case $host in
    127.* | localhost) ;;
    *) echo "mlflow-server.sh: $host:$port is open to the network without a password; see docs/cluster.md" >&2 ;;
esac

exec "$mlflow" server --host "$host" --port "$port" --workers 1 "$@"
