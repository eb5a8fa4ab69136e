"""Tables and pictures of the evidence, from the small files of `results` alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from evidence_analysis import Comparison, Stratum, compare, paired
from evidence_measures import SUITES, episodes_of, read_results
from matplotlib.figure import Figure

from maps_ray.evaluation.simulators.metaworld_small import PREFIX

PLAIN, PAPER = "full_fine_tuning", "maps_paper"
NAMES = {
    "full_fine_tuning": "plain Adam",
    "freeze_dinov2": "DINOv2 frozen",
    "freeze_siglip": "SigLIP frozen",
    "freeze_vision": "both towers frozen",
    "freeze_language": "language frozen",
    "uniform_spd": "uniform SPD",
    "l2_sp": "L2-SP",
    "maps_paper": "MAPS, paper",
    "maps_released": "MAPS, released",
    "maps_reversed": "MAPS, reversed order",
    "lora": "LoRA",
    "lp_ft_200": "LP-FT",
    "ema": "EMA",
    "wise_ft": "WiSE-FT of plain",
    "lines": "LiNeS of plain",
    "winner": "the search's winner",
}
"""Arm -> what it is called, in the order of the tables."""
ARMS = [arm for arm in NAMES if arm != "winner"]
MEASURES: dict[str, tuple[str, ...]] = {"ID": SUITES[:1], "OOD": SUITES[1:]}
_SHORT = {suite: suite.removeprefix(f"{PREFIX}_") if suite != PREFIX else "ID" for suite in SUITES}

Results = Sequence[Mapping[str, Any]]


def write_report(folder: Path, out: Path) -> Path:
    """Writes `tables.md` and pictures.

    Args:
        folder: of the experiment; its `results` are read.
        out: folder for what is written.

    Returns:
        The tables' file.
    """
    out.mkdir(parents=True, exist_ok=True)
    results = folder / "results"
    base = json.loads((results / "base.json").read_text(encoding="utf-8")) if (results / "base.json").is_file() else {}
    parts = [arms_part(read_results(results / "arms"), base, out), confirm_part(read_results(results / "confirm"))]
    search = results / "search.json"
    parts.append(search_part(json.loads(search.read_text(encoding="utf-8")) if search.is_file() else [], out))
    tables = out / "tables.md"
    tables.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return tables


def arms_part(found: Results, base: Mapping[str, float], out: Path) -> str:
    """What was measured of the arms: counts always, comparisons where two seeds at least have every arm."""
    if not found:
        return "No run has been measured."
    seeds = complete_seeds(found, ARMS)
    lines = [f"{len(found)} runs measured; seeds with all {len(ARMS)} arms: {len(seeds)}.", ""]
    lines += success_table(found)
    if len(seeds) > 1:
        comparisons = {name: compare_arms(found, ARMS, PLAIN, seeds, suites) for name, suites in MEASURES.items()}
        for name, comparison in comparisons.items():
            lines += ["", *difference_table(f"success, {name}", comparison)]
        draw_differences(comparisons, out / "differences.svg")
    trained = [result for result in found if "failed" not in result]
    lines += ["", *other_table(trained, base)]
    for result in found:
        if "failed" in result:
            lines += ["", f"{NAMES[result['arm']]}, seed {result['seed']}, counts as 0 %: {result['failed']}"]
    return "\n".join(lines)


def confirm_part(found: Results) -> str:
    """The search's winner against the paper's order, on fresh seeds and states."""
    arms = [PAPER, "winner"]
    seeds = complete_seeds(found, arms)
    if len(seeds) < 2:
        return f"The winner on fresh seeds: {len(found)} of 10 runs measured."
    lines = []
    for name, suites in MEASURES.items():
        comparison = compare_arms(found, arms, PAPER, seeds, suites)
        lines += ["", *difference_table(f"fresh seeds and states, {name}", comparison)]
    return "\n".join(lines[1:])


def complete_seeds(found: Results, arms: Sequence[str]) -> list[int]:
    """Seeds of which every arm was measured."""
    have = {(result["arm"], result["seed"]) for result in found}
    return [seed for seed in sorted({seed for _, seed in have}) if all((arm, seed) in have for arm in arms)]


def compare_arms(
    found: Results, arms: Sequence[str], control: str, seeds: Sequence[int], suites: Sequence[str]
) -> Comparison:
    """Compares arms by the mean over suites of the mean over tasks."""
    by_run = {(result["arm"], result["seed"]): result for result in found}
    cells: dict[tuple[str, int], dict[tuple[int, int, int], bool]] = {}
    for a, arm in enumerate(arms):
        for s, seed in enumerate(seeds):
            for suite, task, state, success in episodes_of(by_run[arm, seed], suites):  # type: ignore[arg-type]
                cells.setdefault((suite, task), {})[a, s, state] = success
    strata = []
    tasks = {suite: sum(key[0] == suite for key in cells) for suite in suites}
    for (suite, _), values in cells.items():
        states = sorted({state for _, _, state in values})
        array = np.array(
            [[[values[a, s, e] for e in states] for s in range(len(seeds))] for a in range(len(arms))], float
        )
        strata.append(Stratum(1 / len(suites) / tasks[suite], array))
    return compare(arms, control, strata)


def rate(result: Mapping[str, Any], suites: Sequence[str]) -> float:
    """A run's measure: mean over suites of the mean over tasks, which have equally many episodes."""
    return float(np.mean([np.mean([success for _, _, success in result["success"][suite]]) for suite in suites]))


