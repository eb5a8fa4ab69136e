"""Who may write a run folder, and what may change when a run goes on."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from run_specs import MakeSpec

from maps_ray.spec import RunSpec, SpecError, load_spec
from maps_ray.training.inputs import fingerprint
from maps_ray.training.run_folder import at_size, claim, elastic_problems, global_batch_size, locked, write_spec


def begun(spec: RunSpec) -> RunSpec:
    """The spec, with its run begun."""
    spec.run_dir.mkdir(parents=True)
    write_spec(claim(spec, resume=False))
    return spec


def changed(spec: RunSpec, section: str, **fields: Any) -> RunSpec:
    return spec.model_copy(update={section: getattr(spec, section).model_copy(update=fields)})


def test_an_existing_folder_is_refused_with_the_remedy(make_spec: MakeSpec) -> None:
    spec = begun(make_spec())
    with pytest.raises(SpecError, match=r"name = 'run': .*exists already; continue that run with --resume, or choose"):
        claim(spec, resume=False)


def test_nothing_to_resume(make_spec: MakeSpec) -> None:
    with pytest.raises(SpecError, match=r"nothing to resume: .*start the run without --resume"):
        claim(make_spec(), resume=True)


def test_the_written_spec_is_absolute_and_reads_back(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec()
    monkeypatch.chdir(spec.cluster.storage.parent)
    relative = changed(spec, "cluster", storage=spec.cluster.storage.relative_to(spec.cluster.storage.parent))
    claimed = claim(relative, resume=False)
    claimed.run_dir.mkdir()
    assert load_spec(write_spec(claimed)) == claimed
    assert claimed.cluster.storage == spec.cluster.storage


def test_resume_shows_every_field_that_changes_the_run(make_spec: MakeSpec) -> None:
    spec = begun(make_spec())
    other = changed(changed(spec, "training", learning_rate=0.5, max_steps=9), "proximity", lambda_max=2.0)
    with pytest.raises(SpecError) as caught:
        claim(other, resume=True)
    assert {problem.field for problem in caught.value.problems} == {
        "training.learning_rate",
        "training.max_steps",
        "proximity.lambda_max",
    }
    assert "training.learning_rate = 0.5: the run was started with 0.001; " in str(caught.value)


def test_resume_allows_what_does_not_change_the_run(make_spec: MakeSpec) -> None:
    spec = begun(make_spec(training={"schedule": "constant"}))
    other = changed(spec, "training", max_steps=12, checkpoint_every=3, log_every=1, keep_checkpoints=5)
    other = changed(changed(other, "tracking", uri="http://elsewhere"), "cluster", max_failures=0)
    assert claim(other, resume=True) == other


def test_a_spec_that_was_edited_in_its_run_folder_is_held_against_the_checkpoint(make_spec: MakeSpec) -> None:
    spec = begun(make_spec())
    path, checkpoint = spec.run_dir / "spec.yaml", spec.run_dir / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    manifest = {"format": 1, "step": 4, "files": {}, "spec": load_spec(path).model_dump(mode="json")}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert claim(load_spec(path), resume=True) == load_spec(path)
    rate = f"learning_rate: {spec.training.learning_rate}"
    assert rate in path.read_text()
    path.write_text(path.read_text().replace(rate, "learning_rate: 0.5").replace("log_every: 10", "log_every: 7"))
    with pytest.raises(SpecError, match=r"^training\.learning_rate = 0\.5: the run was started with [^\n]*$"):
        claim(load_spec(path), resume=True)


@pytest.mark.parametrize(("workers", "batch", "passes"), [(1, 2, 6), (2, 2, 3), (3, 2, 2), (4, 1, 3), (6, 2, 1)])
def test_resume_on_other_workers_keeps_the_global_batch(
    make_spec: MakeSpec, workers: int, batch: int, passes: int
) -> None:
    spec = begun(make_spec(training={"gradient_accumulation": 3}))
    resumed = claim(changed(spec, "cluster", workers=workers), resume=True)
    assert (resumed.training.batch_size, resumed.training.gradient_accumulation) == (batch, passes)
    assert global_batch_size(resumed) == global_batch_size(spec) == 12


def test_workers_that_cannot_share_the_global_batch_are_refused(make_spec: MakeSpec) -> None:
    spec = begun(make_spec())
    with pytest.raises(SpecError, match=r"cluster.workers = 3: the run has 4 samples in each optimizer step"):
        claim(changed(spec, "cluster", workers=3), resume=True)


def test_two_drivers_cannot_hold_one_run(make_spec: MakeSpec) -> None:
    spec = begun(make_spec())
    refused = pytest.raises(SpecError, match="in use by another `maps-ray train`")
    with locked(spec.run_dir), refused, locked(spec.run_dir):
        pass
    with locked(spec.run_dir):
        pass


def test_a_minivla_oft_begun_before_its_mask_could_be_chosen_attends_both_ways(make_spec: MakeSpec) -> None:
    spec = make_spec()
    spec = begun(changed(spec, "model", name="minivla_oft"))
    path = spec.run_dir / "spec.yaml"
    assert claim(load_spec(path), resume=True).model.attention_mask is None
    path.write_text(path.read_text().replace("  attention_mask: null\n", ""))
    assert claim(load_spec(path), resume=True).model.attention_mask == "bidirectional"
    with pytest.raises(SpecError, match=r"model\.attention_mask = 'causal': the run was started with 'bidirectional'"):
        claim(changed(spec, "model", attention_mask="causal"), resume=True)


def moved(spec: RunSpec, to: Path) -> RunSpec:
    """The same inputs, copied to other places: new times, and files that nothing reads."""
    shutil.copytree(spec.model.checkpoint, to / "weights")
    shutil.copytree(str(spec.data.path), to / "demos")
    (to / "weights" / "README.md").write_text("edited")
    (to / "demos" / ".cache").mkdir()
    (to / "demos" / ".cache" / "listing").touch()
    os.utime(to / "weights" / "config.json", (0, 0))
    return changed(changed(spec, "model", checkpoint=to / "weights"), "data", path=str(to / "demos"))


def test_a_run_goes_on_with_the_same_content_at_other_places(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = begun(make_spec())
    other = moved(spec, tmp_path)
    assert claim(other, resume=True) == other
    # And again from there: what counts is what the run was started with.
    write_spec(other)
    assert claim(spec, resume=True) == spec


def _retrained(spec: RunSpec) -> None:
    """One number of the weights is another one: sizes and headers stay."""
    path = spec.model.checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def _reworded(spec: RunSpec) -> None:
    path = next(Path(str(spec.data.path)).glob("meta/info.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "fps": 11}))


def _episode_lost(spec: RunSpec) -> None:
    next(Path(str(spec.data.path)).glob("videos/**/*.mp4")).unlink()


@pytest.mark.parametrize(
    ("change", "field", "said"),
    [
        (_retrained, "model.checkpoint", r"1 changed \(model.safetensors\); name the same content"),
        (_reworded, "data.path", r"1 changed \(meta/info.json\)"),
        (_episode_lost, "data.path", r"1 missing \(videos/.*mp4\)"),
    ],
)
def test_other_content_is_refused_with_the_difference(
    make_spec: MakeSpec, tmp_path: Path, change: Any, field: str, said: str
) -> None:
    spec = begun(make_spec())
    other = moved(spec, tmp_path)
    change(other)
    with pytest.raises(SpecError, match=said) as caught:
        claim(other, resume=True)
    assert [problem.field for problem in caught.value.problems] == [field]


def test_a_run_from_before_fingerprints_goes_on_where_its_inputs_were(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = begun(make_spec())
    (spec.run_dir / "inputs.json").unlink()
    assert claim(spec, resume=True) == spec
    other = moved(spec, tmp_path / "copy")
    assert claim(other, resume=True) == other
    (tmp_path / "copy" / "weights" / "config.json").write_text("{}")
    with pytest.raises(SpecError, match=r"model.checkpoint = .*1 changed \(config.json\)"):
        claim(other, resume=True)


def test_billions_of_weights_are_known_in_seconds(tmp_path: Path) -> None:
    # Holes in the files: what is measured is what is read.
    for shard in range(4):
        with (tmp_path / f"model-{shard}.safetensors").open("wb") as file:
            file.write((100_000).to_bytes(8, "little"))
            file.truncate(4 << 30)
    began = time.monotonic()
    found = fingerprint(str(tmp_path))
    assert len(found) == 4 and time.monotonic() - began < 2


def test_an_elastic_run_keeps_its_global_batch_at_every_size(make_spec: MakeSpec) -> None:
    spec = make_spec(cluster={"workers": {"min": 2, "max": 6}}, training={"batch_size": 4, "gradient_accumulation": 1})
    assert global_batch_size(spec) == 24 and spec.cluster.sizes(24) == [2, 3, 4, 6] and not elastic_problems(spec)
    found = {}
    for size in spec.cluster.sizes(24):
        fixed = at_size(spec, size)
        found[size] = (fixed.training.batch_size, fixed.training.gradient_accumulation)
        assert global_batch_size(fixed) == 24 and fixed.cluster.workers == size
    # Never more in a forward pass than at the full size.
    assert found == {2: (4, 3), 3: (4, 2), 4: (3, 2), 6: (4, 1)}


def test_a_range_whose_ends_cannot_share_the_batch_is_refused(make_spec: MakeSpec) -> None:
    spec = make_spec(cluster={"workers": {"min": 5, "max": 8}}, training={"batch_size": 2})
    (problem,) = elastic_problems(spec)
    assert problem.field == "cluster.workers.min"
    assert "numbers that can: 1, 2, 4, 8, 16; or change training.batch_size" in str(problem)
    with pytest.raises(SpecError, match=r"min \(4\) must not be more than max \(2\)"):
        make_spec(cluster={"workers": {"min": 4, "max": 2}})
