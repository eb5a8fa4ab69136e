"""The runs of a schedule, as a sweep's trial actors make them."""

from __future__ import annotations

from maps_ray.spec import RunSpec
from maps_ray.sweeps.schedules import Plan, Schedule, trial_spec


def trials(plan: Plan, schedule: Schedule) -> list[RunSpec]:
    """One for each seed."""
    seed = plan.base.training.seed
    return [
        trial_spec(plan.base, plan.folder, name, seed + index, schedule.proximity)
        for index, name in enumerate(plan.names(schedule))
    ]
