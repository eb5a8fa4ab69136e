#!/usr/bin/env bash
# Starts a Ray head on this machine whose autoscaler adds and removes nodes, all of them processes of this machine.
#
#   cluster/local/autoscaling.sh
#
# Environment: that of head.sh, and
#   AUTOSCALING_CONFIG=cluster/local/autoscaling.yaml   node types and limits
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

config=${AUTOSCALING_CONFIG:-$ROOT/cluster/local/autoscaling.yaml}
port=${HEAD_PORT:-6379}
state=${HEAD_STATE:-$HOME/.maps_ray/head-$port}
python=$(program python)

[ -r "$config" ] || die "AUTOSCALING_CONFIG=$config cannot be read"
private_folder "$state"
# The autoscaler reads the file again and again: it must stay where it is while the head lives.
resolved=$state/autoscaling.yaml
settings=$("$python" - "$config" "$resolved" "$port" <<'PYTHON'
import sys

import yaml
from ray._private.services import get_node_ip_address
from ray.autoscaler._private.util import prepare_config, validate_config

source, resolved, port = sys.argv[1:]
with open(source) as file:
    config = yaml.safe_load(file)
config["provider"]["gcs_address"] = f"{get_node_ip_address()}:{port}"
try:
    validate_config(prepare_config(config))
except Exception as error:
    sys.exit(f"{source}: {type(error).__name__}: {getattr(error, 'message', error)}")
with open(resolved, "w") as file:
    yaml.safe_dump(config, file)
head = config["available_node_types"][config["head_node_type"]]
print(config["provider"]["head_node_id"], head["resources"]["CPU"])
PYTHON
)
read -r head_id cpus <<<"$settings"

# Without the first the provider refuses to start; the ids tell autoscaler v2 which node is the head.
export RAY_FAKE_CLUSTER=1 RAY_enable_autoscaler_v2=1
export RAY_CLOUD_INSTANCE_ID=$head_id RAY_OVERRIDE_NODE_ID_FOR_TESTING=$head_id
export AUTOSCALER_UPDATE_INTERVAL_S=1

HEAD_STATE=$state exec "$ROOT/cluster/local/head.sh" --autoscaling-config="$resolved" --num-cpus="$cpus" "$@"
