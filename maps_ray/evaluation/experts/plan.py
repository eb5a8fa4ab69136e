"""Chooses the experts for a task from its parsed goal."""

from __future__ import annotations

from maps_ray.evaluation.experts.drawer import Drawer
from maps_ray.evaluation.experts.knob import Knob
from maps_ray.evaluation.experts.motions import Actions, Arm
from maps_ray.evaluation.experts.pick_place import PickPlace
from maps_ray.evaluation.experts.push import Push, is_flat


def solve_goal(arm: Arm) -> Actions:
    """The actions that bring about the goal of the loaded task.

    Raises:
        NoPlan: no expert knows a part of the goal, or an expert finds no way.
    """
    for relation, *names in arm.env.parsed_problem["goal_state"]:
        if relation == "open":
            yield from Drawer(arm, *names).open()
        elif relation == "turnon":
            yield from Knob(arm, *names).turn_on()
        elif relation in ("in", "on"):
            yield from _place(arm, relation, *names)
        else:
            raise arm.fail(f"no expert knows the goal ({relation} {' '.join(names)})")


def _place(arm: Arm, relation: str, name: str, goal: str) -> Actions:
    site = arm.env.object_sites_dict.get(goal)
    if site is not None and site.parent_name is None and is_flat(arm.points(name)):
        yield from Push(arm, name, goal).actions()
        return
    if relation == "in" and site is not None and site.joints:
        drawer = Drawer(arm, goal)
        if not drawer.is_open:
            yield from drawer.open()
            yield from arm.go_home()
    yield from PickPlace(arm, relation, name, goal).actions()
