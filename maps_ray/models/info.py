"""What can be said of a checkpoint without loading it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from maps_ray.models.checkpoint_faults import CheckpointError, Shape
from maps_ray.models.files.folders import main_dtype, survey_modules
from maps_ray.models.files.formats import TensorInfo
from maps_ray.proximity.stack import StackLayer

Found = TypeVar("Found")


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


class Survey:
    """A look at a checkpoint folder that does not end at the first fault.

    Args:
        folder: the checkpoint.
        raw: contents of its `config.json`.
    """

    def __init__(self, folder: Path, raw: Mapping[str, object]) -> None:
        self._folder = folder
        self._raw = raw
        self.problems: list[str] = []

    def look(self, read: Callable[[], Found], otherwise: Found) -> Found:
        """What `read` gives; `otherwise` where it raises `CheckpointError`, which is then one of the problems."""
        try:
            return read()
        except CheckpointError as error:
            self.problems.append(str(error))
            return otherwise

    def info(
        self,
        name: str,
        image_size: int,
        infos: Mapping[str, TensorInfo],
        stack: list[StackLayer],
        parameters: dict[str, Shape],
        modules: Mapping[str, Mapping[str, Shape]],
        published_name: Callable[[str], str],
        fresh: Iterable[str] = (),
    ) -> ModelInfo:
        """All that was found, after a look at the files of modules.

        Args:
            name: of the policy.
            image_size: height and width in pixels.
            infos: the stored tensors of the model.
            stack: its layers.
            parameters: as in `ModelInfo`.
            modules: of each module that has a file of its own, the tensors it needs.
            published_name: as in `ModelInfo`.
            fresh: other modules that the folder has no weights for.
        """
        without_file, faults = survey_modules(self._folder, modules)
        return ModelInfo(
            name=name,
            path=self._folder,
            stack=stack,
            parameters=parameters,
            dtype=main_dtype(infos, self._raw),
            image_size=image_size,
            fresh_modules=(*fresh, *without_file),
            problems=[*self.problems, *faults],
            published_name=published_name,
        )
