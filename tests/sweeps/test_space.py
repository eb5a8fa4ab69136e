"""Spaces, and what the searchers take from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from maps_ray.spec import ProximitySpec
from maps_ray.spec.sweep_spec import SweepSpec
from maps_ray.sweeps.searchers import make_searcher
from maps_ray.sweeps.space import load_space

SPACES = Path(__file__).parents[2] / "tune_spaces"
BEST = ["language_late", "dinov2", "siglip", "projector", "language_early"]


def spec(searcher: str = "tpe", objectives: tuple[str, ...] = ("error",), **fields) -> SweepSpec:
    return SweepSpec(
        name="s", base="b", space=["orders"], searcher=searcher, objectives=objectives, num_samples=99, **fields
    )


def load(*names: str):
    return load_space([str(SPACES / f"{name}.yaml") for name in names])


def test_the_grid_holds_each_of_the_24_orders_once():
    space = load("orders", "strengths_grid")
    found = [space.decode(point) for point in space.grid()]
    assert len(found) == space.grid_size == 24 * 4
    assert len({(*fields["order"], fields["lambda_max"]) for fields in found}) == 96
    assert found[0]["order"] == ["dinov2", "siglip", "projector", "language_early", "language_late"]
    assert {tuple(sorted(fields["order"])) for fields in found} == {tuple(sorted(found[0]["order"]))}


def test_both_recipes_are_points_of_a_space():
    space = load("recipes", "strengths_grid")
    found = [space.decode(point) for point in space.grid()]
    assert [fields["recipe"] for fields in found].count("released") == 4 == space.grid_size / 2
    assert space.encode(ProximitySpec(recipe="released", lambda_max=3.0)) == {"recipe": "released", "lambda_max": 3.0}


def test_fixed_groups_stay_in_place():
    orders = [load("orders_vision_first").decode(p)["order"] for p in load("orders_vision_first").grid()]
    assert len(orders) == 6 and {(o[0], o[-1]) for o in orders} == {("dinov2", "language_late")}
    assert load("orders_with_projector").grid_size == 120


@pytest.mark.parametrize("searcher", ["random", "tpe"])
def test_a_sampled_point_is_inside_the_space_and_repeats_with_the_seed(searcher):
    space = load("orders", "strengths", "shapes")
    first, second = (make_searcher(spec(searcher), space) for _ in range(2))
    points = [first.suggest(str(n)) for n in range(5)]
    assert points == [second.suggest(str(n)) for n in range(5)]
    assert make_searcher(spec(searcher, seed=1), space).suggest("0") != points[0]
    for point in points:
        fields = space.decode(point)
        assert 0.25 <= fields["lambda_max"] <= 4 and fields["shape"] in ("linear", "cosine", "constant")
        assert len(fields["order"]) == 5


def error(order: list[str]) -> float:
    """How far an order is from the best one."""
    return sum(abs(order.index(module) - place) for place, module in enumerate(BEST)) / 10


@pytest.mark.parametrize("objectives", [("error",), ("error", "other")])
def test_tpe_learns_from_what_it_is_told_also_after_a_resume(objectives, tmp_path):
    space = load("orders_with_projector")
    values: list[float] = []

    def search(searcher, count: int) -> None:
        for number in range(len(values), len(values) + count):
            point = searcher.suggest(str(number))
            values.append(error(space.decode(point)["order"]))
            searcher.on_trial_complete(str(number), result=dict.fromkeys(objectives, values[-1]))

    first = make_searcher(spec(objectives=objectives), space)
    search(first, 20)
    first.save(str(tmp_path / "state"))
    second = make_searcher(spec(objectives=objectives), space)
    second.restore(str(tmp_path / "state"))
    search(second, 40)
    assert sum(values[-20:]) / 20 < 0.7 * sum(values[:10]) / 10


def test_a_failed_schedule_does_not_stop_the_search():
    searcher = make_searcher(spec(), load("orders"))
    for number in map(str, range(3)):
        assert searcher.suggest(number)
        searcher.on_trial_complete(number, error=True)


def test_known_points_come_first_and_are_learned_from():
    space = load("orders", "strengths")
    known = [{dimension.name: 0.3 + 0.1 * place for place, dimension in enumerate(space.dimensions)}]
    searcher = make_searcher(spec(), space, known)
    assert searcher.suggest("0") == known[0] and searcher.suggest("1") != known[0]


def test_options_reach_the_searcher():
    chosen = {"name": "optuna", "options": {"sampler": "RandomSampler", "seed": 5}}
    searcher = make_searcher(spec(chosen), load("orders"))
    assert type(searcher._sampler).__name__ == "RandomSampler"
