"""Merged weights as points of a sweep: over a finished run, or over the sweep's own best schedules."""

from __future__ import annotations

import itertools
import shutil

import pytest
from s3_gate import s3_server
from safetensors.torch import load_file, save_file

from maps_ray.evaluation.rollouts.checkpoint import fingerprint
from maps_ray.files import write_json
from maps_ray.metrics import SAMPLES_PER_SECOND
from maps_ray.run_storage import RunStorage
from maps_ray.spec import SpecError, dump
from maps_ray.spec.sweep_spec import load_sweep
from maps_ray.sweeps.command import spec_of_trial
from maps_ray.sweeps.dry_run import first_schedules, plan_lines
from maps_ray.sweeps.folder import Sweep, begin_folder, source_run
from maps_ray.sweeps.journal import Ended
from maps_ray.sweeps.plan import make_plan
from maps_ray.sweeps.record import read_sweep
from maps_ray.sweeps.search import SweepSearch
from maps_ray.sweeps.sweep_report import as_data, render
from maps_ray.tracking import Tracker
from maps_ray.training.run_folder import EvaluationRecord

OOD = "eval/ood/action_l1"
WEIGHTS = {"dinov2": {"low": 0, "high": 1}, "language": {"values": [0, 0.5, 1]}}


@pytest.fixture
def finished(make_spec, base):
    """The folder of a finished run, as far as a plan looks at it."""
    spec = make_spec("trained")
    shutil.copytree(base, spec.run_dir / "final")
    (spec.run_dir / "spec.yaml").write_text(dump(spec))
    write_json(spec.run_dir / "base.json", {"checkpoint": str(base), "fingerprint": fingerprint(base)})
    return spec.run_dir


def end(plan, search, trial_id, config, value):
    """A trial ends as the callback and Tune record it."""
    name, source = config["trial"]["name"], config["trial"]["source"]
    run_dir = plan.folder / "trials" / name
    journal = search._sweep.journal
    schedule = next(s for s in journal.schedules.values() if name in plan.names(s))
    params = plan.resolved(schedule.proximity).params()
    Tracker.create(run_dir, uri=plan.tracking_uri, experiment="e", run_name=name, params=params, ship=False)
    EvaluationRecord(run_dir).add(6, {"ood": {"action_l1": value}})
    journal.end(Ended(name, schedule.number, 0, "finished", 6, {OOD: value}, 1.0))
    search.on_trial_complete(trial_id, {"status": "finished", "step": 6})
    return source


def begun(plan):
    return SweepSearch(begin_folder(plan, resume=False))


@pytest.mark.parametrize("searcher", ["random", "optuna"])
def test_a_finished_run_is_merged_and_nothing_trained(make_sweep, finished, searcher):
    merge = {"run": str(finished), "weights": WEIGHTS, "num_samples": 3}
    fields = {"space": [], "num_samples": None, "seeds": 2, "baselines": ["freeze_siglip"], "searcher": searcher}
    plan = make_plan(load_sweep(make_sweep(merge=merge, **fields)))
    assert [schedule.source for schedule in first_schedules(plan)] == ["baseline", "merged"]
    assert f"merge: 3 points of dinov2, language, of {finished}: evaluated, not trained" in plan_lines(plan)
    search, configs = begun(plan), []
    while isinstance(config := search.suggest(str(len(configs))), dict):
        configs.append(config)
    assert config is None and config != search.FINISHED
    # A baseline with both seeds, the run as it is, and three points of one trial each.
    sources = [c["trial"]["source"] for c in configs]
    assert sources == ["baseline", "baseline", *["merged"] * 4]
    unmerged, *merges = [c["trial"]["proximity"]["merge"] for c in configs[2:]]
    assert unmerged == {"run": str(finished), "weights": {"dinov2": 1.0, "language": 1.0}}
    for merged in merges:
        assert 0 <= merged["weights"]["dinov2"] <= 1 and merged["weights"]["language"] in (0, 0.5, 1)
    assert [c["trial"]["name"] for c in configs[2:]] == [f"merged-{number:03d}" for number in range(1, 5)]
    for number, config in enumerate(configs):
        end(plan, search, str(number), config, 0.5 - 0.01 * number)
    assert search.suggest("more") == search.FINISHED
    record = read_sweep(plan.folder)
    assert record.ranked()[0].label == "merged-004" and record.tried() == []
    text = render(record)
    assert "trained merged: " in text and f"maps-ray merge {finished} --weights dinov2=" in text
    assert as_data(record)["schedules"][1]["proximity"]["merge"]["run"] == str(finished)
    with pytest.raises(SpecError, match=r"is merged, not trained: maps-ray merge .*/trained --weights dinov2="):
        spec_of_trial(f"{plan.folder}/merged-004")


def test_the_best_schedules_are_merged_when_all_have_ended(make_sweep):
    lines = {"first": {"values": [0.2]}, "last": {"values": [0.8, 1.0]}}
    merge = {"best": 2, "lines": lines, "num_samples": 4}
    plan = make_plan(load_sweep(make_sweep(merge=merge, num_samples=3, baselines=["full_fine_tuning"])))
    search = begun(plan)
    configs = [search.suggest(str(number)) for number in range(4)]
    assert search.suggest("early") is None
    # A baseline is never merged, however good.
    values = {config["trial"]["name"]: value for config, value in zip(configs, (0.4, 0.1, 0.3, 0.2), strict=True)}
    for number, config in enumerate(configs):
        assert search.suggest("early") is None
        end(plan, search, str(number), config, values[config["trial"]["name"]])
    best = [name for name in sorted(values, key=lambda name: values[name]) if name != "full_fine_tuning"][:2]
    found = {}
    # A driver that is lost in the middle goes on with the same merges.
    ids = map(str, itertools.count(100))
    for part in range(2):
        while len(found) < 2 + 2 * part and isinstance(config := search.suggest(next(ids)), dict):
            if config["trial"]["source"] == "merged":
                found[config["trial"]["name"]] = config["trial"]["proximity"]["merge"]
        search = SweepSearch(Sweep(plan))
        for _ in values:
            assert search.suggest(next(ids))["trial"]["name"] in values
    assert {merged["of"] for merged in found.values()} == set(best) and len(found) == 4
    assert sorted((merged["of"], *merged["lines"]) for merged in found.values()) == [
        (name, 0.2, last) for name in sorted(best) for last in (0.8, 1.0)
    ]


