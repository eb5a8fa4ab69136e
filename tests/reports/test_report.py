"""The report: from run folders to one file that stands alone."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from maps_ray.reports.comparison_report import render, write_report
from maps_ray.reports.records import Comparison, RunRecord, StrengthRow, parse_evaluation
from maps_ray.reports.table import as_data, headline_rows, print_table
from maps_ray.tracking import Tracker

MINUS = "\N{MINUS SIGN}"
MODULES = ("dinov2", "siglip", "projector", "language")


def evaluation(scale: float, ripple: float = 0.0) -> dict[str, Any]:
    splits = {}
    for split, error in (("held_out", 0.1), ("ood", 0.2 * scale)):
        values = [error * (1 + 0.02 * index + ripple * (-1) ** index) for index in range(10)]
        splits[split] = {
            "samples": 80,
            "action_l1": sum(values) / 10,
            "gripper_l1": error * 2,
            "tasks": {"pick up the milk": error, "pick up the <b>butter</b> for $5 & $6": error * 1.1},
            "episodes": {
                str(index): {"samples": 8, "action_l1": value, "gripper_l1": 2 * value}
                for index, value in enumerate(values)
            },
        }
    return splits


def record(label: str, strength: float, scale: float, ripple: float = 0.0) -> RunRecord:
    steps = range(10, 110, 10)
    metrics = {"train/loss": [(step, 1.0 / step) for step in steps]}
    for index, module in enumerate(MODULES):
        metrics[f"drift/{module}"] = [(step, step * (index + 1) * (2 - strength) * 1e-4) for step in steps]
        metrics[f"projection_rate/{module}"] = [(step, 0.1 * strength) for step in steps]
    return RunRecord(
        name=label,
        label=label,
        spec={
            "name": label,
            "proximity": {"order": list(MODULES), "lambda_max": strength},
            "training": {"max_steps": 100, "zero_stage": 2},
        },
        metrics=metrics,
        evaluations=parse_evaluation(evaluation(scale, ripple)),
        strengths=[StrengthRow(f"{module}.{i}", strength, 4, 100) for module in MODULES for i in range(3)],
        timings={"whole run": 75.0},
        environment={"processor": "two cores"},
        status="FINISHED",
        started=1_700_000_000_000,
        command=f"maps-ray train {label}.yaml",
    )


@pytest.fixture
def comparison() -> Comparison:
    runs = [record("MAPS", 1.0, 0.8, ripple=0.1), record("plain", 0.0, 1.0)]
    return Comparison("MAPS against plain", runs, "plain", command="make demo", notes=["A note."])


class Page(HTMLParser):
    """Collects what a check needs: ids, tags, references to elsewhere, text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.words = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "xlink:href"):
                self.references.append(str(value))

    def handle_data(self, data: str) -> None:
        self.words += data + " "


def test_report_stands_alone(tmp_path: Path, comparison: Comparison) -> None:
    path = write_report(tmp_path / "new" / "report.html", comparison)
    page = Page(path.read_text())
    assert path.stat().st_size < 1_000_000
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert all(reference.startswith("#") for reference in page.references)
    assert len(page.ids) == len(set(page.ids)), "an id that stands twice mixes up the pictures' clip paths"
    assert page.tags.count("svg") == 2 + 2 + 3 + 2, "errors, schedule and loss, drift twice and projection once, tasks"
    for needed in (
        "make demo",
        "maps-ray train MAPS.yaml",
        "two cores",
        "1 min 15 s",
        "proximity.lambda_max",
        "A note.",
    ):
        assert needed in page.words


def test_pictures_take_their_colours_from_the_page(comparison: Comparison) -> None:
    html = render(comparison)
    assert "#0a0b0" not in html
    assert "fill: var(--ink)" in html and "stroke: var(--grid)" in html
    assert "prefers-color-scheme: dark" in html


def test_reports_of_the_same_records_are_equal(comparison: Comparison) -> None:
    assert render(comparison) == render(comparison)


def test_everything_is_escaped(comparison: Comparison) -> None:
    comparison.title = "<script>alert(1)</script>"
    comparison.runs[0].spec["note"] = "</pre><script>alert(2)</script>"
    comparison.runs[0].label = "<img src=x onerror=alert(3)>"
    html = render(comparison)
    page = Page(html)
    assert not {"script", "img"} & set(page.tags) and "<b>butter" not in html
    assert "pick up the <b>butter</b> for $5 & $6" in page.words
    assert "<script>alert(1)</script>" in page.words


def test_clear_and_unclear_differences_are_told_apart(comparison: Comparison) -> None:
    words = " ".join(Page(render(comparison)).words.split())
    assert re.search(
        rf"{MINUS}20\.\d % action error on unseen tasks, MAPS against plain 95 % interval {MINUS}\d", words
    )
    assert re.search(r"action error on held-out episodes, MAPS against plain 95 % interval [^:]*: covers zero", words)
    assert "drift of dinov2, first in the order of MAPS, against plain" in words
    assert "10 held-out episodes (80 samples) and 10 episodes of unseen tasks (80 samples)" in words


