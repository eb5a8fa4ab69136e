from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from maps_ray.data import DatasetError, open_dataset
from maps_ray.data.transforms import TRANSFORMS, binary_gripper, resolve

DATA = Path(__file__).parents[1] / "fixtures" / "data"
MODULE = """
import numpy as np

def relative(episode):
    assert set(episode) == {"action", "state", "reward", "discount", "is_first", "is_last", "is_terminal",
                            "observation/joint_state"}
    return {"action": np.diff(episode["action"], axis=0), "state": episode["state"][1:, :3]}

relative.dropped = (1, 0)
relative.masked = "all_but_last"

def short(episode):
    return {"action": episode["action"][1:]}

def broken(episode):
    return {"action": episode["no such feature"]}

value = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_transforms.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "my_transforms"


def test_a_transform_of_ones_own(module: str) -> None:
    stored = open_dataset(DATA / "libero_spatial/data")
    made = open_dataset(DATA / "libero_spatial/data", transform=f"{module}:relative")
    assert [e.length for e in made.episodes] == [e.length - 1 for e in stored.episodes]
    np.testing.assert_array_equal(made.vectors("action", 2), np.diff(stored.vectors("action", 2), axis=0))
    np.testing.assert_array_equal(made.vectors("state", 2), stored.vectors("state", 2)[1:, :3])
    assert (made.width("action"), made.width("state")) == (7, 3)
    np.testing.assert_array_equal(made.frame("image", 2, 0), stored.frame("image", 2, 1))
    assert made.transform is not None and made.transform.action_mask(3).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_transforms:short", r"returns action of shape \(\d+, 7\).* ask for \(\d+, D\)"),
        ("my_transforms:broken", r"my_transforms:broken fails \(KeyError: 'no such feature'\)"),
        ("my_transforms:nothing", "cannot be imported"),
        ("my_transforms:value", "must be a function"),
        ("no_such_module:f", "cannot be imported .* the module's folder in PYTHONPATH"),
    ],
)
def test_transforms_that_cannot_be_used(module: str, name: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        open_dataset(DATA / "libero_spatial/data", transform=name).vectors("action", 0)


def test_binary_gripper() -> None:
    values = np.array([0.5, 0.97, 0.3, 0.01, 0.6, 0.96, 0.5, 0.6], np.float32)
    np.testing.assert_array_equal(binary_gripper(values), np.array([1, 1, 0, 0, 1, 1, 0.6, 0.6], np.float32))


def test_calvin_and_aloha() -> None:
    calvin, aloha = resolve("calvin"), TRANSFORMS["aloha"]
    assert calvin is not None
    state = np.arange(30, dtype=np.float32).reshape(2, 15)
    action = np.array([[0] * 6 + [-1], [0] * 6 + [1]], np.float32)
    made = calvin.apply({"action": action, "state": state})
    np.testing.assert_array_equal(made["state"], state[:, [0, 1, 2, 3, 4, 5, 6, 14]])
    assert made["action"][:, 6].tolist() == [0, 1] and not calvin.action_mask(7)[-1]
    with pytest.raises(DatasetError, match="has 9 values"):
        calvin.apply({"action": action, "state": state[:, :9]})
    wide = {"action": np.ones((3, 14), np.float32), "state": np.ones((3, 14), np.float32)}
    assert aloha.apply(wide) == wide and aloha.action_mask(14).all() and aloha.normalization == "min_max"
