"""Fixtures of the data tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from squares_data import Recorded, write


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """The data set; tests must not change it."""
    return write(tmp_path_factory.mktemp("squares") / "data")


@pytest.fixture
def copy(squares: Recorded, tmp_path: Path) -> Path:
    """A copy of its folder, to be spoilt."""
    shutil.copytree(squares.root, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A frame cache of this test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MAPS_RAY_CACHE", str(folder))
    return folder
