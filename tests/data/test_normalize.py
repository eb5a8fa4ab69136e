"""Against arrays that OpenVLA-OFT's own code computed (tests/fixtures/data)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from maps_ray.data import DatasetError
from maps_ray.data.statistics import (
    DatasetStatistics,
    VectorStatistics,
    action_mask,
    compute,
    gripper_from_libero,
    gripper_to_libero,
    load,
    normalize,
    save,
    unnormalize,
)

FIXTURES = Path(__file__).parent.parent / "fixtures" / "data"
MODES = [("q01_q99", "bounds_q99"), ("min_max", "bounds")]


@pytest.fixture(scope="module")
def statistics() -> DatasetStatistics:
    return load(FIXTURES / "dataset_statistics.json")


@pytest.mark.parametrize(("mode", "name"), MODES)
def test_training_normalisation_is_upstreams(statistics: DatasetStatistics, mode: str, name: str) -> None:
    arrays = np.load(FIXTURES / "normalize.npz")
    for key, stats in (("action", statistics.action), ("proprio", statistics.proprio)):
        mine = normalize(arrays[f"{key}_raw"], stats, mode)
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine, arrays[f"{key}_{name}"], atol=1e-6)


@pytest.mark.parametrize(("mode", "name"), MODES)
def test_evaluation_differs_from_upstream_only_where_a_dimension_never_changes(
    statistics: DatasetStatistics, mode: str, name: str
) -> None:
    arrays = np.load(FIXTURES / "normalize.npz")
    constant = statistics.proprio.min == statistics.proprio.max
    assert constant.tolist() == [False] * 7 + [True]
    mine = normalize(arrays["proprio_raw"], statistics.proprio, mode)
    np.testing.assert_allclose(mine[:, ~constant], arrays[f"proprio_eval_{name}"][:, ~constant], atol=1e-6)
    assert (mine[:, constant] == 0).all() and (np.abs(arrays[f"proprio_eval_{name}"][:, constant]) == 1).all()


def test_unnormalisation_is_upstreams(statistics: DatasetStatistics) -> None:
    arrays = np.load(FIXTURES / "unnormalize.npz")
    mine = unnormalize(arrays["normalized"], statistics.action, "q01_q99")
    np.testing.assert_allclose(mine, arrays["unnormalized"], atol=1e-6)


@pytest.mark.parametrize("mode", ["q01_q99", "min_max"])
def test_there_and_back(mode: str) -> None:
    values = np.random.default_rng(0).normal(size=(200, 4))
    values[:, 2] = 0.25
    values[:, 3] = np.arange(200) % 2
    stats = VectorStatistics.of(values, np.array([True, True, True, False]))
    low, high = (stats.q01, stats.q99) if mode == "q01_q99" else (stats.min, stats.max)
    np.testing.assert_allclose(
        unnormalize(normalize(values, stats, mode), stats, mode), values.clip(low, high), atol=1e-6
    )


def test_statistics_are_numpys() -> None:
    rng = np.random.default_rng(1)
    actions = [rng.normal(size=(length, 7)).astype(np.float32) for length in (5, 9)]
    states = [rng.normal(size=(length, 8)).astype(np.float32) for length in (5, 9)]
    stats = compute(np.concatenate(actions), np.concatenate(states), action_mask(7, "libero"), 2)
    stacked = np.concatenate(actions).astype(np.float64)
    np.testing.assert_allclose(stats.action.q01, np.quantile(stacked, 0.01, axis=0))
    np.testing.assert_allclose(stats.action.q99, np.quantile(stacked, 0.99, axis=0))
    np.testing.assert_allclose(stats.action.std, stacked.std(0))
    np.testing.assert_allclose(stats.proprio.mean, np.concatenate(states).astype(np.float64).mean(0))
    assert stats.action.mask.tolist() == [True] * 6 + [False]
    assert (stats.num_transitions, stats.num_trajectories) == (14, 2)


def test_file_has_upstreams_form_and_reads_back(tmp_path: Path, statistics: DatasetStatistics) -> None:
    import json

    save(statistics, tmp_path / "dataset_statistics.json", "libero_spatial_no_noops")
    mine = json.loads((tmp_path / "dataset_statistics.json").read_text())
    theirs = json.loads((FIXTURES / "dataset_statistics.json").read_text())
    assert mine == theirs
    again = load(tmp_path / "dataset_statistics.json", "libero_spatial_no_noops")
    np.testing.assert_array_equal(again.action.q01, statistics.action.q01)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "dataset_statistics.json"
    with pytest.raises(DatasetError, match="cannot read"):
        load(path)
    path.write_text('{"a": {"action": {"mean": [0]}}, "b": {}}')
    with pytest.raises(DatasetError, match="no entry 'c'; it has a, b"):
        load(path, "c")
    with pytest.raises(DatasetError, match="a, action: lacks std"):
        load(path, "a")
    with pytest.raises(DatasetError, match="b: lacks action"):
        load(path, "b")


def test_gripper_convention() -> None:
    raw = np.array([[0.3, -1.0], [0.3, 0.0], [0.3, 1.0]])
    converted = gripper_from_libero(raw)
    np.testing.assert_allclose(converted, [[0.3, 1], [0.3, 1], [0.3, 0]])
    np.testing.assert_allclose(gripper_to_libero(np.array([[0.3, 0.9], [0.3, 0.1]])), [[0.3, -1], [0.3, 1]], rtol=1e-6)
    assert raw[0, 1] == -1
