"""Observations in, actions in the robot's units out."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from maps_ray.models import CheckpointError, create_policy, load_policy, load_processor, save_policy
from maps_ray.models.minivla.tiny import write_tiny
from maps_ray.models.predict import Codec, NotFiniteError
from maps_ray.models.resampling import center_crop, evaluation_image
from maps_ray.models.units import Units, VectorUnits

DATA = Path(__file__).parents[1] / "fixtures" / "data"
KEY = "libero_spatial_no_noops"
SIZES: dict[str, Any] = {"num_images": 2, "use_proprio": True}


@pytest.mark.parametrize(("normalization", "bounds"), [("q01_q99", "bounds_q99"), ("min_max", "bounds")])
def test_units_of_the_published_code(normalization: Any, bounds: str) -> None:
    stored = np.load(DATA / "normalize.npz")
    units = Units.read(DATA, normalization)
    assert units.key == KEY and units.proprio is not None
    for vector, name in ((units.action, "action"), (units.proprio, "proprio")):
        np.testing.assert_allclose(vector.normalize(stored[f"{name}_raw"]), stored[f"{name}_{bounds}"], atol=1e-6)


def test_unnormalized_as_the_published_code() -> None:
    stored = np.load(DATA / "unnormalize.npz")
    units = Units.read(DATA, "q01_q99")
    np.testing.assert_allclose(units.action.unnormalize(stored["normalized"]), stored["unnormalized"], atol=1e-6)


def test_a_dimension_that_never_changes_comes_back() -> None:
    raw = {"q01": [2, 0], "q99": [2, 4], "min": [2, -1], "max": [2, 5]}
    units = VectorUnits.from_dict(raw, "q01_q99", "statistics")
    assert units.normalize(np.array([7.0, 4.0])).tolist() == [0, 1]
    assert units.unnormalize(np.array([0.9, -1.0])).tolist() == [2, 0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39, "0.5", True, None, [1.0]])
@pytest.mark.parametrize("name", ["min", "max", "q01", "q99"])
def test_statistics_hold_finite_numbers_alone(name: str, value: Any) -> None:
    raw = {"q01": [0.0, 0.0], "q99": [1.0, 1.0], "min": [0.0, 0.0], "max": [1.0, 1.0]}
    raw[name][1] = value
    with pytest.raises(CheckpointError, match=rf"statistics: {name}\[1\] = .*must be a finite number"):
        VectorUnits.from_dict(raw, "q01_q99", "statistics")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q01": [0.0, 2.0]}, r"q01\[1\] = 2 lies above q99\[1\] = 1"),
        ({"max": [-1.0, 1.0]}, r"min\[0\] = 0 lies above max\[0\] = -1"),
        ({"mask": ["false", True]}, "mask = .*must be a list of true and false"),
        ({"mask": [True]}, "differ in length"),
        ({"q99": 1.0}, "q99 = 1.0: must be a list of numbers"),
        ({"min": []}, "min = .*must be a list of numbers"),
    ],
)
def test_statistics_that_are_damaged(changes: dict[str, Any], message: str) -> None:
    raw = {"q01": [0.0, 0.0], "q99": [1.0, 1.0], "min": [0.0, 0.0], "max": [1.0, 1.0], **changes}
    with pytest.raises(CheckpointError, match=message):
        VectorUnits.from_dict(raw, "q01_q99", "statistics")


@pytest.fixture(scope="module")
def checkpoint(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small policy, trained with two cameras on plain images, with the published statistics."""
    policy = load_policy(small_checkpoint, dtype=torch.float32, **SIZES)
    out = tmp_path_factory.mktemp("predict") / "checkpoint"
    statistics = json.loads((DATA / "dataset_statistics.json").read_text())
    trained_for = {**SIZES, "normalization": "min_max", "images": "plain"}
    save_policy(
        policy.state_dict(), small_checkpoint, out, dtype=torch.float32, statistics=statistics, trained_for=trained_for
    )
    return out


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), dtype=np.uint8))


STATE = np.array([0.1, 0.0, 1.0, 3.0, -0.2, -0.1, 0.03, -0.03])


def test_actions_are_those_of_the_policy_in_recorded_units(checkpoint: Path, images: list[np.ndarray]) -> None:
    policy = load_policy(checkpoint)
    assert policy.config.num_images == 2 and policy.config.use_proprio
    actions = policy.predict(images=images, instruction="pick up the red bowl", proprio=STATE)
    assert actions.shape == (8, 7) and actions.dtype == np.float32 and policy.training
    units = Units.read(checkpoint, "min_max")
    processor = policy.codec.processor
    batch = processor.collate([processor.encode("pick up the red bowl", images, units.proprio.normalize(STATE))])
    with torch.no_grad():
        expected = units.action.unnormalize(policy(**batch).actions[0].numpy())
    np.testing.assert_array_equal(actions, expected)
    low, high = units.action.low[:6], units.action.high[:6]
    assert not np.array_equal(actions[:, :6], np.clip(actions[:, :6], low, high)) or (low < high).all()


