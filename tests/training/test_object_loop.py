"""A run's loop on an object store, without Ray: the same bits as in a folder, also where one rank's looks lag; and what
one rank finds ends all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import object_loop_runs
import pytest
import torch.distributed as dist
from loop_runs import final_bytes, run
from run_specs import MakeSpec
from s3_gate import s3_server

from maps_ray.spec import RunSpec
from maps_ray.tracking.tracker import Tracker

TRAINING = {"max_steps": 8, "checkpoint_every": 4, "keep_checkpoints": 3}


def everything(specs: dict[str, RunSpec]) -> dict[str, Any]:
    # A key of its own for each rank, by which the gate tells them apart.
    os.environ["AWS_ACCESS_KEY_ID"] = f"rank{dist.get_rank()}"
    run(specs["folder"])
    return {**object_loop_runs.all_of_it(specs), "folder": final_bytes(specs["folder"])}


@pytest.fixture(scope="module")
def found(make_spec: MakeSpec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    from processes import in_processes

    scratch = tmp_path_factory.mktemp("scratch")
    with s3_server("runs") as (gate, _):
        # The second rank sees what the first one has written late, as on a shared folder whose look-ups are cached.
        gate.hidden_from = ("rank1",)
        specs = {
            "folder": make_spec("folder", training=TRAINING),
            "run": make_spec("run", training=TRAINING, cluster={"storage": "s3://runs/all", "scratch": scratch}),
        }
        for spec in specs.values():
            Tracker.create(spec.run_dir, uri="sqlite:///unused.db", experiment="e", run_name=spec.name, ship=False)
        yield {**in_processes(2, everything, specs), "scratch": scratch, "hidden": gate.answered["hidden"]}


def test_the_same_bits_as_in_a_folder(found: dict[str, Any]) -> None:
    assert found["first"]["status"] == "finished" and len(found["folder"]) == 3
    assert found["weights"] == found["folder"]
    assert found["checkpoints"] == ["step-00000008", "step-00000004"]


def test_a_run_goes_on_from_the_store(found: dict[str, Any]) -> None:
    assert found["second"]["start_step"] == 4 and found["again"] == found["folder"]
    assert found["cut"]["start_step"] == 4 and found["after the cut"] == found["folder"]


@pytest.mark.parametrize("what", ["unreadable", "cut underway"])
def test_what_one_rank_finds_ends_all_alike(found: dict[str, Any], what: str) -> None:
    first, second = found[what]
    assert first == second and first["status"] == "failed"
    assert (
        "cannot go on from the newest checkpoint: cannot read checkpoint s3://runs/all/run/checkpoints"
        in (first["message"])
    )
    assert "rank 1: " in first["message"] and "rank 0" not in first["message"]


def test_a_rank_whose_looks_lag_waits(found: dict[str, Any]) -> None:
    # Of each checkpoint that was restored, the first rank's facts, a few times each.
    assert found["hidden"] >= 2 * 3


def test_nothing_stays_in_scratch(found: dict[str, Any]) -> None:
    scratch: Path = found["scratch"]
    assert list((scratch / "work").iterdir()) == []
    assert not [path for path in scratch.rglob("*") if path.name.endswith((".safetensors", ".partial"))]
