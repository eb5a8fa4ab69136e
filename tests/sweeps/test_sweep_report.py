"""The report of a sweep whose folder was written by hand: what it says, and what it leaves out."""

from __future__ import annotations

from pathlib import Path

import pytest

from maps_ray.sweeps.folder import begin_folder
from maps_ray.sweeps.journal import Journal
from maps_ray.sweeps.plan import make_plan
from maps_ray.sweeps.record import read_sweep
from maps_ray.sweeps.report import write_sweep_report
from maps_ray.sweeps.spec import load_sweep

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
    assert text.count("<svg") == 7
    assert f"maps-ray train --from-trial {written_sweep.folder}/DSPEL-001-s0" in text
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
