"""What a sweep would do, in the terminal, without starting anything."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from maps_ray.sweeps.objectives import aims
from maps_ray.sweeps.schedules import Plan, Schedule, letters_of
from maps_ray.sweeps.searchers import make_searcher

SAMPLES = 6
# A small space gives the same schedules again and again, and never as many as are shown.
_MOST_DRAWS = 100


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Prints the known schedules, the baselines and the first samples, the workers, and the cost."""
    console = console or Console()
    first = [schedule for schedule in first_schedules(plan) if schedule.source != "merged"]
    modules = list(plan.resolved({}).strengths)
    table = Table(
        title=f"{plan.spec.name}: known schedules, baselines, first samples", title_justify="left", box=SIMPLE
    )
    for name in ("schedule", "shape"):
        table.add_column(name, no_wrap=True)
    letters = letters_of(modules)
    for module in modules:
        table.add_column(letters[module], justify="right", no_wrap=True)
    names = ", ".join(f"{letters[module]} {module}" for module in modules)
    table.caption = f"mean strength of each module's layers: {names}"
    table.caption_justify = "left"
    for before, schedule in zip([None, *first], first, strict=False):
        if before is not None and before.source != schedule.source:
            table.add_section()
        facts = plan.resolved(schedule.proximity)
        shape = schedule.proximity.get("shape", plan.base.proximity.shape)
        cells = ["frozen" if m in facts.frozen else f"{facts.strengths[m]:.2f}" for m in modules]
        table.add_row(schedule.label, "" if schedule.proximity.get("strengths") else shape, *cells)
    if first:
        console.print(table)
    for line in plan_lines(plan):
        # Paths may have brackets, which are rich's markup.
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def plan_data(plan: Plan) -> dict[str, object]:
    """What `print_plan` prints, as JSON values."""
    schedules = []
    for schedule in first_schedules(plan):
        if schedule.source != "merged":
            resolved = plan.resolved(schedule.proximity)
            schedules.append(
                {
                    "label": schedule.label,
                    "source": schedule.source,
                    "proximity": schedule.proximity,
                    "strengths": dict(resolved.strengths),
                    "frozen": list(resolved.frozen),
                }
            )
    return {"name": plan.spec.name, "schedules": schedules, "notes": plan_lines(plan)}


def first_schedules(plan: Plan) -> Iterator[Schedule]:
    """All that is known before the search, then what the searcher proposes while nothing has been measured."""
    known = plan.known()
    yield from known
    if not plan.space.dimensions:
        return
    points = [schedule.point for schedule in known if schedule.point is not None]
    searcher = make_searcher(plan.spec, plan.space, points)
    left = SAMPLES
    if plan.spec.num_samples is not None:
        left = min(left, plan.spec.num_samples - len(plan.spec.known_strengths))
    seen = {plan.identity(schedule.proximity) for schedule in known}
    for number in itertools.count(len(known)):
        point = searcher.suggest(str(number)) if left > 0 and number < len(known) + _MOST_DRAWS else None
        if not isinstance(point, dict):
            return
        schedule = plan.drawn(number, point)
        identity = plan.identity(schedule.proximity)
        if identity not in seen:
            seen.add(identity)
            left -= 1
            yield schedule


def plan_lines(plan: Plan) -> list[str]:
    """Search, workers and cost, a line each."""
    spec, base = plan.spec, plan.base
    cluster, training = base.cluster, base.training
    stopping = f", {spec.scheduler.name}" if spec.scheduler.name != "none" else ""
    grid = f" of {plan.space.grid_size} points" if spec.searcher.name == "grid" else ""
    gpus = f" and {cluster.gpus_per_worker} GPUs" if cluster.gpus_per_worker != "auto" else ""
    most = f"at most {spec.max_concurrent}" if spec.max_concurrent else "as many as the cluster can hold"
    lines = [
        f"search: {spec.searcher.name}{grid}{stopping}, {aims(spec.objectives)}",
        f"budget: {_budget(plan)}",
        f"workers: {cluster.workers} per trial with {cluster.cpus_per_worker:g} CPUs{gpus} each, {most} at once",
    ]
    if spec.merge is not None:
        of = f"the best {spec.merge.best} schedules, when all have ended" if spec.merge.run is None else spec.merge.run
        what = ", ".join(spec.merge.weights) or "lines along the order"
        points = f"{spec.merge.num_samples} points" if spec.merge.num_samples else "all points"
        lines.append(f"merge: {points} of {what}, of {of}: evaluated, not trained")
    each = plan.trial_hours()
    if each is None:
        return [*lines, "cost: unknown; give seconds_per_step, or measured_run, the folder of an earlier run"]
    baselines = len(spec.baselines) * spec.seeds
    detail = f"{training.max_steps} steps of {plan.seconds_per_step():.3g} s on {cluster.workers} workers"
    lines.append(f"cost of a trial: {each:.3g} worker-hours ({detail}), start and evaluations not counted")
    if spec.num_samples is not None:
        runs = spec.num_samples * spec.seeds + baselines
        most_hours = f"{runs * each:.3g} worker-hours for {runs} trials"
        lines.append(f"cost: {most_hours}" + (" if none is stopped early" if stopping else ""))
    if spec.worker_hours is not None:
        lines.append(f"cost: about {spec.worker_hours:g} worker-hours, then running trials are finished")
    return lines


def _budget(plan: Plan) -> str:
    spec = plan.spec
    parts = []
    if spec.num_samples is not None:
        parts.append(f"{spec.num_samples} schedules, {len(spec.known_strengths)} of them known")
    if spec.worker_hours is not None:
        parts.append(f"{spec.worker_hours:g} worker-hours")
    if spec.time_budget_s is not None:
        parts.append(f"{spec.time_budget_s:g} s")
    repeats = f", {spec.seeds} seeds each" if spec.seeds > 1 else ""
    nothing = "the whole grid" if spec.space else "nothing is trained"
    return (" or ".join(parts) or nothing) + f"; {len(spec.baselines)} baselines beside{repeats}"