def test_images_are_prepared_as_in_training(checkpoint: Path, images: list[np.ndarray]) -> None:
    policy = load_policy(checkpoint)
    inputs = {"images": images, "instruction": "pick up", "proprio": STATE}
    plain = policy.predict(**inputs)
    prepared = {"openvla": lambda image: evaluation_image(image, (28, 28)), "crop": center_crop}
    for kind, prepare in prepared.items():
        policy.codec = Codec.read(policy, images=kind)  # type: ignore[arg-type]
        changed = policy.predict(**inputs)
        policy.codec = Codec.read(policy)
        np.testing.assert_array_equal(changed, policy.predict(**{**inputs, "images": list(map(prepare, images))}))
        assert not np.array_equal(changed, plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": []}, "0 images were given; the policy reads 2"),
        ({"images": [np.zeros((4, 4, 3), np.float32)] * 2}, r"must be \(H, W, 3\) uint8"),
        ({"proprio": None}, "proprio was not given"),
        ({"proprio": [0.0] * 7}, r"proprio has shape \[7\], expected \[8\]"),
        ({"proprio": [float("nan")] * 8}, "finite"),
    ],
)
def test_observations_that_do_not_fit(checkpoint: Path, images, changes: dict[str, Any], message: str) -> None:
    policy = load_policy(checkpoint)
    with pytest.raises(ValueError, match=message):
        policy.predict(**{"images": images, "instruction": "pick up", "proprio": STATE, **changes})


def test_statistics_that_do_not_fit(checkpoint: Path, images, tmp_path: Path, small_config: dict[str, Any]) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    file = folder / "dataset_statistics.json"
    entry = json.loads(file.read_text())[KEY]

    def refused(statistics: Any) -> str:
        file.write_text(json.dumps(statistics))
        with pytest.raises(CheckpointError) as caught:
            load_policy(folder).predict(images, "pick up", STATE)
        return str(caught.value)

    assert "2 data sets, and `dataset` says none of them; choose one of a, b" in refused({"a": entry, "b": entry})
    short = {name: values[:6] for name, values in entry["action"].items()}
    assert "has 6 action dimensions, not 7" in refused({KEY: {**entry, "action": short}})
    assert "has no proprio dimensions, not 8" in refused({KEY: {"action": entry["action"]}})
    assert "has no statistics of actions" in refused({KEY: {"proprio": entry["proprio"]}})
    assert "proprio = [1]: must be an object" in refused({KEY: {**entry, "proprio": [1]}})
    assert "names no data set: write its content below one" in refused(entry)
    spoilt = {**entry["action"], "max": [*entry["action"]["max"][:2], float("inf"), *entry["action"]["max"][3:]]}
    assert f"{KEY}: action: max[2] = inf: must be a finite number" in refused({KEY: {**entry, "action": spoilt}})
    with pytest.raises(CheckpointError, match="not loaded from a folder"):
        create_policy(small_config).predict(images[:1], "pick up")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("model.safetensors", "language_model.model.norm.weight"),
        ("action_head--0_checkpoint.safetensors", "module.model.fc2.bias"),
    ],
)
def test_weights_that_are_not_finite(checkpoint: Path, tmp_path: Path, file: str, key: str, value: float) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    tensors = load_file(folder / file)
    tensors[key].view(-1)[-1] = value
    save_file(tensors, folder / file)
    with pytest.raises(CheckpointError, match=f"values that are not finite in {key.removeprefix('module.')}"):
        load_policy(folder)


def test_actions_that_are_not_finite_never_come_out(checkpoint: Path, images: list[np.ndarray]) -> None:
    policy = load_policy(checkpoint)
    with torch.no_grad():
        next(policy.parameters()).fill_(torch.inf)
    with pytest.raises(NotFiniteError, match="56 of 56 predicted values are not finite"):
        policy.predict(images, "pick up", STATE)


def test_half_a_character_is_no_sentence(checkpoint: Path, images: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match="surrogate"):
        load_policy(checkpoint).predict(images, "pick up \ud83d", STATE)


@pytest.mark.parametrize("kind", ["oft", "vq"])
def test_minivla(images: list[np.ndarray], tmp_path: Path, kind: Any) -> None:
    write_tiny(tmp_path / "base", kind, ["pick up"])
    policy = load_policy(tmp_path / "base", dtype=torch.float32, num_images=2, use_proprio=kind == "oft")
    statistics = json.loads((DATA / "dataset_statistics.json").read_text())
    trained_for = {"num_images": 2, "use_proprio": kind == "oft", "normalization": "min_max", "images": "crop"}
    out = tmp_path / "trained"
    save_policy(
        policy.state_dict(),
        tmp_path / "base",
        out,
        dtype=torch.float32,
        statistics=statistics,
        trained_for=trained_for,
    )
    trained = load_policy(out, dtype=torch.float32)
    state = STATE if kind == "oft" else None
    actions = trained.predict(images, "pick up", state)
    units = Units.read(out, "min_max")
    processor = load_processor(out)
    proprio = units.proprio.normalize(state) if state is not None else None
    batch = processor.collate([processor.encode("pick up", [center_crop(image) for image in images], proprio)])
    with torch.no_grad():
        expected = units.action.unnormalize(trained.eval()(**batch).actions[0].numpy())
    assert actions.shape == (8, 7)
    np.testing.assert_array_equal(actions, expected)


def test_several_observations_in_one_pass(checkpoint: Path, images: list[np.ndarray]) -> None:
    policy = load_policy(checkpoint)
    codec = policy.ready_codec()
    sentences = ["pick up the red bowl", "open the drawer and pick up the red bowl"]
    samples = [codec.encode(images, sentence, STATE) for sentence in sentences]
    longest = max(len(sample["input_ids"]) for sample in samples)
    expected = np.stack([policy.predict(images, sentence, STATE) for sentence in sentences])
    for length in (None, longest + 9):
        np.testing.assert_allclose(policy.predict_batch(samples, length=length), expected, atol=1e-5)
    batch = codec.batch(samples, longest + 9)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, longest + 9)
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(sample["input_ids"]) for sample in samples]
    with pytest.raises(ValueError, match=f"has {longest} tokens, more than {longest - 1}"):
        policy.predict_batch(samples, length=longest - 1)


def test_more_images_than_in_training(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="num_images = 3: the checkpoint was trained with 2"):
        load_policy(checkpoint, num_images=3)
