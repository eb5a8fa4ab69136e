"""Splits never share an episode, whatever tasks and slices a spec names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

from hypothesis import given, settings
from hypothesis import strategies as st

from maps_ray.data.formats import Dataset
from maps_ray.data.splits import select_all
from maps_ray.spec import SpecError, SplitsSpec

WORDS = ("open the drawer", "pick up the cup", "pick up the bowl", "push the button")
slices = st.sampled_from([":", ":1", "1:", "-1:", ":-1", ":2", "2:", "1:3"])
split = st.fixed_dictionaries(
    {
        "tasks": st.lists(st.sampled_from(["*", "pick up*", "open*", "PUSH*", "*bowl"]), min_size=1, max_size=2),
        "exclude_tasks": st.lists(st.sampled_from(["*cup", "open*"]), max_size=1),
        "episodes": slices,
    }
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=12), split, st.none() | split, st.none() | split)
def test_splits_are_apart_or_refused(tasks, train, held_out, ood) -> None:
    episodes = [SimpleNamespace(index=index, task=task) for index, task in enumerate(tasks)]
    dataset = cast(Dataset, SimpleNamespace(episodes=episodes, tasks=list(dict.fromkeys(tasks))))
    splits = SplitsSpec.model_validate({"train": train, "held_out": held_out, "ood": ood})
    try:
        chosen = select_all(lambda stored: dataset, splits)
    except SpecError as error:
        assert all(problem.field.startswith("data.splits.") for problem in error.problems)
        return
    found = {name: indices for name, (_, indices) in chosen.items()}
    assert found["train"]
    flat = [index for indices in found.values() for index in indices]
    assert len(flat) == len(set(flat))
    assert all(indices == sorted(indices) for indices in found.values())
    shown = {tasks[index] for index in found["train"]}
    assert {tasks[index] for index in found.get("held_out", [])} <= shown
    assert not {tasks[index] for index in found.get("ood", [])} & shown
