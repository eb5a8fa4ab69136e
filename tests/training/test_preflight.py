"""Each thing that can be wrong with a run is named before Ray starts, in a moment and without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run_specs import MakeSpec
from safetensors.torch import load_file, save_file
from torch import Tensor

from maps_ray.spec import RunSpec, SpecError, dump
from maps_ray.training.preflight import check, strengths


def faults(spec: RunSpec) -> str:
    with pytest.raises(SpecError) as caught:
        check(spec)
    return str(caught.value)


@pytest.fixture
def own_base(base: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to spoil."""
    return Path(shutil.copytree(base, tmp_path / "own_base"))


@pytest.fixture
def own_data(demonstrations: Path, tmp_path: Path) -> Path:
    """A copy of the data set, to spoil."""
    return Path(shutil.copytree(demonstrations, tmp_path / "own_data"))


def edit_weights(base: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(base / "model.safetensors")
    edit(tensors)
    save_file(tensors, base / "model.safetensors")


def test_a_sound_spec_passes(make_spec: MakeSpec) -> None:
    check(make_spec())


def test_a_fresh_process_checks_in_five_seconds_without_torch(make_spec: MakeSpec, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(dump(make_spec()))
    code = (
        "import sys, time; from maps_ray.spec import load_spec; "
        "from maps_ray.training.preflight import check, strengths; "
        "spec = load_spec(sys.argv[1]); check(spec); strengths(spec); "
        "heavy = {'torch', 'ray', 'mlflow', 'transformers'}; print(heavy & set(sys.modules), time.process_time())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "spec.yaml")], capture_output=True, text=True, check=True
    )
    imported, seconds = done.stdout.rsplit(maxsplit=1)
    assert imported == "set()"
    # Of this process alone: what else the machine does is not measured.
    assert float(seconds) < 5


def test_strengths_follow_the_stack(make_spec: MakeSpec) -> None:
    rows = strengths(make_spec(proximity={"order": ["language", "projector", "siglip", "dinov2"]}))
    names = ["dinov2.0", "dinov2.1", "siglip.0", "siglip.1", "projector", "language.0", "language.1"]
    assert [row["module"] for row in rows] == [*names, "proprio_projector", "action_head"]
    assert [row["strength"] for row in rows] == pytest.approx([1 / 6, 0, 3 / 6, 2 / 6, 4 / 6, 1, 5 / 6, 0, 0])


def test_missing_checkpoint(make_spec: MakeSpec, tmp_path: Path) -> None:
    assert f"model.checkpoint = '{tmp_path / 'no'}': no checkpoint folder" in faults(
        make_spec(model={"checkpoint": tmp_path / "no"})
    )


def test_truncated_weights(make_spec: MakeSpec, own_base: Path) -> None:
    weights = own_base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"{weights} is truncated" in faults(make_spec(model={"checkpoint": own_base}))


def test_keys_that_do_not_fit_are_named(make_spec: MakeSpec, own_base: Path) -> None:
    edit_weights(own_base, lambda t: t.update(surplus=t.pop("projector.fc1.bias")))
    message = faults(make_spec(model={"checkpoint": own_base}))
    assert "projector.fc1.bias" in message and "surplus" in message


def test_shapes_that_do_not_fit_are_named(make_spec: MakeSpec, own_base: Path) -> None:
    edit_weights(own_base, lambda t: t.update({"projector.fc1.bias": t["projector.fc1.bias"][:-1].clone()}))
    assert "projector.fc1.bias: expected [256], found [255]" in faults(make_spec(model={"checkpoint": own_base}))


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json"])
def test_missing_processor_files(make_spec: MakeSpec, own_base: Path, name: str) -> None:
    (own_base / name).unlink()
    assert f"{own_base / name} is missing" in faults(make_spec(model={"checkpoint": own_base}))


def test_missing_data(make_spec: MakeSpec, tmp_path: Path) -> None:
    assert "no such data set folder" in faults(make_spec(data={"path": tmp_path / "no"}))


def test_a_camera_that_is_not_there(make_spec: MakeSpec) -> None:
    message = faults(make_spec(data={"cameras": ["image", "wrist_imagee"]}))
    assert "data.cameras = 'wrist_imagee'" in message and "did you mean 'wrist_image'?" in message


def test_an_empty_split(make_spec: MakeSpec) -> None:
    message = faults(make_spec(data={"splits": {"train": {"tasks": ["pick up the red bow"]}}}))
    assert "data.splits.train.tasks" in message and "'pick up the red bowl'" in message


def test_overlapping_splits(make_spec: MakeSpec) -> None:
    message = faults(make_spec(data={"splits": {"held_out": {"episodes": "1:"}}}))
    assert "data.splits.held_out" in message and "stand in data.splits.train as well" in message


def test_nan_in_the_actions(make_spec: MakeSpec, own_data: Path) -> None:
    path = next((own_data / "data").rglob("*.parquet"))
    table = pq.read_table(path)
    actions = table["action"].to_pylist()
    actions[14][3] = float("nan")
    column = pa.array(actions, table["action"].type)
    pq.write_table(table.set_column(table.schema.get_field_index("action"), "action", column), path)
    assert "action is nan in episode 1, frame 2, dimension 3" in faults(make_spec(data={"path": own_data}))


def test_a_missing_video(make_spec: MakeSpec, own_data: Path) -> None:
    video = next((own_data / "videos").rglob("*.mp4"))
    video.unlink()
    assert video.name in faults(make_spec(data={"path": own_data}))


def test_an_unknown_module(make_spec: MakeSpec) -> None:
    message = faults(make_spec(proximity={"order": ["dinov2", "siglipp", "projector", "language"]}))
    assert message.startswith("proximity.order = ") and "did you mean 'siglip'?" in message


def test_a_layer_addressed_twice(make_spec: MakeSpec) -> None:
    order = ["dinov2", "siglip", "projector", "language", "language_early"]
    assert "addresses a layer twice" in faults(make_spec(proximity={"order": order}))


def test_a_module_left_out(make_spec: MakeSpec) -> None:
    assert "order leaves out projector" in faults(make_spec(proximity={"order": ["dinov2", "siglip", "language"]}))


def test_a_module_named_twice_is_refused_by_the_spec(make_spec: MakeSpec) -> None:
    with pytest.raises(SpecError, match="module named twice: siglip"):
        make_spec(proximity={"order": ["siglip", "siglip"]})


def test_storage_below_a_file(make_spec: MakeSpec, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = faults(make_spec(cluster={"storage": tmp_path / "file" / "runs"}))
    assert message.startswith("cluster.storage = ") and "is a file, not a folder" in message


def test_storage_too_small_for_the_checkpoints(make_spec: MakeSpec) -> None:
    message = faults(make_spec(training={"keep_checkpoints": 10**9}))
    assert "GiB free" in message and "lower training.keep_checkpoints" in message


def test_storage_that_is_a_ring_of_links(make_spec: MakeSpec, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    said = faults(make_spec(cluster={"storage": str(tmp_path / "a" / "runs")}))
    assert f"cluster.storage = '{tmp_path}/a/runs': cannot be a folder: Symlink loop" in said


def test_more_workers_than_this_machine_holds(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert "cluster.workers = 999: 999 workers with 1 CPUs each, but this machine has" in faults(
        make_spec(cluster={"workers": 999})
    )
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    check(make_spec(cluster={"workers": 999}))


def test_more_gpus_than_this_machine_has(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert "cluster.gpus_per_worker = 64" in faults(make_spec(cluster={"gpus_per_worker": 64}))
    assert "NCCL takes one on each" in faults(make_spec(cluster={"workers": 2, "gpus_per_worker": 0.5}))
    assert "Ray gives whole GPUs" in faults(make_spec(cluster={"gpus_per_worker": 1.5}))


def test_a_growing_cluster_must_be_told_of_gpus(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    found = faults(make_spec(cluster={"autoscaling": True}))
    assert "cluster.gpus_per_worker = 'auto': sees only the nodes that are there" in found and "give a number" in found
    check(make_spec(cluster={"autoscaling": True, "gpus_per_worker": 0}))


@pytest.mark.parametrize("named", ["in the spec", "in the environment"])
def test_a_client_has_no_place_for_the_records_of_a_run_on_a_store(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    head = "ray://10.0.0.1:10001"
    address = head if named == "in the spec" else None
    if address is None:
        monkeypatch.setenv("RAY_ADDRESS", head)
    # Which is a folder that all nodes see, and this machine.
    check(make_spec(cluster={"address": address}))
    found = faults(make_spec(cluster={"address": address, "storage": "memory://runs/folder"}))
    assert f"cluster.address = '{head}': records" in found and "python jobs/submit.py" in found


def test_a_store_that_mlflow_refuses(make_spec: MakeSpec) -> None:
    assert "tracking.uri = 'file:/tmp/mlruns'" in faults(make_spec(tracking={"uri": "file:/tmp/mlruns"}))


def test_all_faults_are_listed_at_once(make_spec: MakeSpec) -> None:
    with pytest.raises(SpecError) as caught:
        check(make_spec(data={"cameras": ["front"]}, proximity={"order": ["dino"]}, cluster={"workers": 999}))
    fields = {problem.field for problem in caught.value.problems}
    assert {"data.cameras", "proximity.order", "cluster.workers"} <= fields


EVERYTHING = ["dinov2", "siglip", "projector", "language"]


@pytest.mark.parametrize(
    ("model", "proximity", "field"),
    [
        ({"head": "discrete", "use_proprio": False}, {"freeze": EVERYTHING}, "proximity.freeze"),
        ({"head": "discrete", "use_proprio": False, "lora": {}}, {"freeze": EVERYTHING}, "proximity.freeze"),
        (
            {"head": "discrete", "use_proprio": False, "lora": {"targets": ["q_proj"]}},
            {"freeze": ["language"]},
            "proximity.freeze",
        ),
    ],
)
def test_nothing_left_to_train(make_spec: MakeSpec, model: dict, proximity: dict, field: str) -> None:
    message = faults(make_spec(model=model, proximity=proximity))
    assert message.startswith(f"{field} = ") and "nothing is left to train" in message


def test_something_left_to_train(make_spec: MakeSpec) -> None:
    check(make_spec(proximity={"freeze": EVERYTHING}))
    check(make_spec(model={"head": "discrete", "use_proprio": False}, proximity={"freeze": EVERYTHING[:3]}))


def test_a_tokenizer_that_does_not_fit(make_spec: MakeSpec, own_base: Path) -> None:
    tokenizer = json.loads((own_base / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = tokenizer["model"]["vocab"][:300]
    (own_base / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert f"{own_base / 'tokenizer.json'} has 30" in faults(make_spec(model={"checkpoint": own_base}))


@pytest.mark.parametrize("name", ["what?", "a%20b"])
def test_storage_that_mlflow_would_write_elsewhere(make_spec: MakeSpec, tmp_path: Path, name: str) -> None:
    message = faults(make_spec(cluster={"storage": tmp_path / name}))
    assert message.startswith("cluster.storage = ") and "MLflow reads" in message
    assert not (tmp_path / name).exists()
    check(make_spec(cluster={"storage": tmp_path / name}, tracking={"uri": "http://mlflow:5000"}))


def test_a_database_that_machines_share_is_refused(make_spec: MakeSpec, tmp_path: Path) -> None:
    from maps_ray.training.cluster import shared_sqlite

    spec = make_spec()
    problem = shared_sqlite(spec, 2)
    assert problem is not None and problem.field == "tracking.uri"
    assert "which 2 machines share" in problem.message and "tracking.uri=http://HOST:5000" in problem.message
    assert shared_sqlite(spec, 1) is None
    for uri in ("http://127.0.0.1:5000", f"sqlite:///{tmp_path}/mlflow.db"):
        assert shared_sqlite(make_spec(tracking={"uri": uri}), 2) is None
    there = {"storage": "s3://bucket/runs", "scratch": tmp_path}
    assert shared_sqlite(make_spec(cluster=there), 2) is None
