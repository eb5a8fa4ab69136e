"""Sweeps over the small policy of the training tests."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from maps_ray.spec import RunSpec, dump

_ROOT = Path(__file__).parents[2]
_found = importlib.util.spec_from_file_location("training_fixtures", _ROOT / "tests" / "training" / "conftest.py")
_training = importlib.util.module_from_spec(_found)
_found.loader.exec_module(_training)
base, demonstrations, frame_cache = _training.base, _training.demonstrations, _training.frame_cache
make_spec, ray_session = _training.make_spec, _training.ray_session

MakeSweep = Callable[..., Path]


@pytest.fixture
def make_sweep(make_spec: Callable[..., RunSpec], tmp_path: Path) -> MakeSweep:
    """Writes a sweep spec over the small policy and returns its path; fields are set in these defaults."""

    def make(run: dict[str, Any] | None = None, **fields: Any) -> Path:
        spec = make_spec(
            "base", **{"cluster": {"workers": 1, "storage": tmp_path / "runs", "start_timeout_s": 180}, **(run or {})}
        )
        (tmp_path / "base.yaml").write_text(dump(spec))
        raw = {
            "name": "swept",
            "base": "base.yaml",
            "space": [str(_ROOT / "tune_spaces" / "orders.yaml"), str(_ROOT / "tune_spaces" / "strengths.yaml")],
            "searcher": "random",
            "budget": {"trials": 4},
            "known_strengths": [1.0],
            **fields,
        }
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(raw))
        return path

    return make
