"""The report of a sweep whose folder was written by hand: what it says, and what it leaves out."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest
from sweep_trials import trials

from maps_ray.spec.sweep_spec import load_sweep
from maps_ray.sweeps.command import write_report_of
from maps_ray.sweeps.folder import begin_folder
from maps_ray.sweeps.journal import Ended, Journal
from maps_ray.sweeps.plan import make_plan
from maps_ray.sweeps.record import importances, read_sweep
from maps_ray.sweeps.searchers import make_searcher
from maps_ray.sweeps.sweep_report import render, write_sweep_report
from maps_ray.tracking import Tracker

OOD = "eval/ood/action_l1"


def test_the_record_holds_means_spreads_and_the_pareto_set(written_sweep):
    record = read_sweep(written_sweep.folder)
    assert [result.status for result in record.schedules] == ["finished"] * 3 + ["stopped early"]
    best = record.ranked()[0]
    assert best.label == "DSPEL-001" and best.values[OOD].mean == pytest.approx(0.41)
    assert best.values[OOD].spread == pytest.approx(0.02 / 2**0.5)
    # Full fine-tuning is beaten in both objectives, the two orders each in one.
    assert {result.label for result in record.pareto()} == {"DSPEL-001", record.schedules[2].label}
    assert best.positions == {"dinov2": 1, "siglip": 2, "projector": 3, "language_early": 4, "language_late": 5}
    assert best.drift == {"dinov2": pytest.approx(0.6), "siglip": pytest.approx(0.3)}
    assert record.worker_hours == pytest.approx(8)
    assert [moment.minutes for moment in record.timeline] == [0, 1, 2]


def test_the_report_says_all_of_it_in_one_file(written_sweep):
    text = write_sweep_report(written_sweep.folder).read_text()
    assert "0.4100 ± 0.0141" in text and "least eval/ood/action_l1 against full fine-tuning" in text
    for heading in ("Best schedules and baselines", "Objectives and drift", "What each module does", "Ended early"):
        assert heading in text
    assert text.count("<svg") == 9 and text.count("Parallel coordinates: ") == 2
    assert f"maps-ray train --from-trial {written_sweep.folder}/DSPEL-001-s0" in text
    assert "<script" not in text and "http://" not in text.replace("http://www.w3.org", "")
    assert "stopped early" in text and "2 seeds" in text


def test_a_sweep_without_a_finished_trial_has_a_report_too(make_sweep):
    plan = make_plan(load_sweep(make_sweep()))
    begin_folder(plan, resume=False)
    # Nor has its driver come so far that it had a run in MLflow.
    text = Path(write_report_of(str(plan.folder))).read_text()
    assert "has not finished" in text and "<svg" not in text


def test_a_line_cut_by_a_kill_is_left_out(make_sweep):
    plan = make_plan(load_sweep(make_sweep()))
    begin_folder(plan, resume=False)
    journal = Journal(plan.folder)
    first, second = plan.known()[0], plan.drawn(1, plan.space.encode(plan.base.proximity))
    journal.decide(first)
    path = Path(plan.folder / "journal.jsonl")
    path.write_text(path.read_text() + '{"kind": "sched')
    journal.decide(second)
    assert Journal(plan.folder).schedules == {0: first, 1: second}


def test_the_report_as_data_and_as_a_table(written_sweep):
    data = json.loads(write_sweep_report(written_sweep.folder, "json").read_text())
    assert [s["label"] for s in data["schedules"] if s["pareto"]] == [s.label for s in _front(written_sweep)]
    assert data["schedules"][1]["values"][OOD]["mean"] == pytest.approx(0.41)
    assert data["schedules"][1]["seeds"][1][OOD] == pytest.approx(0.42)
    with write_sweep_report(written_sweep.folder, "csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["schedule"] for row in rows] == [s["label"] for s in data["schedules"]]
    assert float(rows[1][OOD]) == pytest.approx(0.41) and rows[1]["place of dinov2"] == "1"
    # Three schedules say nothing of a variance.
    assert data["importance"] == {OOD: [], "eval/held_out/action_l1": []}


def _front(plan):
    return read_sweep(plan.folder).pareto()


def test_importance_finds_what_the_objective_depends_on(make_sweep):
    """The objective is the place of DINOv2 alone, with noise between seeds."""
    plan = make_plan(load_sweep(make_sweep(seeds=2, known_strengths=[], searcher="random", num_samples=40)))
    begin_folder(plan, resume=False)
    journal, searcher = Journal(plan.folder), make_searcher(plan.spec, plan.space)
    source = random.Random(0)
    for number in range(40):
        schedule = plan.drawn(number, searcher.suggest(str(number)))
        journal.decide(schedule)
        facts = plan.resolved(schedule.proximity)
        for index, trial in enumerate(trials(plan, schedule)):
            options = {"uri": plan.tracking_uri, "experiment": "e", "run_name": trial.name, "params": facts.params()}
            Tracker.create(trial.run_dir, ship=False, **options)
            value = 0.1 * facts.positions["dinov2"] + source.uniform(0, 0.02)
            journal.end(Ended(trial.name, number, index, "finished", 6, {OOD: value}, 1.0))
    record = read_sweep(plan.folder)
    shares = importances(record, OOD)
    assert shares[0].name == "place of dinov2" and shares[0].mean > 0.5
    assert 0.3 < shares[0].low <= shares[0].high <= 1
    assert all(share.low <= share.mean <= share.high for share in shares)
    assert sum(share.mean for share in shares) == pytest.approx(1)
    text = render(record)
    for picture in ("What explains", "Parallel coordinates:", "Slices:", "Contour:"):
        assert f"{picture} {OOD}" in text
    write_sweep_report(plan.folder, "csv")
    with (plan.folder / "importance.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [share.name for share in shares] and rows[0]["objective"] == OOD
