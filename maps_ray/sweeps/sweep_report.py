"""The report of a sweep: one self-contained HTML file, in the look of a comparison's."""

from __future__ import annotations

import csv
import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from maps_ray.reports import sweep_plots
from maps_ray.reports.page import Card, fill, pictures
from maps_ray.reports.rollouts import points
from maps_ray.reports.table import percent
from maps_ray.sweeps.command import merge_command
from maps_ray.sweeps.objectives import best_word, cost, maximised
from maps_ray.sweeps.record import (
    LEAST,
    Measured,
    ScheduleResult,
    SweepRecord,
    coordinates,
    importances,
    read_sweep,
    varied,
)
from maps_ray.sweeps.schedules import TRIED

_PLAIN = "full_fine_tuning"
# Schedules in the table and in the plot of drifts, baselines aside.
_BEST = 12
_EXPLAINED = 8
_SLICES = 4


IMPORTANCE_FILE = "importance.csv"

Format = Literal["html", "json", "csv"]


def write_sweep_report(folder: Path, form: Format = "html") -> Path:
    """Writes `report.html`, `.json` or `.csv` into the sweep's folder; returns its path. `importance.csv` is written
    beside a `.csv`, which holds the schedules alone."""
    path = folder / f"report.{form}"
    record = read_sweep(folder)
    if form == "html":
        path.write_text(render(record), encoding="utf-8")
    elif form == "json":
        path.write_text(json.dumps(as_data(record), indent=1), encoding="utf-8")
    else:
        _write_table(path, [_row(result) for result in record.schedules])
        shares = [
            {"objective": name, **asdict(i)} for name in record.spec.objectives for i in importances(record, name)
        ]
        _write_table(folder / IMPORTANCE_FILE, shares)
    return path


