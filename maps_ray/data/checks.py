"""Everything wrong with the data of a spec that can be found without decoding a frame; free of torch."""

from __future__ import annotations

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
        field, value, parts = f"{source.field}.transform", transform.name, _before(source)
        remedy = "leave it out and set data.gripper: none"
    elif source.gripper == "libero":
        field, value, parts = "data.gripper", source.spec.gripper, _actions(source, use_proprio)
        remedy = "use 'none'"
    else:
        return []
    values = np.concatenate([rows[:, -1] for rows in parts])
    low, high = float(values.min()), float(values.max())
    commands = (np.abs(np.abs(values) - 1) <= _NEAR).mean()
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
            before, after = _range(parts), _range([source.convert()(rows) for rows in parts])
        else:
            before, after = _range(_before(source)), _range(parts)
        told.append(f"{source.field}: actions of {source.name} before and after {how}")
        for i in range(max(len(before), len(after))):
            stored, made = (f"{r[i][0]:.4g} .. {r[i][1]:.4g}" if i < len(r) else "-" for r in (before, after))
            told.append(f"  {i:>3}  {stored:<22} {made if made != stored else '='}")
    return told


def _actions(source: Source, use_proprio: bool) -> list[np.ndarray]:
    used = [(stored, index) for stored, episodes in source.splits.values() for index in episodes]
    return [source.vectors(stored, use_proprio).episode("action", index) for stored, index in used]


def _before(source: Source) -> list[np.ndarray]:
    """Actions as stored of some episodes of the train split."""
    stored, episodes = source.splits["train"]
    dataset = source.stored(stored)
    some = np.linspace(0, len(episodes) - 1, min(len(episodes), _EPISODES_SHOWN)).round().astype(int)
    feature = dataset.feature("action")
    return [dataset.stored([feature], episodes[place])[feature] for place in some]


def _range(parts: list[np.ndarray]) -> list[tuple[float, float]]:
    filled = [part for part in parts if len(part)]
    low, high = (np.array([bound(part, axis=0) for part in filled]) for bound in (np.min, np.max))
    return list(zip(low.min(0).tolist(), high.max(0).tolist(), strict=True))


def _fault(spec: DataSpec, number: int, message: str) -> Problem:
    own = spec.resolved()[number]
    return Problem(f"{spec.field(number)}.path", own.path, message)
