"""The evidence's statistics against simulations and hand calculations, and its report over made-up results."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import t

from maps_ray.evaluation.simulators import SUITES as SIMULATED
from maps_ray.exit_codes import STOPPED
from maps_ray.spec import load_spec
from maps_ray.spec.sweep_spec import load_sweep

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import evidence  # noqa: E402
import evidence_report  # noqa: E402
from evidence_analysis import Stratum, compare, holm, paired, planned_error, smallest_difference  # noqa: E402
from evidence_measures import EPISODES, SUITES, Made, count_as_failed  # noqa: E402

ARMS = [f"arm {number}" for number in range(8)]


def _draw(random: np.random.Generator, shift: float, seeds: int = 5, strata: int = 8, states: int = 6) -> list[Stratum]:
    """Successes of eight arms, of which the second is better by `shift`."""
    seed, inside = random.normal(0, 0.06, (1, seeds, 1)), random.normal(0, 0.06, (len(ARMS), seeds, 1))
    found = []
    for _ in range(strata):
        chance = 0.5 + seed + inside + random.normal(0, 0.15, (1, 1, states))
        chance = chance + random.normal(0, 0.1, (len(ARMS), 1, states))
        chance[1] += shift
        successes = random.random(chance.shape) < np.clip(chance, 0, 1)
        found.append(Stratum(1 / strata, successes.astype(np.float64)))
    return found


def test_without_a_difference_five_in_a_hundred_comparisons_are_told_apart_and_tables_no_oftener() -> None:
    found = [compare(ARMS, ARMS[0], _draw(np.random.default_rng(seed), 0.0)) for seed in range(100)]
    singles = np.array([[one.p_value < 0.05 for one in comparison.differences] for comparison in found])
    tables = np.array([any(one.told_apart for one in comparison.differences) for comparison in found])
    assert 0.02 < singles.mean() < 0.085
    assert tables.mean() < 0.1


def test_a_difference_of_the_size_that_the_power_names_is_found_about_so_often() -> None:
    quiet = [compare(ARMS, ARMS[0], _draw(np.random.default_rng(seed), 0.0)) for seed in range(30)]
    shift = float(np.mean([comparison.smallest_alone for comparison in quiet]))
    found = [compare(ARMS, ARMS[0], _draw(np.random.default_rng(1000 + seed), shift)) for seed in range(100)]
    first = [comparison.differences[0] for comparison in found]
    assert np.mean([one.mean for one in first]) == pytest.approx(shift, abs=0.02)
    assert np.mean([one.p_value < 0.05 for one in first]) == pytest.approx(0.8, abs=0.12)
    # The standard error says how much the difference really scatters.
    assert np.std([one.mean for one in first]) == pytest.approx(np.mean([one.error for one in first]), rel=0.2)
    assert np.mean([one.interval[0] < shift < one.interval[1] for one in first]) > 0.9


def test_with_equal_states_the_error_is_that_of_a_repeated_measures_analysis() -> None:
    """Where every state behaves alike, what is left is an analysis of arms and seeds: a paired t-test of two arms."""
    rows = np.random.default_rng(0).random((2, 5))
    stratum = Stratum(1.0, np.repeat(rows[:, :, None], 4, axis=2))
    (found,) = compare(["control", "other"], "control", [stratum]).differences
    shifts = rows[1] - rows[0]
    error = shifts.std(ddof=1) / np.sqrt(5)
    assert (found.mean, found.error, found.degrees) == (pytest.approx(shifts.mean()), pytest.approx(error), 4)
    assert found.p_value == pytest.approx(2 * t.sf(abs(shifts.mean() / error), 4))


def test_holm_is_the_published_procedure() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_the_planned_power_is_what_the_plan_says() -> None:
    registered = (ROOT / "docs" / "evidence-plan.md").read_text(encoding="utf-8")
    for episodes, error, alone, corrected in ((40, 6.3, 18, 24), (135, 4.7, 13, 18)):
        planned = planned_error(0.06, 0.5, episodes, 5)
        assert round(100 * planned, 1) == error
        assert [round(100 * smallest_difference(planned, 56, count)) for count in (1, 14)] == [alone, corrected]
    assert "ID 18 points alone and 24 at Holm's" in registered and "OOD 13 and 18" in registered


def test_what_cannot_be_compared_is_refused() -> None:
    one = Stratum(1.0, np.ones((2, 1, 3)))
    with pytest.raises(ValueError, match="2 arms with 1 seeds"):
        compare(["a", "b"], "a", [one])
    with pytest.raises(ValueError, match="add up to 1"):
        compare(["a", "b"], "a", [Stratum(0.5, np.ones((2, 2, 3)))])
    same = compare(["a", "b"], "a", [Stratum(1.0, np.ones((2, 2, 3)))]).differences[0]
    assert same.p_value == 1 and not same.told_apart


def test_paired_numbers() -> None:
    found = paired({"a": [1.0, 2.0, 3.0], "b": [2.0, 3.0, 4.0]}, "a")
    assert found == {"a": (0.0, 0.0, 0.0), "b": (1.0, 1.0, 1.0)}


def _result(arm: str, seed: int, rate: float) -> dict[str, Any]:
    random = np.random.default_rng([seed, len(arm)])
    success = {
        suite: [
            [task, 1000 + state, bool(random.random() < rate)]
            for task in range(3 if suite.endswith("_task") else 4)
            for state in range(EPISODES[suite])
        ]
        for suite in SUITES
    }
    return {
        "arm": arm,
        "seed": seed,
        "success": success,
        "grounding": {"answer_loss": 4 + random.random(), "naming": 0.5, "pointing": 0.4},
        "drift": {"dinov2": 0.1, "language": 0.2},
        "offline": {} if arm in ("wise_ft", "lines") else dict.fromkeys(SUITES, 0.2),
    }


def _write(folder: Path, seeds: range, arms: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for arm in arms:
            rate = 0.9 if arm == "maps_paper" else 0.2
            (folder / f"{arm}-s{seed}.json").write_text(json.dumps(_result(arm, seed, rate)))


def test_a_report_compares_complete_seeds_alone_and_says_what_is_missing(tmp_path: Path) -> None:
    results = tmp_path / "results"
    assert "No run has been measured" in evidence_report.write_report(tmp_path, tmp_path / "report").read_text()
    _write(results / "arms", range(1), evidence_report.ARMS)
    _write(results / "arms", range(1, 2), evidence_report.ARMS[:4])
    told = evidence_report.write_report(tmp_path, tmp_path / "report").read_text()
    assert f"19 runs measured; seeds with all {len(evidence_report.ARMS)} arms: 1." in told and "Holm" not in told
    _write(results / "arms", range(3), evidence_report.ARMS)
    _write(results / "confirm", range(100, 103), ["maps_paper", "winner"])
    trials = [
        {
            "trial": f"DSPEL-{number:03d}",
            "label": "DSPEL",
            "proximity": {"lambda_max": 0.5 + number, "shape": "cosine"},
            "status": "finished",
            "step": 600,
            "values": {"rollout/ood/success": 0.1 * number},
        }
        for number in range(3)
    ]
    (results / "search.json").write_text(json.dumps(trials))
    (results / "base.json").write_text(json.dumps({"answer_loss": 4.45, "naming": 0.437, "pointing": 0.748}))
    told = evidence_report.write_report(tmp_path, tmp_path / "report").read_text()
    assert "seeds with all 15 arms: 3." in told
    assert "counts as 0 %" not in told
    # The arm that succeeds more often is told apart, and no other: they differ by chance alone.
    assert told.count(" * |") == 4 and "| MAPS, paper | 9" in told
    assert "| the base | 4.45 | 44 | 75 | 0 | 0 |" in told
    assert "| DSPEL | cosine | 2.50 | 600 | 20% |" in told
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"tables.md", "differences.svg", "map.svg"}


def test_a_run_that_failed_counts_as_nothing_reached_and_is_named(tmp_path: Path) -> None:
    _write(tmp_path / "results" / "arms", range(2), evidence_report.ARMS)
    lost = tmp_path / "results" / "arms" / "lora-s1.json"
    count_as_failed(lost, {"arm": "lora", "seed": 1}, "loss is not finite", 1000, EPISODES)
    told = evidence_report.write_report(tmp_path, tmp_path / "report").read_text()
    assert "seeds with all 15 arms: 2." in told and "LoRA, seed 1, counts as 0 %: loss is not finite" in told
    failed = json.loads(lost.read_text())["success"]
    whole = _result("lora", 1, 0.5)["success"]
    assert {suite: [row[:2] for row in rows] for suite, rows in failed.items()} == {
        suite: [row[:2] for row in rows] for suite, rows in whole.items()
    }


def test_the_specs_name_the_arms_that_are_reported() -> None:
    spec = yaml.safe_load((ROOT / "jobs" / "evidence" / "arms.yaml").read_text(encoding="utf-8"))
    known = yaml.safe_load((ROOT / "tune_spaces" / "baselines.yaml").read_text(encoding="utf-8"))
    assert {*spec["baselines"], "maps_paper", *evidence.MERGED} == set(evidence_report.ARMS)
    assert set(spec["baselines"]) <= set(known)
    registered = (ROOT / "docs" / "evidence-plan.md").read_text(encoding="utf-8")
    assert (
        evidence.FIRST_STATE == 1000
        and "1000 to 1009" in registered
        and list(evidence.REGISTERED.seeds) == list(range(5))
    )
    assert f"{evidence.REGISTERED.pictures:,} pictures" in registered


@pytest.mark.parametrize("name", ["arms", "search", "minivla_arms", "minivla_search"])
def test_sweeps_build_on_specs_that_can_be_read_and_name_suites_that_exist(name: str) -> None:
    sweep = load_sweep(ROOT / "jobs" / "evidence" / f"{name}.yaml")
    spec = load_spec(sweep.base, sweep.overrides)
    rollouts = spec.evaluation.rollouts
    assert set(rollouts.suites if rollouts else ()) <= set(SIMULATED)
    assert sweep.num_samples == (40 if "search" in name else 1)


def test_a_winner_is_a_trial_that_ran_to_the_end(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    values = [("stopped early", 0.9), ("finished", 0.3), ("finished", 0.5)]
    trials = [
        {"trial": str(number), "status": status, "values": {"rollout/ood/success": success}}
        for number, (status, success) in enumerate(values)
    ]
    (tmp_path / "results" / "search.json").write_text(json.dumps(trials))
    assert evidence.winner(Made(tmp_path))["trial"] == "2"


def test_time_that_is_over_interrupts_what_runs() -> None:
    clock = evidence.Clock(evidence.time.monotonic() + 30)
    with pytest.raises(evidence.OutOfTime):
        clock.run(sys.executable, "-c", "pass")


def test_what_runs_is_interrupted_also_from_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell's background job has SIGINT ignored; its children must hear it, or they would be killed unfinished."""
    monkeypatch.setattr(evidence.Clock, "left", lambda self: 3.0)
    program = (
        "import pathlib, time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n"
        f"    pathlib.Path({str(tmp_path / 'heard')!r}).touch()\n"
    )
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(evidence.OutOfTime):
            evidence.Clock(0).run(sys.executable, "-c", program)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "heard").exists()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(importlib.util.find_spec("metaworld") is None, reason="needs `pip install maps_ray[metaworld]`")