def _write_table(path: Path, rows: list[dict[str, object]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def as_data(record: SweepRecord) -> dict[str, object]:
    """The report as plain data: schedules in the order in which they were decided, and what explains each objective."""
    front = {id(result) for result in record.pareto()}
    return {
        "name": record.spec.name,
        "status": record.status,
        "objectives": list(record.spec.objectives),
        "worker_hours": record.worker_hours,
        "schedules": [asdict(result) | {"pareto": id(result) in front} for result in record.schedules],
        "importance": {name: [asdict(i) for i in importances(record, name)] for name in record.spec.objectives},
        "changes": [asdict(change) for change in record.changes],
        "errors": dict(record.errors),
    }


def _row(result: ScheduleResult) -> dict[str, object]:
    row: dict[str, object] = {"schedule": result.label, "source": result.source, "status": result.status}
    row |= {"order": result.code, "step": result.step}
    for name, value in result.values.items():
        row |= {name: value.mean, f"{name} spread": value.spread}
    row |= {f"place of {module}": place for module, place in result.positions.items()}
    row |= {f"strength of {module}": strength for module, strength in result.strengths.items()}
    return row | {f"drift of {module}": value for module, value in result.drift.items()}


def render(record: SweepRecord) -> str:
    """The report as HTML."""
    shown = _shown(record)
    return fill(
        "sweep.html.j2",
        record=record,
        objectives=record.spec.objectives,
        facts=_facts(record),
        cards=_cards(record),
        rows=[(result, _settings(record, result)) for result in shown],
        early=[s for s in record.schedules if not s.finished],
        front={id(result) for result in record.pareto()},
        overview=pictures(
            "overview",
            [*_tradeoff(record), ("Drift of each module", "at the last step", sweep_plots.drift(shown))],
        ),
        effects=pictures("effects", [*_course(record), *_explained(record), *_effects(record)]),
        timeline=pictures("timeline", [("Nodes and trials", "over the sweep", sweep_plots.timeline(record.timeline))]),
        commands=_commands(record),
        text=_text,
        identity=id,
    )


def _shown(record: SweepRecord) -> list[ScheduleResult]:
    """The best schedules and all baselines, in order of the first objective."""
    ranked = record.ranked()
    best = [result for result in ranked if result.source != "baseline"][:_BEST]
    return [result for result in ranked if result in best or result.source == "baseline"]


def _cards(record: SweepRecord) -> list[Card]:
    """The best schedule in each objective, against full fine-tuning where that was run."""
    ranked = [result for result in record.ranked() if result.source != "baseline"]
    plain = next((result for result in record.ranked() if result.label == _PLAIN), None)
    cards = []
    for objective in record.spec.objectives if ranked else ():
        best = min(ranked, key=lambda result: cost(objective, result.values[objective].mean))
        value = best.values[objective]
        note = f"{best.label}: {_settings(record, best)}"
        if plain is None:
            cards.append(Card(f"{value.mean:.4f}", "unclear", f"{best_word(objective)} {objective}", note))
            continue
        base = plain.values[objective]
        clear = value.spread is not None and abs(value.mean - base.mean) > value.spread + (base.spread or 0.0)
        less = cost(objective, value.mean) < cost(objective, base.mean)
        tone = ("better" if less else "worse") if clear else "unclear"
        title = f"{best_word(objective)} {objective} against full fine-tuning: {value.mean:.4f} and {base.mean:.4f}"
        doubt = "" if clear else "; not more than seeds differ" if value.spread is not None else "; one seed"
        # A rate may be 0, and is a percentage already.
        change = points(value.mean - base.mean) if maximised(objective) else percent(value.mean / base.mean - 1)
        cards.append(Card(change, tone, title, note + doubt))
    return cards


def _tradeoff(record: SweepRecord) -> list[tuple[str, str, str | None]]:
    finished = [result for result in record.schedules if result.finished]
    names = record.spec.objectives
    return [
        (f"{x} and {y}", _better(x, y), sweep_plots.pareto(finished, record.pareto(), x, y, maximised(x)))
        for index, x in enumerate(names)
        for y in names[index + 1 :]
    ]


def _better(x: str, y: str) -> str:
    return " and ".join(dict.fromkeys(f"{'more' if maximised(name) else 'less'} is better" for name in (x, y)))


def _effects(record: SweepRecord) -> list[tuple[str, str, str | None]]:
    tried = record.tried()
    # Under a constant shape, or none, the order changes nothing.
    falling = [r for r in tried if r.proximity.get("shape", record.base.proximity.shape) != "constant"]
    pictures = []
    for objective in record.spec.objectives:
        pictures.append(
            (f"Place of each module: {objective}", "mean over schedules", sweep_plots.by_position(falling, objective))
        )
        pictures.append(
            (f"Strength of each module: {objective}", "each schedule", sweep_plots.by_strength(tried, objective))
        )
    return pictures


def _explained(record: SweepRecord) -> list[tuple[str, str, str | None]]:
    """Parallel coordinates for each objective; importance, slices and a contour where there are schedules enough."""
    plots: list[tuple[str, str, str | None]] = []
    tried = record.tried()
    points = [coordinates(record, result) for result in tried]
    for objective in record.spec.objectives:
        values = [result.values[objective].mean for result in tried]
        ranked = importances(record, objective)
        names = [i.name for i in ranked] or varied(points)
        lines = {name: [point[name] for point in points] for name in names[:_EXPLAINED]}
        note = "a line for each schedule" + ("" if ranked else f"; what explains it is said from {LEAST} schedules on")
        plots.append((f"Parallel coordinates: {objective}", note, sweep_plots.parallel(lines, objective, values)))
        if not ranked:
            continue
        columns = {i.name: [point[i.name] for point in points] for i in ranked}
        numbers = [
            (name, [float(value) for value in column])
            for name, column in columns.items()
            if not isinstance(column[0], str)
        ]
        bars = [(i.name, i.mean, i.low, i.high) for i in ranked[:_EXPLAINED]]
        note = "shares of the variance" + (", lines from seed to seed" if ranked[0].low is not None else "")
        first = dict(list(columns.items())[:_SLICES])
        plots.append((f"What explains {objective}", note, sweep_plots.shares(bars)))
        plots.append((f"Slices: {objective}", "each schedule", sweep_plots.slices(first, values)))
        if len(numbers) > 1:
            contour = sweep_plots.contour(numbers[0], numbers[1], values)
            plots.append((f"Contour: {objective}", "over the two that explain most", contour))
    return plots


def _course(record: SweepRecord) -> list[tuple[str, str, str | None]]:
    """How lambda_max went in trials that were copied, where it is searched."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for result in record.schedules:
        for trial in result.trials if result.source != "baseline" and "lambda_max" in result.proximity else ():
            changes = [(c.step, c.proximity["lambda_max"]) for c in record.changes if c.trial == trial]
            points = [(0, result.proximity["lambda_max"]), *changes]
            lines[trial] = [*points, (record.base.training.max_steps, points[-1][1])]
    copies = [(c.trial, c.source, c.step) for c in record.changes if c.trial in lines and c.source in lines]
    title = "Strengths in the course of training"
    note = "lambda_max of each trial; a copy leads from a ring to a dot"
    return [(title, note, sweep_plots.course(lines, copies))] if copies else []


def _settings(record: SweepRecord, result: ScheduleResult) -> str:
    """What the schedule sets, in few words."""
    base, fields = record.base.proximity, result.proximity
    if merge := fields.get("merge"):
        how = [f"{share:.2g} of {module}" for module, share in merge.get("weights", {}).items()]
        how += [f"lines {' to '.join(f'{share:.2g}' for share in merge['lines'])}"] if "lines" in merge else []
        return f"{merge.get('of') or Path(merge['run']).name} merged: {', '.join(how)}"
    if fields.get("strengths"):
        return ", ".join(f"{module} {value:.3g}" for module, value in fields["strengths"].items())
    parts = [f"\N{GREEK SMALL LETTER LAMDA} {fields.get('lambda_max', base.lambda_max):.3g}"]
    if fields.get("lambda_max", base.lambda_max) > 0:
        parts.append(fields.get("shape", base.shape))
    if fields.get("freeze"):
        parts.append(f"frozen: {', '.join(fields['freeze'])}")
    if fields.get("l2_sp"):
        penalty = fields["l2_sp"]
        shown = f"{penalty['strength']:g} {penalty.get('shape', '')}" if isinstance(penalty, dict) else f"{penalty:g}"
        parts.append(f"L2-SP {shown}".strip())
    return ", ".join(parts)


def _text(value: Measured | None) -> str:
    if value is None:
        return "\N{EN DASH}"
    return f"{value.mean:.4f}" + (f" \N{PLUS-MINUS SIGN} {value.spread:.4f}" if value.spread is not None else "")


def _facts(record: SweepRecord) -> list[str]:
    base, spec = record.base, record.spec
    counts = [f"{len(record.schedules)} schedules", f"{sum(len(s.trials) for s in record.schedules)} trials"]
    early = sum(s.status == "stopped early" for s in record.schedules)
    return [
        f"{base.model.name} {base.model.checkpoint.name}",
        ", ".join(source.key for source in base.data.resolved()),
        f"{base.training.max_steps} steps, {_counted(base.cluster.most_workers, 'worker')}",
        spec.searcher.name + (f", {spec.scheduler.name}" if spec.scheduler.name != "none" else ""),
        *counts,
        *([f"{early} stopped early"] if early else []),
        f"{record.worker_hours:.2f} worker-hours",
    ]


def _commands(record: SweepRecord) -> list[tuple[str, str]]:
    commands = []
    trained = [result for result in record.ranked() if result.source in TRIED]
    if trained:
        trial = shlex.quote(f"{record.place}/{trained[0].trials[0]}")
        commands.append(("Train the best schedule alone, at full length", f"maps-ray train --from-trial {trial}"))
    merged = [result for result in record.ranked() if result.source == "merged"]
    if merged:
        commands.append(
            ("Write the best merged weights", merge_command(record.folder, merged[0].trials[0], merged[0].proximity))
        )
    commands.append(("Go on with the sweep", f"maps-ray sweep --resume {shlex.quote(record.place)}"))
    return commands


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
