"""Everything wrong with the data of a spec that can be found without decoding a frame; free of torch."""

from __future__ import annotations

import hashlib
import json
from typing import TypedDict

import numpy as np

from maps_ray.data.cache import cache_folder
from maps_ray.data.dataset_error import DatasetError
from maps_ray.data.formats import KINDS, Kind
from maps_ray.data.index import Index, NotIndexed, Report
from maps_ray.data.samples import is_labelled
from maps_ray.data.sources import Source, open_source, open_stored
from maps_ray.data.transforms import resolve
from maps_ray.spec import DataSpec, Problem, SpecError

_NEAR = 0.05
"""How far a gripper command may be from -1 or 1."""
_MOSTLY = 0.9
_EPISODES_SHOWN = 64


class _Summary(TypedDict):
    """Of actions."""

    ranges: list[list[float]]
    """Least and greatest value of each dimension."""
    commands: float
    """How often the last dimension is -1 or 1."""


def check_data(
    spec: DataSpec,
    *,
    use_proprio: bool = True,
    action_dim: int | None = None,
    proprio_dim: int | None = None,
    report: Report | None = None,
    patient: bool = True,
) -> list[Problem]:
    """Looks through every source.

    Args:
        spec: `data` of the run spec.
        use_proprio: whether the policy sees the proprioception.
        action_dim: dimensions that the policy's head gives; those of the first source when None.
        proprio_dim: dimensions that its proprio projector takes; likewise.
        report: told of progress where the index is computed.
        patient: look through data sets of any size; else those of very many shards are left out until they are indexed.

    Returns:
        Problems, each with its field; empty when the data can be trained on.
    """
    problems: list[Problem] = []
    expected: dict[Kind, tuple[int | None, str]] = {
        "action": (action_dim, "the policy"),
        "state": (proprio_dim, "the policy"),
    }
    for number, own in enumerate(spec.resolved()):
        try:
            resolve(own.transform)
        except DatasetError as error:
            problems.append(Problem(f"{spec.field(number)}.transform", own.transform, str(error)))
            continue
        try:
            source = open_source(spec, number, report, patient)
        except NotIndexed:
            continue
        except DatasetError as error:
            problems.append(_fault(spec, number, str(error)))
            continue
        except SpecError as error:
            problems += error.problems
            continue
        problems += _faults(source, number, use_proprio, expected)
    return problems


def data_sizes(spec: DataSpec, *, use_proprio: bool, patient: bool = True) -> dict[str, int]:
    """`action_dim`, and `proprio_dim` where the policy sees it, of the first source.

    Raises:
        DatasetError: the data cannot say; or `NotIndexed`, see `check_data`.
    """
    dataset = open_stored(spec, 0, index=Index(cache_folder(spec.cache), patient=patient))
    sizes = {"action_dim": dataset.width("action")}
    return sizes | ({"proprio_dim": dataset.width("state")} if use_proprio else {})


def _faults(
    source: Source, number: int, use_proprio: bool, expected: dict[Kind, tuple[int | None, str]]
) -> list[Problem]:
    spec, dataset = source.spec, source.dataset
    problems: list[Problem] = []
    cameras = {}
    for name in spec.cameras:
        try:
            cameras[name] = source.camera(name)
        except DatasetError as error:
            field = f"{source.field}.cameras" if name in source.own.cameras else "data.cameras"
            problems.append(Problem(field, source.own.cameras.get(name, name), str(error)))
    if cameras and not any(cameras.values()):
        problems.append(Problem(f"{source.field}.cameras", source.own.cameras, "the data set has none of these views"))
    kinds: list[Kind] = []
    for kind in KINDS[: 1 + use_proprio]:
        try:
            width = dataset.width(kind)
        except DatasetError as error:
            asked = getattr(source.own, kind)
            problems.append(
                Problem(f"{source.field}.{kind}", asked, str(error)) if asked else _fault(spec, number, str(error))
            )
            continue
        wanted, who = expected[kind]
        if wanted not in (None, width):
            message = f"{dataset.feature(kind)} has {width} dimensions, {who} has {wanted}; "
            message += "train a matching checkpoint" if who == "the policy" else "a policy has one width: leave one out"
            problems.append(_fault(spec, number, message))
        elif wanted is None:
            expected[kind] = width, f"source {source.name}"
        kinds.append(kind)
    # Others are left out of training, as in the published pipeline; only a split without any is a fault.
    for name, (stored, episodes) in source.splits.items():
        split, opened = f"{source.field}.splits.{name}", source.stored(stored)
        labelled = [opened.episodes[index].length for index in episodes if is_labelled(opened, index)]
        if not labelled:
            message = f"none of the {len(episodes)} episodes of {split} has a sentence, which a policy is told by"
            problems.append(_fault(spec, number, f"{opened.path}: {message}: write them, or select others"))
        elif max(labelled) < spec.chunk:
            message = f"{split} has no episode of that many steps, its longest has {max(labelled)}"
            problems.append(Problem("data.chunk", spec.chunk, message))
    if len(kinds) < 1 + use_proprio:
        return problems
    faults: list[str | None] = []
    try:
        faults.append(source.fault(use_proprio))
        for camera in filter(None, cameras.values()):
            for stored in dict.fromkeys(stored for stored, _ in source.splits.values()):
                faults.append(source.index.frame_fault(source.stored(stored), camera))
    except DatasetError as error:
        faults.append(str(error))
    # NaN would say nothing of a convention.
    if not any(faults):
        problems += _gripper_faults(source, use_proprio)
    return problems + [_fault(spec, number, fault) for fault in dict.fromkeys(faults) if fault]


