"""Who may write a run folder, and what may change when a run goes on."""

from __future__ import annotations

from typing import Any

import pytest
from run_specs import MakeSpec

from maps_ray.spec import RunSpec, SpecError, load_spec
from maps_ray.training.run_folder import claim, global_batch_size, locked, write_spec


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
