"""Success rates in a comparison: from what rollouts leave in a run's folder to table and report."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from maps_ray.evaluation.rollouts.environment import SuiteFacts
from maps_ray.evaluation.rollouts.journal import Journal
from maps_ray.evaluation.rollouts.plan import Episode
from maps_ray.evaluation.rollouts.protocol import EpisodeResult
from maps_ray.evaluation.rollouts.summary import Evaluation
from maps_ray.evaluation.simulators import Suite, Task
from maps_ray.reports.comparison_report import render
from maps_ray.reports.records import Comparison, RunRecord
from maps_ray.reports.rollouts import RolloutRecord, success_rows
from maps_ray.reports.table import print_table

SUITES = {
    name: SuiteFacts(
        Suite(name, "libero", 280, "libero_object", change),
        tuple(Task(name, i, f"task_{i}", f"pick up object {i}", 50) for i in range(2)),
        7,
    )
    for name, change in (("libero_object_swap", "position"), ("libero_object", "none"))
}
EPISODES = [Episode(name, task, state) for name in SUITES for task in (0, 1) for state in range(10)]


def roll(run_dir: Path, step: int, solved: Callable[[Episode], bool]) -> None:
    """What the rollouts of a run leave."""
    out = run_dir / "rollouts" / f"step-{step:08d}"
    with Journal(out, {"checkpoint": "0"}) as journal:
        for facts in SUITES.values():
            journal.add_suite(facts)
        for episode in EPISODES:
            goals = {"grasp": episode.initial_state < 9, "carry": solved(episode), "place": solved(episode)}
            journal.add(EpisodeResult(episode, solved(episode), 100, 13, goals, 1.0))
        found = Evaluation.complete("final", out, SUITES, EPISODES, journal.results, {})
    (out / "evaluation.json").write_text(json.dumps(found.as_json()))


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    roll(tmp_path / "maps", 100, lambda episode: False)
    roll(tmp_path / "maps", 200, lambda episode: episode.initial_state < 8 - episode.task)
    roll(tmp_path / "plain", 200, lambda episode: episode.suite == "libero_object" and episode.initial_state < 7)
    runs = [RunRecord(name, name, rollouts=RolloutRecord.read(tmp_path / name)) for name in ("maps", "plain")]
    return Comparison("MAPS against plain", runs, "plain")


def test_rates_of_the_last_step_with_intervals_and_pairs(comparison: Comparison) -> None:
    maps, plain = (run.rollouts for run in comparison.runs)
    rows = success_rows([maps, plain, None], plain)
    assert [(row.group, row.label) for row in rows if row.headline] == [
        ("In distribution: libero_object", "success"),
        ("Out of distribution: other positions: libero_object_swap", "success"),
    ]
    assert [row.label for row in rows[1:4]] == ["grasp reached", "carry reached", "place reached"]
    assert [row.label for row in rows[4:6]] == ["0: pick up object 0", "1: pick up object 1"]
    known, swapped = (row.cells for row in rows if row.headline)
    assert known[0].text == "75.0% [53%, 89%], 15 of 20" and known[1].text == "70.0% [48%, 85%], 14 of 20"
    assert known[0].difference == "+5.0 points, p = 1: not told apart" and known[0].tone == "unclear"
    assert known[1].difference is None and known[2] is None
    # 15 episodes that only one of both solves: p = 2 / 2^15.
    assert swapped[0].difference == "+75.0 points, p = 6.1e-05" and swapped[0].tone == "better"
    assert rows[1].cells[0].text == "90%" and rows[4].cells[0].text == "80.0% [49%, 94%], 8 of 10"


def test_the_report_and_the_terminal_show_them(comparison: Comparison) -> None:
    html = render(comparison)
    assert "Success in simulators" in html and "Action error</h2>" not in html
    assert html.count("<svg") == 1 and 'class="better">+75.0 points, p = 6.1e-05' in html
    # One card for each side, the claim's first.
    assert html.index("success out of distribution, maps against plain") < html.index("success in distribution, maps")
    assert "20 episodes, p = 6.1e-05" in html and "20 episodes, p = 1: not told apart" in html
    for words in ("In distribution: libero_object", "grasp reached", "1: pick up object 1", "15 of 20"):
        assert words in html
    console = Console(file=io.StringIO(), width=160)
    print_table(comparison, console)
    shown = console.file.getvalue()
    assert "75.0% [53%, 89%], 15 of 20" in shown and "+75.0 points, p = 6.1e-05" in shown


def test_a_run_without_rollouts_has_no_such_part(tmp_path: Path) -> None:
    assert RolloutRecord.read(tmp_path) is None
    html = render(Comparison("one", [RunRecord("a", "a")], "a"))
    assert "Success in simulators" not in html


def test_other_episodes_are_not_paired(comparison: Comparison, tmp_path: Path) -> None:
    maps, plain = (run.rollouts for run in comparison.runs)
    fewer = RolloutRecord(plain.suites, {key: value for key, value in plain.episodes.items() if key[2] < 9})
    assert maps.against(fewer, ["libero_object"]) is None
    assert maps.against(plain, ["libero_object"]).first_only == 1
    (tmp_path / "maps" / "rollouts" / "step-00000200" / "episodes.jsonl").write_text("{")
    with pytest.raises(ValueError, match="step-00000200: its rollouts cannot be read"):
        RolloutRecord.read(tmp_path / "maps")
