"""The report of a sweep whose folder was written by hand: what it says, and what it leaves out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from maps_ray.sweeps.folder import begin_folder
from maps_ray.sweeps.journal import Ended, Journal
from maps_ray.sweeps.plan import Plan, make_plan
from maps_ray.sweeps.record import read_sweep
from maps_ray.sweeps.report import write_sweep_report
from maps_ray.sweeps.spec import load_sweep
from maps_ray.tracking import Tracker

OOD, HELD_OUT = "eval/ood/action_l1", "eval/held_out/action_l1"


@pytest.fixture
def swept(make_sweep) -> Plan:
    """Three orders with two seeds each and a baseline; the third order was stopped early."""
    fields = {"objectives": [OOD, HELD_OUT], "seeds": 2, "baselines": ["full_fine_tuning"], "known_strengths": []}
    plan = make_plan(load_sweep(make_sweep(**fields)))
    begin_folder(plan, resume=False)
    journal = Journal(plan.folder)
    Tracker.create(plan.folder, uri=plan.tracking_uri, experiment="e", run_name="swept", ship=False).finish(
        "FINISHED", 0
    )
    schedules = plan.known()
    for place, keys in enumerate([(0.1, 0.2, 0.3, 0.4), (0.4, 0.3, 0.2, 0.1), (0.3, 0.1, 0.2, 0.4)]):
        names = [dimension.name for dimension in plan.space.dimensions]
        point = dict(zip(names, (*keys, 1.0 + place), strict=True))
        schedules.append(plan.searched(len(schedules), point))
    values = [(0.50, 0.30), (0.40, 0.34), (0.45, 0.25), (0.60, 0.60)]
    for schedule, (ood, held_out) in zip(schedules, values, strict=True):
        journal.decide(schedule)
        for index, trial in enumerate(plan.trials(schedule)):
            tracker = Tracker.create(
                trial.run_dir,
                uri=plan.tracking_uri,
                experiment="e",
                run_name=trial.name,
                params=plan.facts(schedule.proximity).params(),
                parent=plan.folder,
            )
            tracker.metrics(6, {"drift/dinov2": 0.1 + index, "drift/siglip": 0.3})
            tracker.finish("FINISHED", 0)
            found = {OOD: ood + 0.02 * index, HELD_OUT: held_out}
            status = "stopped early" if ood == 0.60 else "finished"
            journal.end(Ended(trial.name, schedule.number, index, status, 6, found, 3600.0))
    lines = [{"time": t, "nodes": n, "running": n - 1, "pending": 2} for t, n in ((0, 1), (60, 3), (120, 1))]
    (plan.folder / "timeline.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return plan


def test_the_record_holds_means_spreads_and_the_pareto_set(swept):
    record = read_sweep(swept.folder)
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


def test_the_report_says_all_of_it_in_one_file(swept):
    text = write_sweep_report(swept.folder).read_text()
    assert "0.4100 ± 0.0141" in text and "least eval/ood/action_l1 against full fine-tuning" in text
    for heading in ("Best schedules and baselines", "Objectives and drift", "What each module does", "Ended early"):
        assert heading in text
    assert text.count("<svg") == 7
    assert f"maps-ray train --from-trial {swept.folder}/DSPEL-001-s0" in text
    assert "<script" not in text and "http://" not in text.replace("http://www.w3.org", "")
    assert "stopped early" in text and "2 seeds" in text


def test_a_sweep_without_a_finished_trial_has_a_report_too(make_sweep):
    plan = make_plan(load_sweep(make_sweep()))
    begin_folder(plan, resume=False)
    text = write_sweep_report(plan.folder).read_text()
    assert "has not finished" in text and "<svg" not in text


def test_a_line_cut_by_a_kill_is_left_out(make_sweep):
    plan = make_plan(load_sweep(make_sweep()))
    begin_folder(plan, resume=False)
    journal = Journal(plan.folder)
    first, second = plan.known()[0], plan.searched(1, plan.space.encode(plan.base.proximity))
    journal.decide(first)
    path = Path(plan.folder / "journal.jsonl")
    path.write_text(path.read_text() + '{"kind": "sched')
    journal.decide(second)
    assert Journal(plan.folder).schedules == {0: first, 1: second}
