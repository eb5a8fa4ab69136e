"""Which OpenGL library renders: the fastest that shows the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from maps_ray.evaluation.simulators import opengl
from maps_ray.evaluation.simulators.opengl import Probe, fastest, same_picture

FRAME = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)


def shifted(levels: int) -> np.ndarray:
    return np.clip(FRAME.astype(int) + levels, 0, 255).astype(np.uint8)


def test_same_picture() -> None:
    assert same_picture(FRAME, FRAME)
    edge = FRAME.copy()
    edge[100, :80] = 255 - edge[100, :80]
    assert same_picture(edge, FRAME)
    # mujoco after 3.2.7 renders the floor darker.
    assert not same_picture(shifted(-4), FRAME) and not same_picture(FRAME[:128], FRAME)


def test_the_fastest_that_shows_the_same() -> None:
    reference = Probe(0.10, FRAME)
    assert fastest({"osmesa": reference, "egl": Probe(0.01, FRAME)}) == "egl"
    assert fastest({"osmesa": reference, "egl": Probe(0.09, FRAME)}) == "osmesa"
    assert fastest({"osmesa": reference, "egl": Probe(0.01, shifted(9))}) == "osmesa"
    assert fastest({"osmesa": None, "egl": Probe(0.5, FRAME)}) == "egl"
    assert fastest({"osmesa": None, "egl": None}) == "osmesa"


def test_the_choice_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tried: list[str] = []

    def probed(name: str) -> Probe:
        tried.append(name)
        return Probe({"osmesa": 0.1, "egl": 0.02}[name], FRAME)

    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delitem(sys.modules, "mujoco", raising=False)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: name)
    monkeypatch.setattr(opengl, "try_backend", probed)
    for _ in range(2):
        monkeypatch.setenv("MUJOCO_GL", "")
        opengl.choose_backend("LIBERO", ("osmesa", "egl"))
        assert opengl.os.environ["MUJOCO_GL"] == opengl.os.environ["PYOPENGL_PLATFORM"] == "egl"
    assert tried == ["osmesa", "egl"]
    (file,) = (tmp_path / "maps_ray").iterdir()
    assert json.loads(file.read_text()) == {"backend": "egl", "seconds_a_frame": {"osmesa": 0.1, "egl": 0.02}}
    monkeypatch.setenv("MUJOCO_GL", "")
    opengl.choose_backend("LIBERO", ("osmesa", "egl"), probe=False)
    assert opengl.os.environ["MUJOCO_GL"] == "osmesa"


@pytest.mark.slow
@pytest.mark.sim
def test_a_renderer_is_tried_for_real() -> None:
    probe = opengl.try_backend("osmesa")
    if probe is None:
        pytest.skip("no OSMesa here")
    assert probe.seconds > 0 and np.ptp(probe.frame) > 100
    assert opengl.try_backend("no such renderer") is None