def test_unfinished_runs_are_marked(comparison: Comparison) -> None:
    assert "has not finished" not in render(comparison)
    comparison.runs[0].status = "KILLED"
    assert "its status is KILLED" in render(comparison)


def test_empty_records_still_make_a_report() -> None:
    bare = Comparison("Nothing yet", [RunRecord("a", "a"), RunRecord("b", "b")], "a")
    page = Page(render(bare))
    assert "svg" not in page.tags and "Nothing yet" in page.words
    print_table(bare, Console(file=io.StringIO()))


def test_runs_with_different_data_stand_side_by_side(comparison: Comparison) -> None:
    del comparison.runs[0].evaluations["held_out"]
    comparison.runs.append(RunRecord("third", "third", metrics={"train/loss": [(1, float("nan")), (2, 0.0)]}))
    rows = headline_rows(comparison)
    whole = [row for row in rows if row.headline]
    assert [[cell.value is None for cell in row.cells] for row in whole] == [[True, False, True], [False, False, True]]
    assert "third" in Page(render(comparison)).words


def test_rows_are_in_stack_order_and_take_the_last_value(comparison: Comparison) -> None:
    drift = [row for row in headline_rows(comparison) if row.group == "Drift"]
    assert [row.label for row in drift] == list(MODULES)
    assert [cell.value for cell in drift[0].cells] == [pytest.approx(0.01), pytest.approx(0.02)]
    assert drift[0].cells[0].difference is not None and drift[0].cells[0].difference.relative == pytest.approx(-0.5)


def test_terminal_table(comparison: Comparison) -> None:
    output = io.StringIO()
    print_table(comparison, Console(file=output, width=100))
    text = output.getvalue()
    assert re.search(r"whole action .* 0\.1\d+", text)
    assert re.search(rf"~[+{MINUS}]\d\.\d % \[{MINUS}\d", text), "the held-out difference is unclear"
    assert re.search(rf"[^~]{MINUS}20\.\d % \[{MINUS}\d", text), "the difference on unseen tasks is clear"
    assert "dinov2" in text and "language" in text


def test_the_table_as_json_has_every_cell(comparison: Comparison) -> None:
    data = json.loads(json.dumps(as_data(comparison), allow_nan=False))
    rows = headline_rows(comparison)
    assert [row["what"] for row in data["rows"]] == [row.label for row in rows]
    label = comparison.runs[0].label
    assert [row["runs"][label]["value"] for row in data["rows"]] == [row.cells[0].value for row in rows]
    assert data["baseline"] == comparison.baseline


def test_labels_must_tell_runs_apart() -> None:
    with pytest.raises(ValueError, match="same label"):
        Comparison("x", [RunRecord("a", "run"), RunRecord("b", "run")], "run")
    with pytest.raises(ValueError, match="none of the runs"):
        Comparison("x", [RunRecord("a", "run")], "absent")


def test_record_is_read_from_the_run_folder(tmp_path: Path) -> None:
    run_dir = tmp_path / "libero-maps"
    tracker = Tracker.create(
        run_dir, uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="e", run_name="libero-maps", ship=False
    )
    tracker.metrics(1, {"train/loss": 2.0, "drift/dinov2": 0.1})
    tracker.metrics(2, {"train/loss": 1.0, "drift/dinov2": 0.2})
    tracker.finish("FINISHED", wait_s=0)
    (run_dir / "spec.yaml").write_text(yaml.safe_dump({"name": "libero-maps", "proximity": {"lambda_max": 1.0}}))
    early, late = evaluation(3.0), evaluation(0.8)
    late["ood"]["episodes"] = {"4": 0.15, "5": 0.17}
    entries = [{"step": 1, "splits": early}, {"step": 2, "splits": late}]
    (run_dir / "evaluation.json").write_text(json.dumps(entries))
    (run_dir / "strengths.json").write_text(
        json.dumps([{"module": "dinov2.0", "strength": 1.0, "tensors": 4, "parameters": 9}])
    )
    run = RunRecord.read(run_dir, "MAPS")
    assert run.label == "MAPS" and run.status == "FINISHED" and run.spec["proximity"] == {"lambda_max": 1.0}
    assert run.metrics["train/loss"] == [(1, 2.0), (2, 1.0)] and run.last("drift/dinov2") == 0.2
    assert run.evaluations["ood"].errors["gripper"] == pytest.approx(0.32)
    assert [episode.errors for episode in run.evaluations["ood"].episodes] == [{"action": 0.15}, {"action": 0.17}]
    assert run.strengths == [StrengthRow("dinov2.0", 1.0, 4, 9)]
    assert "python" in run.environment and run.timings["whole run"] >= 0
    assert run.command is not None and "--set name=libero-maps-again" in run.command
    assert "MAPS" in render(Comparison("One", [run], "MAPS"))
    (run_dir / "evaluation.json").write_text('[{"step": 1')
    with pytest.raises(ValueError, match=r"evaluation\.json: cannot be read"):
        RunRecord.read(run_dir)