def success_table(found: Results) -> list[str]:
    """Mean over the seeds measured; with their standard deviation, where there are several."""
    lines = ["| success, % | seeds | ID | OOD | " + " | ".join(_SHORT[suite] for suite in SUITES[1:]) + " |"]
    lines.append("|---|--:" + "|--:" * (len(SUITES) + 1) + "|")
    for arm in _present(found):
        own = [result for result in found if result["arm"] == arm]
        columns = [[rate(result, suites) for result in own] for suites in MEASURES.values()]
        columns += [[rate(result, [suite]) for result in own] for suite in SUITES[1:]]
        cells = [_spread(column, 100, 0) for column in columns]
        lines.append(f"| {NAMES[arm]} | {len(own)} | " + " | ".join(cells) + " |")
    return lines


def difference_table(title: str, comparison: Comparison) -> list[str]:
    """Each arm against the control, with the design's power."""
    lines = [f"| {title} | mean, 95 % | difference, 95 % | p | p, Holm |", "|---|--:|--:|--:|--:|"]
    shifts = {found.arm: found for found in comparison.differences}
    for arm, mean in comparison.means.items():
        low, high = comparison.intervals[arm]
        own = f"| {NAMES[arm]} | {mean:.1%} ({low:.0%} .. {high:.0%}) |"
        if arm in shifts:
            shift = shifts[arm]
            low, high = shift.interval
            own += f" {100 * shift.mean:+.1f} ({100 * low:+.0f} .. {100 * high:+.0f}) | {shift.p_value:.3f} |"
            own += f" {shift.adjusted:.3f}{' *' if shift.told_apart else ''} |"
        else:
            own += " | | |"
        lines.append(own)
    lines += [
        "",
        f"Told apart with a power of 80 %: {100 * comparison.smallest:.0f} points after Holm's first step, "
        f"{100 * comparison.smallest_alone:.0f} in one comparison alone.",
    ]
    return lines


def other_table(found: Results, base: Mapping[str, float]) -> list[str]:
    """Forgetting (the base's own objective on held-out scenes, first before fine-tuning), drift and offline error."""
    if not found:
        return []
    modules = list(found[0]["drift"])
    head = ["answers, nats", "patches named, %", "pointing, %", *(f"drift {module}" for module in modules)]
    head += ["offline error ID", "offline error OOD"]
    lines = ["| what else | " + " | ".join(head) + " |", "|---" + "|--:" * len(head) + "|"]
    if base:
        first = [f"{base['answer_loss']:.2f}", f"{100 * base['naming']:.0f}", f"{100 * base['pointing']:.0f}"]
        lines.append("| the base | " + " | ".join([*first, *["0"] * len(modules), "", ""]) + " |")
    for arm in _present(found):
        own = [result for result in found if result["arm"] == arm]
        cells = [_spread([result["grounding"]["answer_loss"] for result in own], 1, 2)]
        cells += [_spread([result["grounding"][name] for result in own], 100, 0) for name in ("naming", "pointing")]
        cells += [_spread([result["drift"][module] for result in own], 1, 3) for module in modules]
        for suites in MEASURES.values():
            known = [float(np.mean([r["offline"][s] for s in suites])) for r in own if r["offline"]]
            cells.append(_spread(known, 1, 3) if known else "")
        lines.append(f"| {NAMES[arm]} | " + " | ".join(cells) + " |")
    shifts = paired(_complete({arm: _losses(found, arm) for arm in _present(found)}), PLAIN) if _plain(found) else {}
    if shifts:
        told = [f"{NAMES[arm]} {mean:+.2f} ({low:+.2f} .. {high:+.2f})" for arm, (mean, low, high) in shifts.items()]
        lines += ["", "Cross-entropy of the answers against plain Adam, 95 % over seeds: " + "; ".join(told[1:]) + "."]
    return lines


