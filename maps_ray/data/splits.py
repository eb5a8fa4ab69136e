"""Which episodes are trained on, which are held out, which are out of distribution."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from maps_ray.data.formats import Dataset
from maps_ray.spec import Problem, SpecError, SplitSpec, SplitsSpec


def select(dataset: Dataset, split: SplitSpec, field: str) -> list[int]:
    """The episodes of one split, ascending.

    Args:
        dataset: an opened data set.
        split: patterns (ignoring case) and the slice of each matching task's episodes.
        field: path of the split in the spec, for instance `data.splits.ood`.

    Raises:
        SpecError: no episode is left; names the nearest task sentences.
    """
    tasks = [t for t in dataset.tasks if _matches(t, split.tasks) and not _matches(t, split.exclude_tasks)]
    if not tasks:
        asked = f"{split.tasks} without {split.exclude_tasks}" if split.exclude_tasks else f"{split.tasks}"
        message = f"no task matches {asked}; tasks nearest to it: {_nearest_tasks(split.tasks, dataset.tasks)}"
        raise SpecError([Problem(f"{field}.tasks", split.tasks, message)])
    start, stop = (int(part) if part else None for part in split.episodes.split(":"))
    chosen: list[int] = []
    for task in tasks:
        chosen += [episode.index for episode in dataset.episodes if episode.task == task][start:stop]
    if not chosen:
        counts = [sum(episode.task == task for episode in dataset.episodes) for task in tasks]
        message = (
            f"leaves no episode: the {len(tasks)} matching tasks have {min(counts)} to {max(counts)} episodes each"
        )
        raise SpecError([Problem(f"{field}.episodes", split.episodes, message)])
    return sorted(chosen)


def select_all(
    stored: Callable[[str], Dataset], splits: SplitsSpec, field: str = "data.splits"
) -> dict[str, tuple[str, list[int]]]:
    """The episodes of each split that the spec names: `train`, and `held_out` and `ood` where given.

    Args:
        stored: opens the data set at one of the splits that it stores.
        splits: of the spec.
        field: path of the splits in the spec.

    Returns:
        split -> (stored split, episodes of it).

    Raises:
        DatasetError: the data set cannot be opened.
        SpecError: a split is empty, two of them share an episode, `held_out` has a task that `train` never shows, or
            `ood` one that it does; lists all such faults.
    """
    chosen: dict[str, tuple[str, list[int]]] = {}
    problems: list[Problem] = []
    for name in type(splits).model_fields:
        split = getattr(splits, name)
        if split is None:
            continue
        try:
            chosen[name] = split.stored, select(stored(split.stored), split, f"{field}.{name}")
        except SpecError as error:
            problems += error.problems
    names = list(chosen)
    for later, name in enumerate(names):
        for other in names[:later]:
            # Indices of two stored splits are of different episodes.
            same = chosen[name][0] == chosen[other][0]
            shared = sorted(set(chosen[name][1]) & set(chosen[other][1])) if same else []
            if shared:
                message = f"episodes {_first(shared)} stand in {field}.{other} as well; narrow tasks or episodes"
                problems.append(Problem(f"{field}.{name}", getattr(splits, name).model_dump(), message))
    if not problems:
        tasks = {
            name: {stored(split).episodes[index].task for index in indices} for name, (split, indices) in chosen.items()
        }
        problems = _distribution_faults(tasks, splits, field)
    if problems:
        raise SpecError(problems)
    return chosen


def _distribution_faults(tasks: dict[str, set[str]], splits: SplitsSpec, field: str) -> list[Problem]:
    problems = []
    unseen = sorted(tasks.get("held_out", set()) - tasks["train"])
    if unseen and splits.held_out:
        message = f"held-out episodes have tasks that train never shows: {_first(unseen)}; move them to {field}.ood"
        problems.append(Problem(f"{field}.held_out.tasks", splits.held_out.tasks, message))
    seen = sorted(tasks.get("ood", set()) & tasks["train"])
    if seen and splits.ood:
        message = f"train shows these tasks too: {_first(seen)}; put them in {field}.train.exclude_tasks"
        problems.append(Problem(f"{field}.ood.tasks", splits.ood.tasks, message))
    return problems


def _matches(task: str, patterns: Iterable[str]) -> bool:
    # `fnmatch` would ignore case on some systems alone. A sentence itself may hold [, which patterns take for a choice.
    return any(fnmatchcase(task.lower(), pattern.lower()) or task.lower() == pattern.lower() for pattern in patterns)


def _nearest_tasks(patterns: list[str], tasks: list[str]) -> str:
    by_lower = {task.lower(): task for task in tasks}
    nearest: list[str] = []
    for pattern in patterns:
        plain = pattern.lower().replace("*", " ").strip()
        # Below difflib's own 0.6, for a pattern is often a word or two of a long sentence.
        nearest += difflib.get_close_matches(plain, by_lower, n=3, cutoff=0.3)
    return "; ".join(repr(by_lower[name]) for name in list(dict.fromkeys(nearest))[:5] or list(by_lower)[:5])


def _first(items: list[int] | list[str]) -> str:
    shown = ", ".join(str(item) for item in items[:5])
    return f"{shown}, ... ({len(items)} in all)" if len(items) > 5 else shown
