"""The plots of a sweep's report, in the style of a comparison's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator

from maps_ray.reports.plots import (
    BASELINE_COLOR,
    GRID,
    INK,
    MODULE_COLORS,
    MUTED,
    RUN_COLORS,
    STYLE,
    WIDTH,
    add_legend,
    new_figure,
    to_svg,
)

_SEARCHED, _KNOWN, _MERGED = RUN_COLORS[:3]


class Value(Protocol):
    @property
    def mean(self) -> float: ...
    @property
    def spread(self) -> float | None: ...


class Result(Protocol):
    """A schedule with its results, as `maps_ray.sweeps.record.ScheduleResult`."""

    @property
    def label(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def values(self) -> Mapping[str, Value]: ...
    @property
    def positions(self) -> Mapping[str, int]: ...
    @property
    def strengths(self) -> Mapping[str, float]: ...
    @property
    def drift(self) -> Mapping[str, float]: ...


class Moment(Protocol):
    @property
    def minutes(self) -> float: ...
    @property
    def nodes(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def pending(self) -> int: ...


def pareto(results: Sequence[Result], front: Sequence[Result], x: str, y: str, more_x: bool = False) -> str | None:
    """Two objectives against each other, the schedules that none beats joined by a line, baselines named.

    Args:
        results: all that are shown.
        front: those that none beats.
        x: metric to the right.
        y: metric upwards.
        more_x: more of `x` is better.
    """
    if not results:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(WIDTH, 3.4)
        line = sorted((r.values[x].mean, r.values[y].mean) for r in front)
        # The line bounds what the schedules reach: a point holds from its x on towards the worse.
        where: Literal["pre", "post"] = "pre" if more_x else "post"
        axes.step(*zip(*line, strict=True), where=where, color=MUTED, linewidth=1, label="Pareto set")
        for source, color, marker in (
            ("searched", _SEARCHED, "o"),
            ("known", _KNOWN, "s"),
            ("merged", _MERGED, "^"),
            ("baseline", BASELINE_COLOR, "D"),
        ):
            members = [r for r in results if r.source == source]
            if not members:
                continue
            (at_x, at_y) = ([r.values[name].mean for r in members] for name in (x, y))
            (wide, high) = ([r.values[name].spread or 0.0 for r in members] for name in (x, y))
            axes.errorbar(at_x, at_y, yerr=high, xerr=wide, fmt="none", ecolor=GRID, elinewidth=1.2, zorder=1)
            axes.scatter(at_x, at_y, s=30, color=color, marker=marker, label=source, linewidth=0, zorder=3)
        named = [r for r in results if r.source == "baseline" or r in front]
        for r in named:
            axes.annotate(
                r.label, (r.values[x].mean, r.values[y].mean), (4, 3), textcoords="offset points", fontsize=7, color=INK
            )
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.margins(0.12)
        add_legend(figure, axes)
        return to_svg(figure)


def by_position(results: Sequence[Result], objective: str) -> str | None:
    """Mean of an objective over the schedules that have a module at a place, a line for each module."""
    results = [r for r in results if r.positions]
    modules = _modules(results)
    if not modules or len({tuple(r.positions.values()) for r in results}) < 2:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure()
        for index, module in enumerate(modules):
            places: dict[int, list[float]] = {}
            for r in results:
                places.setdefault(r.positions[module], []).append(r.values[objective].mean)
            x = sorted(places)
            color = MODULE_COLORS[index % len(MODULE_COLORS)]
            axes.plot(x, [np.mean(places[place]) for place in x], "o-", color=color, markersize=4, label=module)
        axes.set_xlabel("place in the order, 1 is held most")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        add_legend(figure, axes)
        return to_svg(figure)


def by_strength(results: Sequence[Result], objective: str) -> str | None:
    """An objective against the mean strength of each module, a colour for each module."""
    results = [r for r in results if r.strengths]
    modules = [m for m in _modules(results) if len({r.strengths[m] for r in results}) > 1]
    if not modules:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure()
        for index, module in enumerate(modules):
            color = MODULE_COLORS[index % len(MODULE_COLORS)]
            x = [r.strengths[module] for r in results]
            axes.scatter(x, [r.values[objective].mean for r in results], s=16, color=color, label=module, linewidth=0)
        axes.set_xlabel("mean strength of the module's layers")
        add_legend(figure, axes)
        return to_svg(figure)


def drift(results: Sequence[Result]) -> str | None:
    """Relative distance from the pretrained weights, a row for each schedule, a dot for each module."""
    results = [r for r in results if r.drift]
    modules = list(dict.fromkeys(module for r in results for module in r.drift))
    if not modules:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(WIDTH, 0.9 + 0.26 * len(results))
        rows = range(len(results) - 1, -1, -1)
        for row, r in zip(rows, results, strict=True):
            axes.hlines(row, min(r.drift.values()), max(r.drift.values()), color=GRID, linewidth=2, zorder=1)
        for index, module in enumerate(modules):
            drifts = [(r.drift[module], row) for row, r in zip(rows, results, strict=True) if module in r.drift]
            x, y = zip(*drifts, strict=True)
            axes.scatter(
                x, y, s=26, color=MODULE_COLORS[index % len(MODULE_COLORS)], label=module, linewidth=0, zorder=3
            )
        axes.set_yticks(list(rows), [r.label for r in results])
        axes.tick_params(axis="y", labelcolor=INK, labelsize=8)
        axes.grid(visible=False, axis="y")
        axes.set_xlim(left=0)
        axes.set_xlabel("‖θ \N{MINUS SIGN} θ₀‖ / ‖θ₀‖")
        add_legend(figure, axes)
        return to_svg(figure)


def shares(parts: Sequence[tuple[str, float, float | None, float | None]]) -> str | None:
    """A bar for each share of the variance, with the least and the most that one seed gives.

    Args:
        parts: (name, share, least, most), the largest share first.
    """
    if not parts:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(WIDTH, 0.9 + 0.24 * len(parts))
        rows = list(range(len(parts) - 1, -1, -1))
        axes.barh(rows, [share for _, share, _, _ in parts], height=0.62, color=_SEARCHED)
        for row, (_, _, least, most) in zip(rows, parts, strict=True):
            if least is not None and most is not None:
                axes.plot([least, most], [row, row], color=INK, linewidth=1.2)
        axes.set_yticks(rows, [name for name, _, _, _ in parts])
        axes.tick_params(axis="y", labelcolor=INK, labelsize=8)
        axes.grid(visible=False, axis="y")
        axes.set_xlim(left=0)
        axes.set_xlabel("share of the variance")
        return to_svg(figure)


def slices(columns: Mapping[str, Sequence[float | str]], values: Sequence[float]) -> str | None:
    """An objective against each of a few coordinates, side by side."""
    if not columns:
        return None
    with matplotlib.rc_context(STYLE):
        figure, _ = new_figure(WIDTH, 2.6)
        figure.clear()
        panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
        for axes, (name, column) in zip(panels, columns.items(), strict=True):
            axes.scatter(column, values, s=14, color=_SEARCHED, linewidth=0)
            axes.set_xlabel(name, fontsize=7)
            axes.tick_params(labelsize=7)
        return to_svg(figure)


def parallel(columns: Mapping[str, Sequence[float | str]], objective: str, values: Sequence[float]) -> str | None:
    """A line for each schedule over its coordinates to the objective, whose value colours it. Each axis goes from its
    least value to its greatest, or through its names in alphabetical order.
    """
    axes_of: dict[str, Sequence[float | str]] = {**columns, objective: list(values)}
    if len(axes_of) < 2 or len(values) < 2:
        return None
    heights, ends = [], []
    for column in axes_of.values():
        words = sorted({value for value in column if isinstance(value, str)})
        places = [float(words.index(value)) if isinstance(value, str) else value for value in column]
        least, most = min(places), max(places)
        heights.append([(place - least) / (most - least) if most > least else 0.5 for place in places])
        ends.append((words[0], words[-1]) if words else (f"{least:.3g}", f"{most:.3g}"))
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(WIDTH, 3.4)
        for line in sorted(zip(*heights, strict=True), key=lambda line: -line[-1]):
            axes.plot(range(len(line)), line, color=matplotlib.colormaps["viridis"](line[-1]), linewidth=1, alpha=0.8)
        for place, (lower, upper) in enumerate(ends):
            axes.axvline(place, color=MUTED, linewidth=0.8)
            for height, text, side in ((-0.03, lower, "top"), (1.03, upper, "bottom")):
                axes.text(place, height, text, fontsize=6.5, color=INK, ha="center", va=side)
        axes.set_xticks(range(len(axes_of)), list(axes_of), rotation=30, ha="right", fontsize=7)
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.set_ylim(-0.12, 1.12)
        return to_svg(figure)


def contour(x: tuple[str, Sequence[float]], y: tuple[str, Sequence[float]], values: Sequence[float]) -> str | None:
    """An objective over two coordinates, interpolated between the schedules that were run, which are dots."""
    if len(set(zip(x[1], y[1], strict=True))) < 4 or len(set(x[1])) < 2 or len(set(y[1])) < 2:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(WIDTH, 3.2)
        try:
            filled = axes.tricontourf(x[1], y[1], values, levels=10, cmap="viridis")
        except (RuntimeError, ValueError):
            # All points on one line.
            return None
        figure.colorbar(filled, ax=axes)
        axes.scatter(x[1], y[1], s=10, color=INK, linewidth=0)
        axes.set_xlabel(x[0])
        axes.set_ylabel(y[0])
        return to_svg(figure)


def course(lines: Mapping[str, Sequence[tuple[int, float]]], copies: Sequence[tuple[str, str, int]]) -> str | None:
    """A strength over the steps of each trial; a ring marks where another was copied from, a dot where it goes on.

    Args:
        lines: trial -> (optimizer step from which it holds, value), the last one at the trial's end.
        copies: (trial, trial that it continued from, step).
    """
    if not copies:
        return None
    at = {name: lambda step, points=points: [v for s, v in points if s <= step][-1] for name, points in lines.items()}
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(WIDTH, 3.0)
        for index, (name, points) in enumerate(lines.items()):
            color = MODULE_COLORS[index % len(MODULE_COLORS)]
            axes.step(*zip(*points, strict=True), where="post", color=color, label=name, linewidth=1.6)
        for trial, source, step in copies:
            ends = [at[source](step - 1), at[trial](step)]
            axes.plot([step, step], ends, ":", color=MUTED, linewidth=1)
            axes.plot([step], [ends[0]], "o", color=INK, markersize=7, fillstyle="none", zorder=4)
            axes.plot([step], [ends[1]], "o", color=INK, markersize=4, zorder=4)
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=0)
        add_legend(figure, axes)
        return to_svg(figure)


def timeline(moments: Sequence[Moment]) -> str | None:
    """Nodes of the cluster, running and waiting trials over the time of the sweep."""
    if len(moments) < 2:
        return None
    minutes = [moment.minutes for moment in moments]
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure()
        for name, color in (("nodes", INK), ("running", _SEARCHED), ("pending", _KNOWN)):
            counts = [getattr(moment, name) for moment in moments]
            axes.step(minutes, counts, where="post", color=color, label=name, linewidth=1.5)
        axes.set_xlabel("minutes")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=0)
        add_legend(figure, axes)
        return to_svg(figure)


def _modules(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(module for r in results for module in r.positions))
