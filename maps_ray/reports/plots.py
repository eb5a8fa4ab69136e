"""The report's plots, as inline SVG that takes its colours from the page: one picture for light and dark.

Text, axes and grid are drawn in marker colours, which become CSS variables; text stays text, so it is sharp and
searchable. Each picture is sized for one column, and readable at the width of a phone.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from maps_ray.metrics import DRIFT, PROJECTION_RATE
from maps_ray.reports.differences import mean_interval
from maps_ray.reports.records import OVERALL, Comparison, RunRecord
from maps_ray.reports.table import drifting_modules, error_parts

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

INK, MUTED, GRID = "#0a0b0c", "#0a0b0d", "#0a0b0e"
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)"}
RUN_COLORS = ("#2f7fe0", "#e2892b", "#1aa37a", "#c3528f", "#7d66d6", "#b0a01f")
BASELINE_COLOR = "#8b95a5"
MODULE_COLORS = ("#5a6ee6", "#e6a21f", "#1fb08f", "#c6437f", "#2aa3d9", "#8ab52c", "#e2623a", "#8d5bd0")
# Names in a spec may hold a dollar sign: no mathematics.
STYLE: dict[RcKeyType, object] = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "maps_ray",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.formatter.limits": (-3, 5),
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
    "lines.linewidth": 1.8,
}
# Inches: two side by side on a desktop, or three of the narrow ones.
WIDTH, HEIGHT, NARROW = 5.0, 2.9, 3.9
_LEGEND_CHARACTERS_PER_INCH = 13.5


def run_colors(comparison: Comparison) -> dict[str, str]:
    """Label to colour: grey for the baseline."""
    others = [run.label for run in comparison.runs if run.label != comparison.baseline]
    colors = {label: RUN_COLORS[index % len(RUN_COLORS)] for index, label in enumerate(others)}
    return {**colors, comparison.baseline: BASELINE_COLOR}


def error_bars(comparison: Comparison, split: str) -> str | None:
    """Action error on one split by part, one bar for each run, whiskers for the 95 % interval."""
    runs = [run for run in comparison.runs if split in run.evaluations]
    parts = error_parts(runs, split)
    if not parts:
        return None
    colors = run_colors(comparison)
    top = max(
        (interval.high if (interval := mean_interval(result, part)) else result.errors[part])
        for run in comparison.runs
        for result in run.evaluations.values()
        for part in result.errors
    )
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure()
        width = 0.74 / len(runs)
        for number, run in enumerate(runs):
            result = run.evaluations[split]
            for place, part in enumerate(parts):
                if part not in result.errors:
                    continue
                x = place + (number - (len(runs) - 1) / 2) * width
                value, interval = result.errors[part], mean_interval(result, part)
                axes.bar(x, value, width * 0.9, color=colors[run.label], label=run.label if place == 0 else None)
                if interval:
                    axes.vlines(x, interval.low, interval.high, color=INK, linewidth=1.1)
                height = interval.high if interval else value
                axes.text(x, height + 0.015 * top, f"{value:.3f}", ha="center", va="bottom", fontsize=7.5, color=MUTED)
        names = ["whole action" if part == OVERALL else part for part in parts]
        axes.set_xticks(range(len(parts)), names)
        axes.tick_params(axis="x", length=0, labelcolor=INK)
        axes.grid(visible=False, axis="x")
        axes.set_ylim(0, 1.13 * top)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        add_legend(figure, axes)
        return to_svg(figure)


def task_errors(comparison: Comparison, split: str) -> str | None:
    """Error of the whole action for each task, one dot for each run."""
    runs = [run for run in comparison.runs if split in run.evaluations and run.evaluations[split].tasks]
    tasks = list(dict.fromkeys(task for run in runs for task in run.evaluations[split].tasks))
    if not tasks:
        return None
    base = comparison.baseline_run.evaluations.get(split)
    if base is not None:
        tasks.sort(key=lambda task: base.tasks.get(task, 0.0))
    colors = run_colors(comparison)
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(WIDTH, 0.75 + 0.4 * len(tasks))
        for row, task in enumerate(tasks):
            values = [run.evaluations[split].tasks[task] for run in runs if task in run.evaluations[split].tasks]
            axes.hlines(row, min(values), max(values), color=GRID, linewidth=2.5, zorder=1)
            name = textwrap.shorten(task, 64, placeholder=" …")
            axes.text(0, row + 0.24, name, fontsize=8, va="bottom", color=INK, transform=axes.get_yaxis_transform())
        for run in reversed(runs):
            points = [
                (run.evaluations[split].tasks[t], row)
                for row, t in enumerate(tasks)
                if t in run.evaluations[split].tasks
            ]
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, s=38, color=colors[run.label], label=run.label, zorder=3, linewidth=0)
        axes.set_ylim(-0.5, len(tasks) - 0.2)
        axes.set_yticks([])
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.margins(x=0.08)
        add_legend(figure, axes, reverse=True)
        return to_svg(figure)


def curves(comparison: Comparison, metric: str) -> str | None:
    """A metric over the steps, one smoothed line for each run over the recorded values; logarithmic where it can be."""
    runs = [run for run in comparison.runs if run.metrics.get(metric)]
    if not runs:
        return None
    colors = run_colors(comparison)
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure()
        lowest = np.inf
        for run in reversed(runs):
            steps, values = _columns(run.metrics[metric])
            lowest = min(lowest, np.nanmin(values))
            axes.plot(steps, values, color=colors[run.label], alpha=0.25, linewidth=1)
            axes.plot(steps, _smooth(values), color=colors[run.label], label=run.label)
        if lowest > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(
                FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
            )
            axes.tick_params(axis="y", which="minor", length=0, labelcolor=MUTED)
        _steps(axes)
        add_legend(figure, axes, reverse=True)
        return to_svg(figure)


def module_curves(comparison: Comparison, prefix: str, run: RunRecord) -> str | None:
    """`<prefix><module>` of one run over the steps, a line for each module; all runs share the scale."""
    modules = [module for module in _modules(comparison, prefix) if run.metrics.get(prefix + module)]
    if not modules:
        return None
    top = max(value for r in comparison.runs for m in r.metrics if m.startswith(prefix) for _, value in r.metrics[m])
    colors = module_colors(comparison)
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(NARROW, NARROW * 0.66)
        for module in modules:
            steps, values = _columns(run.metrics[prefix + module])
            if prefix == PROJECTION_RATE:
                axes.plot(steps, values, color=colors[module], alpha=0.18, linewidth=0.8)
                values = _smooth(values)
            axes.plot(steps, values, color=colors[module], label=module)
        axes.set_ylim(0, 1.06 * top if top > 0 else 1)
        if prefix == PROJECTION_RATE:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
        _steps(axes)
        add_legend(figure, axes)
        return to_svg(figure)


def drift_curves(comparison: Comparison, run: RunRecord) -> str | None:
    """Relative distance from the pretrained weights over the steps, by module."""
    return module_curves(comparison, DRIFT, run)


def projection_curves(comparison: Comparison, run: RunRecord) -> str | None:
    """Share of tensors that were projected over the steps, by module; None for a run that projected nothing."""
    projected = any(
        value > 0 for key in run.metrics if key.startswith(PROJECTION_RATE) for _, value in run.metrics[key]
    )
    return module_curves(comparison, PROJECTION_RATE, run) if projected else None


def strengths(comparison: Comparison) -> str | None:
    """Strength of each layer in stack order, a line for each run, over the names of the stack's modules."""
    runs = [run for run in comparison.runs if run.strengths]
    if not runs:
        return None
    colors = run_colors(comparison)
    families = [row.module.partition(".")[0] for row in runs[0].strengths]
    top = max(row.strength for run in runs for row in run.strengths) or 1.0
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure()
        shades = module_colors(comparison)
        for family in dict.fromkeys(families):
            first, count = families.index(family), families.count(family)
            color = shades.get(family) or next((c for m, c in shades.items() if m.startswith(family)), GRID)
            axes.axvspan(first - 0.5, first + count - 0.5, color=color, alpha=0.13, linewidth=0)
            if count / len(families) > 0.12:
                axes.text(first + count / 2 - 0.5, 1.13 * top, family, ha="center", va="center", fontsize=8, color=INK)
            else:
                height = 1.13 * top
                axes.text(
                    first + count / 2 - 0.5, height, family, ha="center", va="top", fontsize=7, color=MUTED, rotation=90
                )
        for run in reversed(runs):
            values = [row.strength for row in run.strengths]
            edges = np.arange(len(values) + 1) - 0.5
            axes.stairs(values, edges, color=colors[run.label], linewidth=1.8, label=run.label)
            axes.stairs(values, edges, color=colors[run.label], fill=True, alpha=0.18, linewidth=0)
        axes.set_xlim(-0.5, len(families) - 0.5)
        axes.set_ylim(0, 1.22 * top)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("layer, in stack order")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        add_legend(figure, axes, reverse=True)
        return to_svg(figure)


