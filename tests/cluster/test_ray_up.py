"""The files for `ray up` and the local autoscaling cluster, checked by Ray's validators; no provider is called."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

FOLDER = Path(__file__).parents[2] / "cluster"
FILES = ["aws.yaml", "onpremise.yaml", "local/autoscaling.yaml"]


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())


def check(config: dict[str, Any]) -> dict[str, Any]:
    prepared = prepare_config(config)
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_the_file(name: str) -> None:
    prepared = check(load(name))
    head = prepared["head_node_type"]
    workers = {kind: spec for kind, spec in prepared["available_node_types"].items() if kind != head}
    if name == "onpremise.yaml":
        # The local provider has one node type for head and workers.
        workers = prepared["available_node_types"]
    assert all(spec["min_workers"] == 0 < spec["max_workers"] for spec in workers.values())


@pytest.mark.parametrize("name", ["aws.yaml", "onpremise.yaml"])
def test_the_cluster_asks_for_the_token_and_its_dashboard_stays_local(name: str) -> None:
    config = load(name)
    head = config["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in head
    for command in (head, config["worker_start_ray_commands"][-1]):
        assert "RAY_AUTH_MODE=token" in command
        assert re.search(r"RAY_AUTH_TOKEN_PATH=\S+auth_token", command)


def test_aws_workers_are_spot_instances_and_the_head_is_not() -> None:
    types = load("aws.yaml")["available_node_types"]
    assert types["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in types["head"]["node_config"]
    assert types["head"]["resources"] == {"CPU": 0}


def _unknown_top_level(config: dict[str, Any]) -> None:
    config["max_worker"] = 3


def _unknown_auth(config: dict[str, Any]) -> None:
    config["auth"] = {**config["auth"], "ssh_users": "ubuntu"}


def _no_head_type(config: dict[str, Any]) -> None:
    config["head_node_type"] = "nothing"


def _unknown_node_field(config: dict[str, Any]) -> None:
    config["available_node_types"]["gpu"]["max_worker"] = 2


def _more_minimum_than_maximum(config: dict[str, Any]) -> None:
    config["available_node_types"]["gpu"]["min_workers"] = 9


def _text_for_a_number(config: dict[str, Any]) -> None:
    config["idle_timeout_minutes"] = "five"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_unknown_top_level, "'max_worker' was unexpected"),
        (_unknown_auth, "'ssh_users' was unexpected"),
        (_no_head_type, "head_node_type"),
        (_unknown_node_field, "'max_worker' was unexpected"),
        (_more_minimum_than_maximum, "max_workers"),
        (_text_for_a_number, "'five' is not of type"),
    ],
)
def test_a_damaged_aws_file_is_refused(damage: Any, message: str) -> None:
    config = load("aws.yaml")
    damage(config)
    with pytest.raises(Exception, match=message):
        check(config)


def test_an_onpremise_file_without_addresses_is_refused() -> None:
    config = load("onpremise.yaml")
    del config["provider"]["worker_ips"]
    with pytest.raises(Exception, match="worker_ips"):
        check(config)
