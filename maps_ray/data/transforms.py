"""From stored vectors to those that the published configurations train on: which features, which gripper convention,
which steps.

    libero   gripper -1 open .. 1 closed -> 1 open .. 0 closed; state of 8 values
    bridge   first and last step dropped; gripper to 0 or 1; actions 0..5 become differences of states; one camera
    calvin   gripper -1 closed .. 1 open -> 0 closed .. 1 open; state robot_obs[0:7] and [14]
    aloha    as stored, every dimension normalised

Sources: `libero`, `bridge` and `aloha` openvla-oft's `oxe/transforms.py` and `oxe/configs.py`; `calvin` the gripper as
VLA-Adapter trains on it, the state as MAPS evaluates.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from maps_ray.data.dataset_error import DatasetError
from maps_ray.spec import nearest

Vectors = Mapping[str, np.ndarray]
# `is_noop` of openvla-oft's `regenerate_libero_dataset.py`.
NOOP = 1e-4


@dataclass(frozen=True)
class Transform:
    """What one configuration does to an episode. A user's own is a function, see `resolve`."""

    name: str
    apply: Callable[[Vectors], Mapping[str, np.ndarray]]
    """`{"action": (T, A), "state": (T, D), ...}` of all stored steps -> the same for the steps that are left; `state`
    is missing where the data set has none."""
    dropped: tuple[int, int] = (0, 0)
    """Steps left out at the beginning and at the end."""
    features: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """`action`, `state` -> stored features to look for first."""
    cameras: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Camera -> stored names to look for first; empty for a view that is all black."""
    fps: float | None = None
    """Of the published data, which RLDS does not record."""
    masked: Literal["all", "all_but_last"] = "all"
    """Action dimensions that are normalised."""
    normalization: Literal["q01_q99", "min_max"] = "q01_q99"
    """By which the published configuration normalises."""
    wants_all: bool = False
    """Whether `apply` is given every vector feature by its stored name besides `action` and `state`."""

    def action_mask(self, width: int) -> np.ndarray:
        """bool (A,): dimensions to normalise."""
        mask = np.ones(width, bool)
        mask[-1] = self.masked == "all"
        return mask


def resolve(name: str | Transform | None) -> Transform | None:
    """A transform by its name, or a user's own as `module:function`.

    The function takes `{"action": (T, A), "state": (T, D)}` and every other vector feature by its stored name, float32,
    and returns the dictionary of what is trained on; rows it leaves out at the beginning and the end it tells by an
    attribute, `function.dropped = (1, 1)`. `function.masked = "all_but_last"` keeps the last action dimension from
    being normalised.

    Raises:
        DatasetError: no such transform, module or function; names those there are.
    """
    if name is None or isinstance(name, Transform):
        return name
    if ":" not in name:
        if name not in TRANSFORMS:
            raise DatasetError(
                f"transform: unknown name {name!r}; {nearest(name, list(TRANSFORMS))}, or your own as module:function"
            )
        return TRANSFORMS[name]
    module, _, attribute = name.partition(":")
    try:
        function: Any = importlib.import_module(module)
        for part in attribute.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise DatasetError(
            f"transform {name!r}: cannot be imported ({error}); give module:function, and the module's folder in "
            "PYTHONPATH, on every node"
        ) from None
    except Exception as error:
        raise DatasetError(f"transform {name!r}: its module fails ({type(error).__name__}: {error})") from None
    if isinstance(function, Transform):
        return function
    dropped = getattr(function, "dropped", (0, 0))
    masked: Any = getattr(function, "masked", "all")
    counts = isinstance(dropped, (tuple, list)) and len(dropped) == 2 and all(isinstance(n, int) for n in dropped)
    if not callable(function) or not counts or min(dropped) < 0 or masked not in ("all", "all_but_last"):
        raise DatasetError(
            f"transform {name!r}: must be a function; its attribute dropped is two counts of steps, masked is 'all' or "
            "'all_but_last'"
        )
    return Transform(name, function, dropped=(dropped[0], dropped[1]), masked=masked, wants_all=True)


def as_steps(transform: Transform, vectors: Vectors, where: str) -> dict[str, np.ndarray]:
    """Applies a transform to one episode and checks what comes back: float32 (T, D) for each kind.

    Raises:
        DatasetError: the transform fails, or returns other shapes than it says.
    """
    length = len(vectors["action"])
    wanted = max(length - sum(transform.dropped), 0)
    try:
        made = transform.apply(vectors)
    except DatasetError as error:
        raise DatasetError(f"{where}: {error}") from None
    except Exception as error:
        raise DatasetError(f"{where}: transform {transform.name} fails ({type(error).__name__}: {error})") from None
    if not isinstance(made, Mapping) or "action" not in made:
        raise DatasetError(f"{where}: transform {transform.name} must return a dictionary with 'action'")
    result = {}
    for kind in ("action", "state"):
        if made.get(kind) is None:
            continue
        try:
            values = np.asarray(made[kind], dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise DatasetError(f"{where}: transform {transform.name}: {kind} is no array ({error})") from None
        if values.ndim != 2 or len(values) != wanted:
            raise DatasetError(
                f"{where}: transform {transform.name} returns {kind} of shape {values.shape}; {length} stored steps "
                f"less {sum(transform.dropped)} dropped ones ask for ({wanted}, D)"
            )
        result[kind] = values
    return result


def _libero(vectors: Vectors) -> dict[str, np.ndarray]:
    action = vectors["action"].copy()
    action[:, -1] = 1 - np.clip(action[:, -1], 0, 1)
    made = {"action": action}
    if "state" in vectors:
        state = vectors["state"]
        if state.shape[1] < 8:
            raise DatasetError(f"transform libero: the state has {state.shape[1]} values, needs 8")
        # Pose and both fingers: `EEF_state` and `gripper_state` of `libero_dataset_transform`.
        made["state"] = np.concatenate([state[:, :6], state[:, -2:]], axis=1)
    return made


def _bridge(vectors: Vectors) -> dict[str, np.ndarray]:
    if "state" not in vectors:
        raise DatasetError("transform bridge: needs a state, from whose differences it makes the actions")
    # The first action of Bridge V2's episodes is all zeros (`bridge_orig_dataset_transform`).
    action, state = vectors["action"][1:].copy(), vectors["state"][1:]
    if action.shape[1] != 7 or state.shape[1] < 7:
        raise DatasetError(
            f"transform bridge: actions of {action.shape[1]} and states of {state.shape[1]} values, needs 7 of each"
        )
    action[:, -1] = binary_gripper(action[:, -1])
    # `relabel_bridge_actions`: what the arm reached in place of what it was told; so the last step has no action.
    moved = state[1:, :6] - state[:-1, :6]
    kept = np.concatenate([moved, action[:-1, -1:]], axis=1)
    return {"action": kept, "state": np.concatenate([state[:-1, :6], state[:-1, -1:]], axis=1)}


def binary_gripper(values: np.ndarray) -> np.ndarray:
    """(T,) -> above 0.95 becomes 1, below 0.05 becomes 0; between them, the value of the next decided step, and where
    none follows, the last value as it is."""
    result = np.array(values)
    # `binarize_gripper_actions` starts its scan from the last value, decided or not.
    carried = values[-1] if len(values) else 0
    for step in reversed(range(len(values))):
        if values[step] > 0.95:
            carried = 1
        elif values[step] < 0.05:
            carried = 0
        result[step] = carried
    return result


def noops(actions: np.ndarray) -> np.ndarray:
    """(T, 7) as stored -> bool (T,): actions that do nothing, as openvla-oft's regeneration script finds them.

    The first six are smaller than `NOOP` by their norm, and the gripper is as in the last action that did something.
    """
    still = np.linalg.norm(actions[:, :6], axis=1) < NOOP
    result = np.zeros(len(actions), bool)
    last = None
    for step, action in enumerate(actions):
        result[step] = still[step] and (last is None or action[-1] == last)
        if not result[step]:
            last = action[-1]
    return result


def _calvin(vectors: Vectors) -> dict[str, np.ndarray]:
    action = vectors["action"].copy()
    action[:, -1] = np.clip(action[:, -1], 0, 1)
    made = {"action": action}
    if "state" in vectors:
        state = vectors["state"]
        if state.shape[1] == 15:
            # 7 to 13 are joint angles.
            state = np.concatenate([state[:, :7], state[:, 14:]], axis=1)
        elif state.shape[1] != 8:
            raise DatasetError(f"transform calvin: the state has {state.shape[1]} values, needs robot_obs (15) or 8")
        made["state"] = state
    return made


def _aloha(vectors: Vectors) -> dict[str, np.ndarray]:
    return {kind: vectors[kind] for kind in ("action", "state") if kind in vectors}


TRANSFORMS: dict[str, Transform] = {
    transform.name: transform
    for transform in (
        Transform(
            "libero",
            _libero,
            cameras={"primary": ("image", "agentview_rgb"), "wrist": ("wrist_image", "eye_in_hand_rgb")},
            fps=20,
            masked="all_but_last",
        ),
        Transform(
            "bridge",
            _bridge,
            dropped=(1, 1),
            cameras={"primary": ("image_0",), "wrist": ()},
            fps=5,
            masked="all_but_last",
        ),
        Transform(
            "calvin",
            _calvin,
            features={"action": ("rel_actions", "action"), "state": ("robot_obs", "state")},
            cameras={"primary": ("rgb_static", "image"), "wrist": ("rgb_gripper", "wrist_image")},
            fps=30,
            masked="all_but_last",
        ),
        Transform(
            "aloha",
            _aloha,
            cameras={
                "primary": ("image", "cam_high"),
                "left_wrist": ("left_wrist_image", "cam_left_wrist"),
                "right_wrist": ("right_wrist_image", "cam_right_wrist"),
            },
            normalization="min_max",
        ),
    )
}
"""By name, what the published configurations do."""
