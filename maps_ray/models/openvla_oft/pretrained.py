"""The weights that a policy starts from, read one by one: stored, merged with an adapter, or from a FiLM backbone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from maps_ray.models.files.formats import MappedTensors
from maps_ray.models.lora import Adapter


@dataclass(frozen=True)
class PretrainedWeights:
    """Tensors under checkpoint keys; nothing is held in memory but a FiLM backbone's. Picklable."""

    stored: MappedTensors
    """`model.safetensors` or its shards."""
    adapter: Adapter | None = None
    """Added to the stored weights as they are read."""
    vision: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors that stand in for stored ones."""

    def __contains__(self, key: str) -> bool:
        return key in self.stored

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def give_back(self) -> None:
        """Takes the tensor read last out of memory, see `MappedTensors.give_back`."""
        self.stored.give_back()

    def read(self, key: str) -> Tensor:
        """The tensor in its stored dtype, or in fp32 where an adapter changes it. Never write to it: it may be a file.

        Raises:
            CheckpointError: the file changed or cannot be read any more.
        """
        if key in self.vision:
            return self.vision[key]
        weight = self.stored.read(key)
        change = self.adapter.change(key) if self.adapter is not None else None
        return weight if change is None else weight.float() + change
