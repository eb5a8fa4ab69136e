"""All suites that can be asked for, known without importing a simulator.

Step limits are those of the published evaluations: LIBERO's are OpenVLA-OFT's (arXiv:2502.19645) without the settling
steps, Metaworld's its own episode length, SimplerEnv's (arXiv:2405.05941) by scene, CALVIN's (arXiv:2112.03227) for
each instruction of a chain.
"""

from __future__ import annotations

from maps_ray.evaluation.simulators.base import Change, Suite
from maps_ray.evaluation.simulators.metaworld_small import CHANGES as SMALL_CHANGES
from maps_ray.evaluation.simulators.metaworld_small import PREFIX as SMALL
from maps_ray.spec import nearest

LIBERO = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
"""LIBERO's own suites and their step limits."""

_PERTURBED = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
_PERTURBATIONS: dict[str, Change] = {"swap": "position", "lan": "language", "object": "look", "task": "task"}

# The distractor suites of LIBERO-PRO that have all initial states and that keep the sentences of their base:
# `libero_object_with_mug`, `libero_spatial_with_milk` and `libero_goal_with_milk` reword them as well.
_DISTRACTORS = {
    "libero_spatial": ("mug", "yellow_book"),
    "libero_object": ("yellow_book",),
    "libero_goal": ("mug", "yellow_book"),
    "libero_10": ("mug",),
}

LIBERO_PLUS_DIMENSIONS: tuple[Change, ...] = (
    "camera", "robot", "language", "light", "background", "noise", "layout",
)  # fmt: skip
"""What LIBERO-Plus (arXiv:2510.13626) changes, one suite each: `libero_plus_object_camera`."""

_METAWORLD_STEPS = 500
_SMALL_STEPS = 150
"""About one and a half times what Metaworld's own policies take at most."""
_OOD_STEPS = 150
CALVIN_STEPS = 360
"""Steps that CALVIN gives each of the five instructions of a chain."""
_AUTHORS_CALVIN_STEPS = 800


def _table() -> dict[str, Suite]:
    suites = [Suite(name, "libero", steps, name) for name, steps in LIBERO.items()]
    for base in _PERTURBED:
        for suffix, change in _PERTURBATIONS.items():
            suites.append(Suite(f"{base}_{suffix}", "libero", LIBERO[base], base, change))
        for thing in _DISTRACTORS[base]:
            suites.append(Suite(f"{base}_with_{thing}", "libero", LIBERO[base], base, "distractor"))
    suites.append(Suite("libero_object_inspire", "libero", LIBERO["libero_object"], "libero_object", "look"))
    for base in _PERTURBED:
        for dimension in LIBERO_PLUS_DIMENSIONS:
            name = f"libero_plus_{base.removeprefix('libero_')}_{dimension}"
            suites.append(Suite(name, "libero_plus", LIBERO[base], base, dimension))
    for name in ("metaworld_mt10", "metaworld_mt50", "metaworld_ml45"):
        suites.append(Suite(name, "metaworld", _METAWORLD_STEPS, name))
    suites.append(Suite("metaworld_ml45_test", "metaworld", _METAWORLD_STEPS, "metaworld_ml45", "task"))
    suites.append(Suite(SMALL, "metaworld", _SMALL_STEPS, SMALL))
    suites += [Suite(f"{SMALL}_{change}", "metaworld", _SMALL_STEPS, SMALL, change) for change in SMALL_CHANGES]
    # Two suites, because the published evaluation gives the sink twice the steps of the table.
    suites.append(Suite("simpler_bridge_table", "maniskill", 60, "simpler_bridge_table"))
    suites.append(Suite("simpler_bridge_sink", "maniskill", 120, "simpler_bridge_sink"))
    columns: tuple[tuple[str, Change], ...] = (("visual", "look"), ("object", "object"), ("category", "category"))
    for column, change in columns:
        suites.append(Suite(f"simpler_ood_{column}", "maniskill", _OOD_STEPS, "simpler_bridge_table", change))
    suites.append(Suite("maniskill_tabletop", "maniskill", 50, "maniskill_tabletop"))
    for name, steps, overlapping in (
        ("calvin_abc_d", CALVIN_STEPS, False),
        ("calvin_abc_d_overlapping", _AUTHORS_CALVIN_STEPS, True),
    ):
        suites.append(Suite(name, "calvin", 5 * steps, name, "none", overlapping, steps))
    return {suite.name: suite for suite in suites}


SUITES: dict[str, Suite] = _table()
"""Name to suite, in the order in which they are listed to a user."""


def suite(name: str) -> Suite:
    """Looks a suite up.

    Raises:
        ValueError: no such suite; the message names the nearest one and all others.
    """
    if name not in SUITES:
        raise ValueError(f"unknown suite {name!r}: {nearest(name, SUITES)}")
    return SUITES[name]


def suite_of(simulator: str, name: str) -> Suite:
    """Looks up a suite that a given adapter runs.

    Raises:
        ValueError: the adapter has no such suite; the message names the nearest one and all others.
    """
    names = [known.name for known in SUITES.values() if known.simulator == simulator]
    if name not in names:
        raise ValueError(f"unknown suite {name!r}: {nearest(name, names)}")
    return SUITES[name]