def test_a_rehearsal_goes_through_everything_and_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/evidence.py", "--rehearse", "--out", str(tmp_path / "rehearsal")]
    # Stopped once in the middle of a sweep, then to the end.
    codes = [
        subprocess.run([*command, "--hours", hours], cwd=ROOT, check=False).returncode for hours in ("0.05", "0.9")
    ]
    assert codes[0] in (0, STOPPED) and codes[1] == 0
    results = tmp_path / "rehearsal" / "results"
    assert {path.stem for path in (results / "arms").iterdir()} == {
        f"{arm}-s{seed}"
        for arm in ("maps_paper", "full_fine_tuning", "lora", "wise_ft", "lines")
        for seed in evidence.REHEARSAL.seeds
    }
    assert len(list((results / "confirm").iterdir())) == 4
    one = json.loads((results / "arms" / "lora-s0.json").read_text())
    assert [len(one["success"][suite]) for suite in SUITES] == [4, 4, 4, 4, 4, 4, 4, 3]
    assert one["drift"]["language_late"] > 0 and set(one["offline"]) == set(SUITES)
    told = evidence_report.write_report(tmp_path / "rehearsal", tmp_path / "report").read_text()
    assert "10 runs measured; seeds with all 15 arms: 0." in told and "fresh seeds and states, OOD" in told
