"""Libraries outside the tested range are named before they build anything."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import pytest

from maps_ray.models import CheckpointError, check_versions, create_policy


@pytest.fixture(autouse=True)
def forget():
    check_versions.cache_clear()
    yield
    check_versions.cache_clear()


def test_installed_versions_are_tested_ones() -> None:
    check_versions()


@pytest.mark.parametrize(("library", "version"), [("timm", "0.9.16"), ("timm", "1.1.0"), ("transformers", "4.40.1")])
def test_other_versions_are_refused(
    small_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, library: str, version: str
) -> None:
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version if name == library else installed(name))
    with pytest.raises(CheckpointError, match=rf"{library} {version} is installed; .*pip install '{library}"):
        create_policy(small_config)
