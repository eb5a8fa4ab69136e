"""What can be said of a checkpoint without loading it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from maps_ray.models.errors import Shape
from maps_ray.proximity.stack import StackLayer


@dataclass(frozen=True)
class ModelInfo:
    """A checkpoint folder as its configuration and headers describe it."""

    name: str
    """The backbone: `openvla_oft`."""
    path: Path
    stack: list[StackLayer]
    parameters: dict[str, Shape]
    """Every parameter of the policy, head and proprio projector included: name -> shape."""
    dtype: str
    """Of most of the stored values, as torch spells it: `bfloat16`."""
    image_size: int
    """Height and width in pixels."""
    fresh_modules: tuple[str, ...]
    """Modules that the folder has no weights for; they start at random."""
    problems: list[str]
    """What keeps the checkpoint from being loaded; empty when nothing does."""
    published_name: Callable[[str], str] = str
    """Name of a parameter -> its name in the published Hugging Face layout."""
