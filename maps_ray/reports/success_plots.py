"""The plot of success rates, in the style of a comparison's others."""

from __future__ import annotations

import matplotlib
from matplotlib.ticker import FuncFormatter

from maps_ray.reports.plots import INK, MUTED, STYLE, WIDTH, add_legend, new_figure, run_colors, to_svg
from maps_ray.reports.records import Comparison


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