def _gripper_faults(source: Source, use_proprio: bool) -> list[Problem]:
    """The convention is applied only to values that are of it: commands of -1 and 1."""
    transform = source.dataset.transform
    if transform is not None and transform.name == "libero":
        field, value, remedy = f"{source.field}.transform", transform.name, "leave it out and set data.gripper: none"
        summary = _stored(source)
    elif source.gripper == "libero":
        field, value, remedy = "data.gripper", source.spec.gripper, "use 'none'"
        summary = _summary(_actions(source, use_proprio))
    else:
        return []
    (low, high), commands = summary["ranges"][-1], summary["commands"]
    if low >= 0:
        message = f"the last action dimension never goes below {low:g}, LIBERO's is -1 when open"
    elif low < -1 - _NEAR or high > 1 + _NEAR or commands < _MOSTLY:
        message = (
            f"the last action dimension lies in {low:.4g} .. {high:.4g} and is -1 or 1 in {commands:.0%} of the steps; "
            "LIBERO's gripper is commanded by -1 (open) and 1 (closed)"
        )
    else:
        return []
    return [Problem(field, value, f"{message}: {remedy}, or use a transform of your own")]


def conversions(spec: DataSpec, *, use_proprio: bool = True, patient: bool = True) -> list[str]:
    """What a gripper convention or a transform does to the actions of each source, as lines for people: the range of
    each dimension before and after. `patient` as in `check_data`.

    Raises:
        DatasetError: the data cannot be read; `check_data` says why.
    """
    told = []
    for number in range(len(spec.resolved())):
        try:
            source = open_source(spec, number, None, patient)
        except NotIndexed:
            continue
        transform = source.dataset.transform
        how = f"transform {transform.name}" if transform else f"gripper {source.gripper}"
        parts = _actions(source, use_proprio)
        if transform is None:
            before, after = _summary(parts), _summary([source.convert()(rows) for rows in parts])
        else:
            before, after = _stored(source), _summary(parts)
        told.append(f"{source.field}: actions of {source.name} before and after {how}")
        ranges = before["ranges"], after["ranges"]
        for i in range(max(map(len, ranges))):
            stored, made = (f"{r[i][0]:.4g} .. {r[i][1]:.4g}" if i < len(r) else "-" for r in ranges)
            told.append(f"  {i:>3}  {stored:<22} {made if made != stored else '='}")
    return told


def _actions(source: Source, use_proprio: bool) -> list[np.ndarray]:
    used = [(stored, index) for stored, episodes in source.splits.values() for index in episodes]
    return [source.vectors(stored, use_proprio).episode("action", index) for stored, index in used]


def _stored(source: Source) -> _Summary:
    """Of the actions as stored, of some episodes of the train split; kept, for of RLDS an episode costs its images."""
    stored, episodes = source.splits["train"]
    dataset = source.stored(stored)
    places = np.linspace(0, len(episodes) - 1, min(len(episodes), _EPISODES_SHOWN)).round().astype(int)
    some = [episodes[place] for place in places]
    feature = dataset.feature("action")
    key = hashlib.sha256(json.dumps(some).encode()).hexdigest()[:16]
    path = source.vectors(stored, use_proprio=False).folder / f"stored-{key}.json"
    return source.index.kept(path, lambda: _summary([dataset.stored([feature], index)[feature] for index in some]))


def _summary(parts: list[np.ndarray]) -> _Summary:
    filled = [part for part in parts if len(part)]
    low, high = (np.array([bound(part, axis=0) for part in filled]) for bound in (np.min, np.max))
    near = np.concatenate([np.abs(np.abs(part[:, -1]) - 1) <= _NEAR for part in filled])
    ranges = np.stack([low.min(0), high.max(0)], axis=1).tolist()
    return {"ranges": ranges, "commands": float(near.mean())}


def _fault(spec: DataSpec, number: int, message: str) -> Problem:
    own = spec.resolved()[number]
    return Problem(f"{spec.field(number)}.path", own.path, message)