@pytest.mark.parametrize(
    ("merge", "fields", "message"),
    [
        ({"weights": {"dinov2": {"low": 0, "high": 1.5}}}, {}, r"weights.dinov2: must be in \[0, 1\].*found 1.5"),
        ({"weights": {"dinov2": {"values": [0.5, 2]}}}, {}, r"weights.dinov2: must be in \[0, 1\].*found 2"),
        ({"weights": {"dinov2": {"values": [-0.5]}}}, {}, r"merge.weights.dinov2.values.* = -0.5"),
        ({"lines": {"first": {"values": [0]}, "last": {"low": 0, "high": 3}}}, {}, r"lines.last: must be in \[0, 1\]"),
        ({"weights": {"dinov": {"values": [0.5]}}}, {}, r"merge.weights = .*did you mean 'dinov2'"),
        ({"weights": {"language": {"values": [1]}, "language_late": {"values": [1]}}}, {}, "both hold"),
        ({}, {}, "give either weights or lines"),
        ({"weights": {"dinov2": {"values": [1]}}, "run": "gone"}, {"space": [], "num_samples": None}, "no folder of a"),
        ({"weights": {"dinov2": {"values": [1]}}, "run": "gone"}, {}, "space and merge.run: give one"),
        ({"weights": {"dinov2": {"values": [1]}}}, {"space": [], "num_samples": None}, "give space, or merge.run"),
        ({"weights": {"dinov2": {"low": 0, "high": 1}}}, {"searcher": "grid"}, "dinov2: a grid needs `values`"),
        ({"weights": {"dinov2": {"low": 0, "high": 1}}, "num_samples": None}, {}, "give merge.num_samples"),
    ],
)
def test_merges_that_cannot_be(make_sweep, merge, fields, message):
    with pytest.raises(SpecError, match=message):
        make_plan(load_sweep(make_sweep(merge={"num_samples": 2, **merge}, **fields)))


def test_a_run_of_another_base_or_one_that_has_not_finished(make_sweep, finished, base, tmp_path):
    merge = {"run": str(finished), "weights": {"dinov2": {"values": [0.5]}}, "num_samples": 1}
    fields = {"space": [], "num_samples": None, "merge": merge}
    other = shutil.copytree(base, tmp_path / "other")
    changed = load_file(other / "model.safetensors")
    changed["projector.fc1.bias"] += 1
    save_file(changed, other / "model.safetensors")
    with pytest.raises(
        SpecError, match=r"base: model.checkpoint = .*/other': not the base that .*/trained started from"
    ):
        make_plan(load_sweep(make_sweep(overrides=[f"model.checkpoint={other}"], **fields)))
    (finished / "final" / "config.json").unlink()
    with pytest.raises(SpecError, match=r"merge.run = .*/trained': the run has not finished"):
        make_plan(load_sweep(make_sweep(**fields)))


def test_a_run_on_an_object_store(make_sweep, finished, monkeypatch, tmp_path):
    monkeypatch.setenv("MAPS_RAY_SCRATCH", str(tmp_path / "scratch"))
    tracker = Tracker.create(finished, uri=f"sqlite:///{tmp_path}/a.db", experiment="e", run_name="trained", ship=False)
    tracker.metrics(1, {SAMPLES_PER_SECOND: 4.0})
    merge = {"run": "s3://runs/trained", "weights": {"dinov2": {"values": [0.5]}}, "num_samples": 1}
    fields = {"space": [], "num_samples": None, "merge": merge, "measured_run": "s3://runs/trained"}
    with s3_server("runs"):
        with pytest.raises(
            SpecError, match=r"merge.run = 's3://runs/trained': nothing is there: no object begins with"
        ):
            make_plan(load_sweep(make_sweep(**fields)))
        RunStorage("s3://runs").upload_folder(finished, "trained")
        plan = make_plan(load_sweep(make_sweep(**fields)))
        assert "merge: 1 points of dinov2, of s3://runs/trained: evaluated, not trained" in plan_lines(plan)
        (as_it_is,) = plan.known()
        assert as_it_is.proximity["merge"]["run"] == "s3://runs/trained"
        begin_folder(plan, resume=False)
        run, how = source_run(plan.folder, "merged-000", as_it_is.proximity["merge"])
        assert run == "s3://runs/trained" and how == {"weights": {"dinov2": 1.0}}
        assert plan.seconds_per_step() == pytest.approx(2 / 4.0)
        # Nothing of this is what the weights are needed for.
        assert not list((tmp_path / "scratch").rglob("*.safetensors"))
        RunStorage("s3://runs/trained").remove("final/config.json")
        with pytest.raises(SpecError, match=r"merge.run = 's3://runs/trained': the run has not finished"):
            make_plan(load_sweep(make_sweep(**fields)))