def search_part(trials: Sequence[Mapping[str, Any]], out: Path) -> str:
    """The best schedules of the search, and its map of orders and strengths."""
    ended = [trial for trial in trials if "rollout/ood/success" in trial["values"]]
    if not ended:
        return "The search has not ended."
    best = sorted(ended, key=lambda trial: -trial["values"]["rollout/ood/success"])[:10]
    lines = [f"{len(trials)} schedules searched. The ten best:", "", "| schedule | shape | lambda_max | steps | OOD |"]
    lines.append("|---|---|--:|--:|--:|")
    for trial in best:
        proximity = trial["proximity"]
        success = trial["values"]["rollout/ood/success"]
        strength = proximity.get("lambda_max", 1.0)
        shape = proximity.get("shape", "linear")
        lines.append(f"| {trial['label']} | {shape} | {strength:.2f} | {trial['step']} | {success:.0%} |")
    draw_map(ended, out / "map.svg")
    return "\n".join(lines)


def draw_differences(comparisons: Mapping[str, Comparison], path: Path) -> None:
    """Differences from plain Adam with their 95 % intervals, one panel for each measure."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    for number, (name, comparison) in enumerate(comparisons.items()):
        axes = figure.add_subplot(1, len(comparisons), number + 1)
        for row, found in enumerate(reversed(comparison.differences)):
            low, high = found.interval
            axes.plot([100 * low, 100 * high], [row, row], color="black" if found.told_apart else "grey")
            axes.plot(100 * found.mean, row, "o", color="black" if found.told_apart else "grey")
        axes.axvline(0, color="black", linewidth=0.5)
        labels = [NAMES[found.arm] for found in reversed(comparison.differences)]
        axes.set_yticks(range(len(labels)), labels if number == 0 else [""] * len(labels))
        axes.set_xlabel(f"success against plain Adam, {name}, points")
    figure.savefig(path)


def draw_map(trials: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Success out of distribution over order and strength; the area says how many steps a trial had."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    orders = sorted({trial["label"] for trial in trials})
    most = max(trial["step"] for trial in trials)
    points = axes.scatter(
        [orders.index(trial["label"]) for trial in trials],
        [trial["proximity"].get("lambda_max", 1.0) for trial in trials],
        c=[100 * trial["values"]["rollout/ood/success"] for trial in trials],
        s=[20 + 100 * trial["step"] / most for trial in trials],
    )
    axes.set_yscale("log")
    axes.set_xticks(range(len(orders)), orders, rotation=90)
    axes.set_ylabel("lambda_max")
    figure.colorbar(points, label="success OOD, %")
    figure.savefig(path)


def _present(found: Results) -> list[str]:
    return [arm for arm in NAMES if any(result["arm"] == arm for result in found)]


def _losses(found: Results, arm: str) -> dict[int, float]:
    return {result["seed"]: result["grounding"]["answer_loss"] for result in found if result["arm"] == arm}


def _complete(values: Mapping[str, Mapping[int, float]]) -> dict[str, list[float]]:
    """The seeds that all arms have."""
    shared = set.intersection(*(set(own) for own in values.values()))
    return {arm: [own[seed] for seed in sorted(shared)] for arm, own in values.items()} if len(shared) > 1 else {}


def _plain(found: Results) -> bool:
    return bool(_complete({arm: _losses(found, arm) for arm in _present(found)})) and bool(_losses(found, PLAIN))


def _spread(values: Sequence[float], factor: float, digits: int) -> str:
    mean = factor * float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {factor * float(np.std(values, ddof=1)):.{digits}f}"
