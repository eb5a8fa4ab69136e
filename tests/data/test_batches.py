from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from squares_data import Recorded

from maps_ray.data import Batches, DatasetError, Demonstrations, EvaluationBatches, Mixture
from maps_ray.data.statistics import gripper_from_libero, normalize
from maps_ray.spec import DataSpec

CHUNK = 4
SPLITS = {
    "train": {"tasks": ["*cube"], "episodes": ":-1"},
    "held_out": {"tasks": ["*cube"], "episodes": "-1:"},
    "ood": {"tasks": ["*drawer"]},
}


class Stack:
    """A processor that keeps what it is given."""

    def encode(
        self,
        instruction: str,
        images: Sequence[np.ndarray],
        proprio: np.ndarray | None,
        actions: np.ndarray | None,
    ) -> dict[str, object]:
        return {"instruction": instruction, "images": np.stack(images), "proprio": proprio, "actions": actions}

    def collate(self, samples: Sequence[dict[str, object]]) -> dict[str, list[object]]:
        return {key: [sample[key] for sample in samples] for key in samples[0]}


@pytest.fixture
def demonstrations(squares: Recorded) -> Demonstrations:
    return Demonstrations(DataSpec(path=squares.root, chunk=CHUNK, splits=SPLITS), use_proprio=True)


@pytest.fixture
def train(demonstrations: Demonstrations) -> Mixture:
    return demonstrations.samples("train")


def test_statistics_are_of_the_train_split_only(squares: Recorded, demonstrations: Demonstrations) -> None:
    assert demonstrations.sources[0].splits["train"] == ("train", [0, 1, 3, 4])
    (statistics,) = demonstrations.statistics.values()
    actions = np.concatenate([gripper_from_libero(squares.actions[i]) for i in (0, 1, 3, 4)]).astype(np.float64)
    np.testing.assert_allclose(statistics.action.q99, np.quantile(actions, 0.99, axis=0))
    assert statistics.action.max[6] == 1 and statistics.action.min[6] == 0
    assert statistics.num_trajectories == 4


def test_samples_are_aligned_with_the_recording(
    squares: Recorded, demonstrations: Demonstrations, train: Mixture
) -> None:
    assert len(train) == sum(len(squares.actions[i]) - CHUNK + 1 for i in (0, 1, 3, 4))
    stats = demonstrations.statistics["data"]
    row = 0
    for episode in (0, 1, 3, 4):
        actions = normalize(gripper_from_libero(squares.actions[episode]), stats.action, "q01_q99")
        proprio = normalize(squares.states[episode], stats.proprio, "q01_q99")
        for step in range(len(actions) - CHUNK + 1):
            sample = train[row]
            assert (sample.episode, sample.step) == train.parts[0].locate(row) == (episode, step)
            assert sample.instruction == train.task(row) == squares.tasks[episode]
            np.testing.assert_array_equal(sample.actions, actions[step : step + CHUNK])
            np.testing.assert_array_equal(sample.proprio, proprio[step])
            for image, camera in zip(sample.images, ("image", "wrist_image"), strict=True):
                original = squares.images[camera][episode].astype(int)
                assert np.abs(original - image).mean(axis=(1, 2, 3)).argmin() == step
            row += 1
    assert set(sample.actions[:, 6]) <= {0.0, 1.0}
    with pytest.raises(IndexError):
        train[row]


def test_proprioception_that_never_changes_is_zero(train: Mixture) -> None:
    assert all(train[index].proprio[7] == 0 for index in range(len(train)))


def test_without_proprioception_and_gripper_rule(squares: Recorded) -> None:
    spec = DataSpec(path=squares.root, chunk=CHUNK, gripper="none", normalization="min_max", cameras=["wrist_image"])
    demonstrations = Demonstrations(spec, use_proprio=False)
    sample = demonstrations.samples("train")[0]
    assert sample.proprio is None and len(sample.images) == 1
    statistics = demonstrations.statistics["data"]
    assert statistics.proprio is None and statistics.action.mask.all()
    assert set(sample.actions[:, 6]) <= {-1.0, 1.0}