def module_colors(comparison: Comparison) -> dict[str, str]:
    """Module to colour, along the stack."""
    modules = _modules(comparison, DRIFT) or _modules(comparison, PROJECTION_RATE)
    modules = list(dict.fromkeys([*modules, *_modules(comparison, PROJECTION_RATE)]))
    return {module: MODULE_COLORS[index % len(MODULE_COLORS)] for index, module in enumerate(modules)}


def _modules(comparison: Comparison, prefix: str) -> list[str]:
    if prefix == DRIFT:
        return drifting_modules(comparison.runs)
    modules = dict.fromkeys(
        k.removeprefix(prefix) for run in comparison.runs for k in run.metrics if k.startswith(prefix)
    )
    order = drifting_modules(comparison.runs)
    return sorted(modules, key=lambda module: order.index(module) if module in order else len(order))


def new_figure(width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, in inches; make and draw it within `STYLE`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def add_legend(figure: Figure, axes: Axes, reverse: bool = False) -> None:
    """A legend above the axes, read row by row; `reverse` where lines were drawn last to first."""
    entries = list(zip(*axes.get_legend_handles_labels(), strict=True))
    entries = entries[::-1] if reverse else entries
    if not entries:
        return
    longest = max(len(str(label)) for _, label in entries)
    width = int(figure.get_figwidth() * _LEGEND_CHARACTERS_PER_INCH)
    fits_in_one_row = sum(len(str(label)) + 5 for _, label in entries) <= width
    columns = len(entries) if fits_in_one_row else max(1, min(len(entries), width // (longest + 5)))
    # matplotlib fills column by column.
    entries = [entry for column in range(columns) for entry in entries[column::columns]]
    handles, labels = zip(*entries, strict=True)
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=columns,
        fontsize=8.5,
        handlelength=1.1,
        handleheight=0.8,
        columnspacing=1.4,
        borderaxespad=0.2,
    )


def _steps(axes: Axes) -> None:
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.margins(x=0.02)
    axes.set_xlim(left=0)


def _columns(points: Sequence[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([step for step, _ in points]), np.array([value for _, value in points], dtype=np.float64)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving mean over a twentieth of the curve, narrower at its ends."""
    reach = max(len(values) // 40, 0)
    return np.array([values[max(i - reach, 0) : i + reach + 1].mean() for i in range(len(values))])


def to_svg(figure: Figure) -> str:
    """The figure as an inline SVG without size, in the page's colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # The page sets the size.
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Groups are named alike in every picture; only what is referred to keeps its id.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for marker, variable in _VARIABLES.items():
        svg = svg.replace(marker, variable)
    return svg


def with_own_ids(svg: str, prefix: str) -> str:
    """The picture with `prefix` before each id, so that several may stand in one page."""
    return re.sub(r'(id="|url\(#|href="#)', lambda match: f"{match[0]}{prefix}-", svg)


def success_rates(comparison: Comparison) -> str | None:
    """Success by suite, one dot for each run, whiskers for the 95 % Wilson interval."""
    runs = [(run.label, run.rollouts) for run in comparison.runs if run.rollouts]
    suites = list(dict.fromkeys(name for _, rollouts in runs for name in rollouts.suites))
    if not suites:
        return None
    colors = run_colors(comparison)
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(WIDTH, 0.9 + 0.55 * len(suites))
        for number, (label, rollouts) in enumerate(runs):
            shift = 0.12 * ((len(runs) - 1) / 2 - number)
            for row, name in enumerate(reversed(suites)):
                if name not in rollouts.suites:
                    continue
                rate = rollouts.suites[name].success
                axes.hlines(row + shift, *rate.interval, color=colors[label], linewidth=1.4)
                named = label if name == suites[-1] else None
                axes.scatter(rate.value, row + shift, s=34, color=colors[label], label=named, zorder=3, linewidth=0)
        for row, name in enumerate(reversed(suites)):
            place = axes.get_yaxis_transform()
            axes.text(0, row + 0.26, name, fontsize=8, va="bottom", color=INK, transform=place)
        axes.set_ylim(-0.5, len(suites) - 0.35)
        axes.set_yticks([])
        axes.set_xlim(-0.02, 1.02)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.tick_params(axis="x", labelcolor=MUTED)
        add_legend(figure, axes)
        return to_svg(figure)
