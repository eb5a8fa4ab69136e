"""How far an episode of a LIBERO task came, from the simulation's state at each step, in the words of its sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from maps_ray.evaluation.simulators.geometry import bodies_of, geoms_of

if TYPE_CHECKING:
    from robosuite.environments.base import MujocoEnv


_NAMES = {
    "akita_black_bowl": "black bowl",
    "chefmate8_frypan": "frying pan",
    "cookies": "cookie box",
    "cream_cheese": "cream cheese",
    "desk_caddy": "caddy",
    "flat_stove": "stove",
    "glazed_rim_porcelain_ramekin": "ramekin",
    "new_salad_dressing": "salad dressing",
    "porcelain_mug": "white mug",
    "red_coffee_mug": "red mug",
    "short_cabinet": "white cabinet",
    "short_fridge": "fridge",
    "slide_cabinet": "sliding cabinet",
    "white_yellow_mug": "yellow and white mug",
    "wooden_two_layer_shelf": "wooden shelf",
}


def human_name(category: str) -> str:
    """The name of a LIBERO object category, for instance `black bowl` for `akita_black_bowl`."""
    return _NAMES.get(category, category.replace("_", " "))


LIFTED = 0.03
"""Height in m above its place at reset from which a held object counts as lifted."""
NEAR = 0.12
"""Horizontal distance in m between a lifted object and its goal from which it counts as carried."""
MOVED = 0.1
"""Part of its range that a drawer, door or knob must turn or slide to count as moved."""

_PLACING = ("in", "on")
_OTHER, _LEFT, _RIGHT, _HAND = range(4)


class _Stages(Protocol):
    """The stages of one condition of the goal, in their order."""

    names: tuple[str, ...]

    def start(self) -> None: ...

    def reached(self, contacts: NDArray[np.integer], side: NDArray[np.integer]) -> Sequence[bool]: ...


class StageTracker:
    """Watches an environment and keeps which stages it reached; costs no rendering.

    An object that the goal puts somewhere has the stages `grasp` (both fingers touch it), `carry` (held, lifted by
    `LIFTED` and within `NEAR` of its goal) and `place` (this part of the goal holds). A drawer, door or knob has
    `reach` (the hand touches it), `move` (its joint moved by `MOVED` of its range) and `done` (this part of the goal
    holds). A stage counts as reached when a later one is: a plate may be pushed to its goal without being grasped.

    Args:
        env: LIBERO's robosuite environment, loaded.
    """

    def __init__(self, env: MujocoEnv) -> None:
        self._sim = env.sim
        self._side = _sides(env)
        goal = env.parsed_problem["goal_state"]
        self._parts = [_Placing(env, atom) if atom[0] in _PLACING else _Moving(env, atom) for atom in goal]
        self._labels = _labels([atom[1] for atom in goal])
        self.start()

    def start(self) -> None:
        """Forgets what was reached and takes the present state as the one to compare with."""
        self._counts = [0] * len(self._parts)
        for part in self._parts:
            part.start()

    def update(self) -> None:
        """Looks at the present state; call it after every step."""
        contacts = self._sim.data._data.contact.geom
        for index, part in enumerate(self._parts):
            if self._counts[index] < len(part.names):
                stages = part.reached(contacts, self._side)
                self._counts[index] = max([self._counts[index], *(n for n, yes in enumerate(stages, 1) if yes)])

    def reached(self) -> dict[str, bool]:
        """Stage to whether it was reached since `start`.

        Goals of several conditions name the thing after the stage, such as `grasp alphabet soup`; so the first word is
        always the stage.
        """
        several = len(self._parts) > 1
        return {
            f"{name} {label}" if several else name: position < count
            for part, label, count in zip(self._parts, self._labels, self._counts, strict=True)
            for position, name in enumerate(part.names)
        }


class _Placing:
    names = ("grasp", "carry", "place")

    def __init__(self, env: MujocoEnv, atom: Sequence[str]) -> None:
        self._env, self._atom = env, atom
        _, thing, goal = atom
        root = env.get_object(thing).root_body
        self._body = env.sim.model.body_name2id(root)
        self._goal = env.object_states_dict[goal]
        self._is_thing = _mask(env.sim.model.ngeom, geoms_of(env.sim.model, root))

    def start(self) -> None:
        self._height = float(self._env.sim.data.body_xpos[self._body][2])

    def reached(self, contacts: NDArray[np.integer], side: NDArray[np.integer]) -> Sequence[bool]:
        touching = _sides_touching(contacts, side, self._is_thing)
        grasped = _LEFT in touching and _RIGHT in touching
        position = self._env.sim.data.body_xpos[self._body]
        lifted = position[2] - self._height > LIFTED
        near = np.linalg.norm(position[:2] - self._goal.get_geom_state()["pos"][:2]) < NEAR
        return grasped, bool(grasped and lifted and near), bool(self._env._eval_predicate(self._atom))


class _Moving:
    names = ("reach", "move", "done")

    def __init__(self, env: MujocoEnv, atom: Sequence[str]) -> None:
        self._env, self._atom = env, atom
        model, name = env.sim.model, atom[1]
        # A drawer is a site of its cabinet with the cabinet's joint; a door or knob belongs to the object itself.
        owner = env.object_sites_dict[name] if name in env.object_sites_dict else env.get_object(name)
        joints = [model.joint_name2id(joint) for joint in owner.joints]
        self._addresses = model.jnt_qposadr[joints]
        self._ranges = np.ptp(model.jnt_range[joints], axis=1)
        bodies = {
            body for joint in joints for body in bodies_of(model, model.body_id2name(int(model.jnt_bodyid[joint])))
        }
        self._is_thing = np.isin(model.geom_bodyid, sorted(bodies))

    def start(self) -> None:
        self._start = np.array(self._env.sim.data.qpos[self._addresses])

    def reached(self, contacts: NDArray[np.integer], side: NDArray[np.integer]) -> Sequence[bool]:
        touched = bool(_sides_touching(contacts, side, self._is_thing))
        shift = np.abs(self._env.sim.data.qpos[self._addresses] - self._start)
        return touched, bool((shift > MOVED * self._ranges).any()), bool(self._env._eval_predicate(self._atom))


def _sides(env: MujocoEnv) -> NDArray[np.integer]:
    """For each geom whether it is of the left finger, the right one, the rest of the hand, or anything else."""
    model, gripper = env.sim.model, env.robots[0].gripper
    sides = np.full(model.ngeom, _OTHER)
    sides[geoms_of(model, gripper.root_body)] = _HAND
    for side, finger in ((_LEFT, "left_finger"), (_RIGHT, "right_finger")):
        sides[[model.geom_name2id(geom) for geom in gripper.important_geoms[finger]]] = side
    return sides


def _mask(length: int, members: Sequence[int]) -> NDArray[np.bool_]:
    mask = np.zeros(length, dtype=bool)
    mask[members] = True
    return mask


def _sides_touching(contacts: NDArray[np.integer], side: NDArray[np.integer], is_thing: NDArray[np.bool_]) -> set[int]:
    """Which sides of the hand are in contact with a thing; contacts are pairs of geoms, shape (n, 2)."""
    sides = np.where(is_thing[contacts], side[contacts[:, ::-1]], _OTHER)
    return set(np.unique(sides).tolist()) - {_OTHER}


def _labels(things: Sequence[str]) -> list[str]:
    """Human names of a goal's things: `moka_pot_1` is `moka pot`, or `moka pot 1` where the goal has two of them."""
    labels = []
    for thing in things:
        category, *region = thing.removesuffix("_region").split("_1_", 1) if "_1_" in thing else [thing]
        labels.append(" ".join([human_name(category.rstrip("0123456789").rstrip("_")), *region]))
    count = Counter(labels)
    seen: Counter[str] = Counter()
    for index, label in enumerate(labels):
        seen[label] += 1
        if count[label] > 1:
            labels[index] = f"{label} {seen[label]}"
    return labels
