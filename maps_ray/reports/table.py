"""The headline table of a comparison, for the report and for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from maps_ray.metrics import DRIFT
from maps_ray.reports.differences import Difference, Interval, difference, mean_interval
from maps_ray.reports.records import OVERALL, SPLITS, Comparison, RunRecord
from maps_ray.reports.rollouts import success_rows

SPLIT_NAMES = {"held_out": "Held-out episodes", "ood": "Unseen tasks"}
SPLIT_NOTES = {"held_out": "in distribution", "ood": "out of distribution"}


@dataclass(frozen=True)
class Cell:
    """One run's value, and how it differs from the baseline's."""

    value: float | None
    interval: Interval | None = None
    difference: Difference | None = None


@dataclass(frozen=True)
class Row:
    group: str
    note: str
    label: str
    cells: tuple[Cell, ...]
    """One for each run of the comparison."""
    is_error: bool
    """Less is better; a drift is neither good nor bad by itself."""
    headline: bool = False


def headline_rows(comparison: Comparison) -> list[Row]:
    """Action errors by split and part, then the drift of each module; rows that no run has a value for are left out."""
    rows = []
    for split in SPLITS:
        for part in error_parts(comparison.runs, split):
            cells = tuple(_error_cell(run, comparison.baseline_run, split, part) for run in comparison.runs)
            label = "whole action" if part == OVERALL else part
            rows.append(Row(SPLIT_NAMES[split], SPLIT_NOTES[split], label, cells, True, part == OVERALL))
    for module in drifting_modules(comparison.runs):
        base = comparison.baseline_run.last(DRIFT + module)
        cells = tuple(_drift_cell(run, comparison.baseline_run, DRIFT + module, base) for run in comparison.runs)
        rows.append(Row("Drift", "distance from the pretrained weights", module, cells, False))
    return rows


def error_parts(runs: Iterable[RunRecord], split: str) -> list[str]:
    """Parts of the action that any run has an error for, the whole action first."""
    parts = dict.fromkeys(part for run in runs if split in run.evaluations for part in run.evaluations[split].errors)
    return sorted(parts, key=lambda part: part != OVERALL)


def drifting_modules(runs: Iterable[RunRecord]) -> list[str]:
    """Modules with a recorded drift, in stack order where a run has its strengths."""
    runs = list(runs)
    modules = list(
        dict.fromkeys(key.removeprefix(DRIFT) for run in runs for key in run.metrics if key.startswith(DRIFT))
    )
    stack = list(dict.fromkeys(row.module.partition(".")[0] for run in runs for row in run.strengths))
    place = {module: index for index, module in enumerate(stack)}
    # `language_early` stands where `language` does.
    return sorted(modules, key=lambda module: place.get(module, place.get(module.partition("_")[0], len(place))))


def percent(relative: float) -> str:
    """`-12.3 %` with a real minus sign."""
    if not math.isfinite(relative):
        return "n/a"
    return f"{100 * relative:+.1f} %".replace("-", "\N{MINUS SIGN}")


def print_table(comparison: Comparison, console: Console | None = None) -> None:
    """Prints the headline table to the terminal."""
    console = console or Console()
    table = Table(title=comparison.title, title_justify="left", caption_justify="left", pad_edge=False)
    table.add_column("")
    for run in comparison.runs:
        note = "" if run.status == "FINISHED" else f"\n({run.status.lower()})"
        table.add_column(run.label + note, justify="right")
    group = ""
    for row in headline_rows(comparison):
        if row.group != group:
            if group:
                table.add_section()
            table.add_row(Text(f"{row.group} ({row.note})", style="bold"))
            group = row.group
        table.add_row(Text(f"  {row.label}"), *(_terminal(cell, row) for cell in row.cells))
    table.caption = (
        f"Action error: mean absolute error of normalised actions. % against {comparison.baseline}, with the 95 % "
        "interval over episodes (one training seed); ~ marks an interval that covers zero."
    )
    console.print(table)
    if any(run.rollouts for run in comparison.runs):
        console.print(_success_table(comparison))


def as_data(comparison: Comparison) -> dict[str, object]:
    """What `print_table` prints, as JSON values; `null` where a run has none, or a number is not finite."""
    labels = [run.label for run in comparison.runs]
    data: dict[str, object] = {
        "title": comparison.title,
        "baseline": comparison.baseline,
        "runs": [{"label": run.label, "status": run.status} for run in comparison.runs],
        "rows": [
            {
                "group": row.group,
                "what": row.label,
                "runs": {label: _cell_data(cell) for label, cell in zip(labels, row.cells, strict=True)},
            }
            for row in headline_rows(comparison)
        ],
    }
    rates = success_rows([run.rollouts for run in comparison.runs], comparison.baseline_run.rollouts)
    data["success"] = [
        {
            "group": row.group,
            "runs": {
                label: None if cell is None else {"rate": cell.text, "difference": cell.difference}
                for label, cell in zip(labels, row.cells, strict=True)
            },
        }
        for row in rates
        if row.headline
    ]
    return data


def _cell_data(cell: Cell) -> dict[str, object]:
    compared = cell.difference
    return {
        "value": _finite(cell.value),
        "interval": _ends(cell.interval),
        "relative": None if compared is None else _finite(compared.relative),
        "relative_interval": None if compared is None else _ends(compared.interval),
    }


def _ends(interval: Interval | None) -> list[float | None] | None:
    return None if interval is None else [_finite(interval.low), _finite(interval.high)]


def _finite(value: float | None) -> float | None:
    # JSON has no infinity: an error against a baseline's of 0.
    return value if value is not None and math.isfinite(value) else None


def _success_table(comparison: Comparison) -> Table:
    table = Table(title="Success rate in simulators", title_justify="left", caption_justify="left", pad_edge=False)
    table.add_column("")
    for run in comparison.runs:
        table.add_column(run.label, justify="right")
    for row in success_rows([run.rollouts for run in comparison.runs], comparison.baseline_run.rollouts):
        if row.headline:
            cells = [
                "-" if cell is None else "\n".join(filter(None, (cell.text, cell.difference))) for cell in row.cells
            ]
            table.add_row(row.group, *map(Text, cells))
    table.caption = "Brackets: 95 % Wilson interval. p: exact McNemar test on the same episodes."
    return table


def _terminal(cell: Cell, row: Row) -> Text:
    if cell.value is None:
        return Text("-", style="dim")
    text = Text(f"{cell.value:.4f}", style="bold" if row.headline else "")
    compared = cell.difference
    if compared is not None:
        unclear = compared.interval is None or compared.interval.covers_zero
        style = "dim" if unclear or not row.is_error else "green" if compared.relative < 0 else "red"
        mark = "~" if row.is_error and compared.interval is not None and compared.interval.covers_zero else ""
        interval = (
            f" [{percent(compared.interval.low)}, {percent(compared.interval.high)}]" if compared.interval else ""
        )
        text.append(
            f"\n{mark}{percent(compared.relative)}{interval}".replace(" %,", ",").replace(" %]", "]"), style=style
        )
    return text


def _error_cell(run: RunRecord, baseline: RunRecord, split: str, part: str) -> Cell:
    result, base = run.evaluations.get(split), baseline.evaluations.get(split)
    if result is None or part not in result.errors:
        return Cell(None)
    compared = difference(result, base, part) if run is not baseline and base and part in base.errors else None
    return Cell(result.errors[part], mean_interval(result, part), compared)


def _drift_cell(run: RunRecord, baseline: RunRecord, metric: str, base: float | None) -> Cell:
    value = run.last(metric)
    if value is None or run is baseline or not base:
        return Cell(value)
    return Cell(value, difference=Difference(value / base - 1, None, True))
