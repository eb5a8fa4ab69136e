"""One self-contained HTML file that shows runs side by side: no script, no network, light and dark."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from maps_ray.metrics import DRIFT, LOSS
from maps_ray.reports import plots
from maps_ray.reports.differences import Difference
from maps_ray.reports.page import Card, fill, pictures
from maps_ray.reports.records import SPLITS, Comparison, RunRecord
from maps_ray.reports.rollouts import SuccessRow, points, success_rows, sureness, tone
from maps_ray.reports.table import SPLIT_NAMES, SPLIT_NOTES, Row, headline_rows, percent
from maps_ray.spec import to_yaml
from maps_ray.tracking.tracker import flatten

# Differ between any two runs, and say nothing about them.
_NOT_COMPARED = {"name"}


def write_report(out_html: str | Path, comparison: Comparison) -> Path:
    """Writes the report; returns its path. Parts that no run has data for are left out."""
    path = Path(out_html)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(comparison), encoding="utf-8")
    return path


def render(comparison: Comparison) -> str:
    """The report as HTML."""
    return fill(
        "report.html.j2",
        comparison=comparison,
        colors=plots.run_colors(comparison),
        facts=_facts(comparison),
        cards=_cards(comparison),
        groups=_groups(headline_rows(comparison)),
        success=_success(comparison),
        success_pictures=pictures("success", [("Success rate", "95 % interval", plots.success_rates(comparison))]),
        errors=pictures("errors", _error_pictures(comparison)),
        tasks=pictures("tasks", _task_pictures(comparison)),
        course=pictures("course", _course_pictures(comparison)),
        modules=pictures("modules", _module_pictures(comparison)),
        episodes=_episode_note(comparison),
        fields=_different_fields(comparison),
        specs={run.label: to_yaml(run.spec) for run in comparison.runs},
        timings=list(dict.fromkeys(name for run in comparison.runs for name in run.timings)),
        duration=_duration,
        environment=_environments(comparison),
    )


def _cards(comparison: Comparison) -> list[Card]:
    """Success and errors out of and in distribution, then the drift of the first module of the order, for each run."""
    cards = []
    base = comparison.baseline_run
    rows = headline_rows(comparison)
    for index, run in enumerate(comparison.runs):
        if run is base:
            continue
        cards += _success_cards(run, base)
        for group in (SPLIT_NAMES["ood"], SPLIT_NAMES["held_out"]):
            row = next((row for row in rows if row.headline and row.group == group), None)
            difference = row.cells[index].difference if row else None
            if row and difference:
                title = f"action error on {row.group.lower()}, {run.label} against {base.label}"
                cards.append(Card(percent(difference.relative), _tone(difference), title, _sureness(difference)))
        proximity = run.section("proximity")
        order = cast(list[str], proximity.get("order", [])) if proximity.get("lambda_max") else []
        module = next((module for module in order if run.last(DRIFT + module) is not None), None)
        ours, theirs = (run.last(f"{DRIFT}{module}"), base.last(f"{DRIFT}{module}")) if module else (None, None)
        if ours is not None and theirs:
            title = f"drift of {module}, first in the order of {run.label}, against {base.label}"
            note = f"{ours:.3g} and {theirs:.3g} of its pretrained norm"
            cards.append(Card(percent(ours / theirs - 1), "unclear", title, note))
    return cards


def _success_cards(run: RunRecord, base: RunRecord) -> list[Card]:
    if not (run.rollouts and base.rollouts):
        return []
    cards = []
    for words, in_distribution in (("out of distribution", False), ("in distribution", True)):
        paired = run.rollouts.against(base.rollouts, run.rollouts.side(in_distribution))
        if paired:
            title = f"success {words}, {run.label} against {base.label}"
            note = f"{paired.episodes} episodes, {sureness(paired)}"
            cards.append(Card(points(paired.difference), tone(paired), title, note))
    return cards


def _tone(difference: Difference) -> str:
    if difference.interval is None or difference.interval.covers_zero:
        return "unclear"
    return "better" if difference.relative < 0 else "worse"


def _sureness(difference: Difference) -> str:
    if difference.interval is None:
        return "too few episodes for an interval"
    interval = f"95 % interval {percent(difference.interval.low)} to {percent(difference.interval.high)}"
    return f"{interval}: covers zero, no clear difference" if difference.interval.covers_zero else interval


def _groups(rows: list[Row]) -> list[tuple[str, str, list[Row]]]:
    groups: dict[str, tuple[str, str, list[Row]]] = {}
    for row in rows:
        groups.setdefault(row.group, (row.group, row.note, []))[2].append(row)
    return list(groups.values())


def _success(comparison: Comparison) -> list[tuple[str, list[SuccessRow]]]:
    groups: dict[str, list[SuccessRow]] = {}
    for row in success_rows([run.rollouts for run in comparison.runs], comparison.baseline_run.rollouts):
        groups.setdefault(row.group, []).append(row)
    return list(groups.items())


def _error_pictures(comparison: Comparison) -> list[tuple[str, str, str | None]]:
    return [(SPLIT_NAMES[split], SPLIT_NOTES[split], plots.error_bars(comparison, split)) for split in SPLITS]


def _task_pictures(comparison: Comparison) -> list[tuple[str, str, str | None]]:
    return [
        (SPLIT_NAMES[split], "error of the whole action, by task", plots.task_errors(comparison, split))
        for split in SPLITS
    ]


def _course_pictures(comparison: Comparison) -> list[tuple[str, str, str | None]]:
    smoothed = "smoothed; thin: as recorded"
    return [
        ("Strength of the anchor", "λ of each layer", plots.strengths(comparison)),
        ("Training loss", smoothed, plots.curves(comparison, LOSS)),
    ]


def _module_pictures(comparison: Comparison) -> list[tuple[str, str, str | None]]:
    drifts = [
        (f"Drift: {run.label}", "‖θ \N{MINUS SIGN} θ₀‖ / ‖θ₀‖", plots.drift_curves(comparison, run))
        for run in comparison.runs
    ]
    projections = [
        (
            f"Projection rate: {run.label}",
            "share of tensors drawn back, smoothed",
            plots.projection_curves(comparison, run),
        )
        for run in comparison.runs
    ]
    return [*drifts, *projections]


def _episode_note(comparison: Comparison) -> str:
    names = {"held_out": "held-out episodes", "ood": "episodes of unseen tasks"}
    results = ((names[split], comparison.baseline_run.evaluations.get(split)) for split in SPLITS)
    return " and ".join(f"{len(r.episodes)} {name} ({r.samples} samples)" for name, r in results if r and r.episodes)


def _different_fields(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """Spec fields in which the runs differ, with each run's value."""
    flat = [flatten(run.spec) for run in comparison.runs]
    names = dict.fromkeys(name for fields in flat for name in fields)
    values = {name: [fields.get(name, "") for fields in flat] for name in names if name not in _NOT_COMPARED}
    return [(name, shown) for name, shown in values.items() if len(set(shown)) > 1]


def _environments(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """Machine and versions; one value where all runs agree, else one for each run."""
    names = dict.fromkeys(name for run in comparison.runs for name in run.environment)
    rows = []
    for name in names:
        values = [run.environment.get(name, "") for run in comparison.runs]
        rows.append((name, values[:1] if len(set(values)) == 1 else values))
    return rows


def _facts(comparison: Comparison) -> list[str]:
    """Short facts under the title."""
    base = comparison.baseline_run
    model, data, training, cluster = map(base.section, ("model", "data", "training", "cluster"))
    facts = []
    if model.get("checkpoint"):
        facts.append(f"{model.get('name', '')} {Path(str(model['checkpoint'])).name}".strip())
    if data.get("path"):
        facts.append(Path(str(data["path"])).name)
    if training.get("max_steps"):
        facts.append(f"{training['max_steps']} steps")
    if training.get("zero_stage"):
        workers = f", {cluster['workers']} workers" if cluster.get("workers") else ""
        facts.append(f"ZeRO-{training['zero_stage']}{workers}")
    if base.started is not None:
        facts.append(f"{datetime.fromtimestamp(base.started / 1000, UTC):%d %B %Y, %H:%M} UTC")
    return facts


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
