"""How schedules do where training did not show the way: the figures of docs/evidence.md.

    maps-ray sweep jobs/sweep_evidence.yaml
    maps-ray collect --suite libero_object_swap --episodes 3 --out demos/swap
    maps-ray collect --suite libero_object_lan --episodes 3 --out demos/lan
    python benchmarks/evidence.py runs/evidence --swap demos/swap --lan demos/lan

Every run of the sweep is evaluated on the same episodes: offline action error on demonstrations, then success in the
simulator. In distribution are the eight tasks of training; out of distribution are libero_object's other two, the eight
with swapped positions (LIBERO-PRO `_swap`), and the eight in other words (`_lan`). Rollouts start from initial states
that no demonstration of the training data starts from. What is finished is kept: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from scipy.stats import t

from maps_ray.evaluation.rollouts import Evaluation, Progress, RolloutRequest, evaluate
from maps_ray.evaluation.rollouts.statistics import Rate
from maps_ray.spec import SplitSpec
from maps_ray.sweeps.journal import Journal
from maps_ray.training.offline import error_on

SUITE, SWAPPED, REWORDED = "libero_object", "libero_object_swap", "libero_object_lan"
UNSEEN_TASKS = (4, 8)  # ketchup, chocolate pudding
TRAINED_TASKS = tuple(index for index in range(10) if index not in UNSEEN_TASKS)
TRAINED = SplitSpec(exclude_tasks=["*ketchup*", "*chocolate pudding*"])
CONDITIONS = ("in distribution", "unseen tasks", "swapped positions", "other words")
SETTINGS = {"gripper": "libero", "cameras": ["image", "wrist_image"], "camera_size": 128}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="folder of the finished sweep")
    parser.add_argument("--swap", type=Path, required=True, help=f"demonstrations of {SWAPPED}")
    parser.add_argument("--lan", type=Path, required=True, help=f"demonstrations of {REWORDED}")
    parser.add_argument("--episodes", type=int, default=1, help="rollouts of each task; 0 leaves them out")
    parser.add_argument("--tasks", type=int, default=len(TRAINED_TASKS), help="of training, that are rolled out")
    parser.add_argument("--first-state", type=int, default=10, help="initial state of the first rollout")
    options = parser.parse_args()
    out = options.sweep / "evidence"
    out.mkdir(exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {}
    for schedule, run_dir in runs(options.sweep):
        kept = out / f"{run_dir.name}.json"
        if kept.is_file():
            result = json.loads(kept.read_text())
        else:
            result = {"error": errors(run_dir, options.swap, options.lan)}
            kept.write_text(json.dumps(result, indent=1))
        if options.episodes:
            result["success"] = successes(run_dir, out / run_dir.name, options)
        found.setdefault(schedule, []).append(result)
    print(error_table(found))
    if options.episodes:
        print(success_table(found))


def runs(sweep: Path) -> Iterator[tuple[str, Path]]:
    """(schedule, folder) of each run that finished, seeds of a schedule together."""
    journal = Journal(sweep)
    for number, schedule in journal.schedules.items():
        for ended in journal.results(number):
            if ended.status == "finished":
                yield ("MAPS" if schedule.source == "known" else schedule.label), sweep / "trials" / ended.trial


def errors(run_dir: Path, swap: Path, lan: Path) -> dict[str, float]:
    """Condition -> action error (L1, normalised)."""
    splits = json.loads((run_dir / "evaluation.json").read_text())[-1]["splits"]
    return {
        CONDITIONS[0]: splits["held_out"]["action_l1"],
        CONDITIONS[1]: splits["ood"]["action_l1"],
        CONDITIONS[2]: error_on(run_dir, swap, TRAINED)["action_l1"],
        CONDITIONS[3]: error_on(run_dir, lan, TRAINED)["action_l1"],
    }


def successes(run_dir: Path, out: Path, options: argparse.Namespace) -> dict[str, dict[str, tuple[int, int]]]:
    """Condition -> success or part of the task -> (episodes that reached it, episodes)."""

    def show(progress: Progress) -> None:
        print(f"\r{run_dir.name}: {progress.done} of {progress.total} episodes", end="", flush=True)

    def roll_out(tasks: tuple[int, ...], *suites: str) -> Evaluation:
        states = {"episodes": options.episodes, "first_state": options.first_state}
        request = RolloutRequest(suites, tasks=tasks, settings=SETTINGS, **states)
        return evaluate(run_dir, request, out, on_progress=show)

    trained = roll_out(TRAINED_TASKS[: options.tasks], SUITE, SWAPPED, REWORDED)
    unseen = roll_out(UNSEEN_TASKS, SUITE)
    print()
    groups = [trained.suite(SUITE), unseen.suite(SUITE), trained.suite(SWAPPED), trained.suite(REWORDED)]
    return {
        condition: {
            name: (rate.successes, rate.episodes)
            for name, rate in {"success": group.success, **group.sub_goals}.items()
        }
        for condition, group in zip(CONDITIONS, groups, strict=True)
    }


def error_table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Mean over seeds with a 95 % t-interval."""
    lines = ["| action error | " + " | ".join(CONDITIONS) + " |", "|---" * (len(CONDITIONS) + 1) + "|"]
    for schedule, results in found.items():
        cells = [_mean([result["error"][condition] for result in results]) for condition in CONDITIONS]
        lines.append(f"| {schedule} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def success_table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Episodes of all seeds together, with Wilson's 95 % interval for success."""
    lines = ["| rollouts | | " + " | ".join(CONDITIONS) + " |", "|---" * (len(CONDITIONS) + 2) + "|"]
    for schedule, results in found.items():
        for name in results[0]["success"][CONDITIONS[0]]:
            cells = []
            for condition in CONDITIONS:
                counts = [result["success"][condition][name] for result in results]
                rate = Rate(sum(count[0] for count in counts), sum(count[1] for count in counts))
                low, high = rate.interval
                interval = f" ({low:.0%} .. {high:.0%})" if name == "success" else ""
                cells.append(f"{rate.successes} of {rate.episodes}{interval}")
            lines.append(f"| {schedule} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _mean(values: list[float]) -> str:
    mean = fmean(values)
    if len(values) < 2:
        return f"{mean:.4f}"
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = float(t.ppf(0.975, len(values) - 1)) * (variance / len(values)) ** 0.5
    return f"{mean:.4f} ± {half:.4f}"


if __name__ == "__main__":
    main()
