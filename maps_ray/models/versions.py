"""Whether the installed libraries are those that the models were tested with."""

from __future__ import annotations

from functools import cache
from importlib import metadata

from packaging.requirements import Requirement

from maps_ray.models.checkpoint_faults import CheckpointError

# What builds the networks: another version may compute something else, or name parameters otherwise, without an error.
_CHECKED = ("timm", "transformers")


@cache
def check_versions() -> None:
    """Raises `CheckpointError` where timm or transformers is not in the range that this package asks for."""
    asked = [Requirement(text) for text in metadata.requires("maps_ray") or ()]
    for requirement in asked:
        if requirement.name in _CHECKED:
            found = metadata.version(requirement.name)
            if not requirement.specifier.contains(found, prereleases=True):
                raise CheckpointError(
                    f"{requirement.name} {found} is installed; the models are tested with {requirement}: "
                    f"pip install '{requirement}'"
                )