def test_episodes_shorter_than_a_chunk_are_left_out(squares: Recorded) -> None:
    samples = Demonstrations(DataSpec(path=squares.root, chunk=15), use_proprio=True).samples("train")
    assert samples.parts[0].episodes == [6, 7, 8] and len(samples) == 1 + 2 + 3
    with pytest.raises(DatasetError, match=r"18 steps \(data.chunk\)"):
        Demonstrations(DataSpec(path=squares.root, chunk=18), use_proprio=True).samples("train")


def test_nan_is_refused(squares: Recorded, copy: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = copy / "data/chunk-000/file-000.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[10]["action"][1] = float("nan")
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(DatasetError, match="nan in episode 1, frame 1, dimension 1"):
        Demonstrations(DataSpec(path=copy, splits=SPLITS), use_proprio=True)


def batches(train: Mixture, **options: int) -> Batches:
    return Batches(train, Stack(), **{"seed": 3, "global_batch_size": 12, **options})


@pytest.mark.parametrize(("world_size", "micro_batches"), [(2, 1), (3, 1), (1, 3), (2, 2)])
def test_any_number_of_workers_sees_the_same_global_batches(
    train: Mixture, world_size: int, micro_batches: int
) -> None:
    alone = batches(train)
    together = [
        batches(train, rank=rank, world_size=world_size, micro_batches=micro_batches) for rank in range(world_size)
    ]
    for step in range(12):
        parts = [worker.indices(step, micro) for micro in range(micro_batches) for worker in together]
        assert list(chain.from_iterable(parts)) == alone.indices(step)
        assert {len(part) for part in parts} == {12 // world_size // micro_batches}


def test_each_epoch_shows_each_sample_once_in_another_order(train: Mixture) -> None:
    n = len(train)
    endless = batches(train, global_batch_size=1)
    epochs = [[endless.sample_at(position) for position in range(e * n, (e + 1) * n)] for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(n))


def test_order_is_given_by_seed_and_position_whatever_was_asked_before(train: Mixture) -> None:
    forward = [batches(train).indices(step) for step in range(20)]
    same = batches(train)
    assert [same.indices(step) for step in reversed(range(20))] == forward[::-1]
    assert [batches(train, seed=4).indices(step) for step in range(20)] != forward


def test_a_batch_larger_than_the_split(train: Mixture) -> None:
    big = batches(train, global_batch_size=3 * len(train)).indices(0)
    assert Counter(big) == dict.fromkeys(range(len(train)), 3)


def test_batches_hold_their_samples(train: Mixture) -> None:
    maker = batches(train)
    batch = maker.batch(5)
    for row, index in enumerate(maker.indices(5)):
        np.testing.assert_array_equal(batch["images"][row], np.stack(train[index].images))
        np.testing.assert_array_equal(batch["actions"][row], train[index].actions)
    assert [len(plan) for plan in batches(train, micro_batches=2).plans(4, 6)] == [6, 6, 6, 6]


def test_a_batch_size_that_does_not_divide(train: Mixture) -> None:
    with pytest.raises(ValueError, match="12 does not divide by 5 workers"):
        batches(train, world_size=5)


@pytest.mark.parametrize(("max_samples", "world_size", "batch_size"), [(1000, 2, 4), (10, 2, 4), (10, 3, 3), (1, 2, 2)])
def test_evaluation_covers_its_samples_once_with_equal_batches(
    train: Mixture, max_samples: int, world_size: int, batch_size: int
) -> None:
    sizes = {"batch_size": batch_size, "max_samples": max_samples, "world_size": world_size}
    ranks = [EvaluationBatches(train, Stack(), rank=rank, **sizes) for rank in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1
    rows = [row for rank in ranks for part in rank.rows for row in zip(*part, strict=True)]
    for rank in ranks:
        for plan, (indices, _) in zip(rank.plans(0, len(rank)), rank.rows, strict=True):
            assert [index for _, index in plan] == indices
            assert len(rank.encoder[plan]["actions"]) == batch_size
    real = sorted(index for index, weight in rows if weight == 1)
    count = min(max_samples, len(train))
    assert len(real) == len(set(real)) == count
    assert {weight for _, weight in rows} <= {0.0, 1.0}
    if 1 < count < len(train):
        gaps = np.diff(real)
        assert real[0] == 0 and real[-1] == len(train) - 1 and gaps.max() - gaps.min() <= 1
