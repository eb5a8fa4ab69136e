"""What a policy and its processor are to the other rooms, whatever the backbone.

`policy.BasePolicy` implements what backbones share of `Policy`; each backbone's folder has a `Processor` of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from maps_ray.models.sizes import BaseConfig
    from maps_ray.proximity.stack import StackLayer
    from maps_ray.proximity.zero.deepspeed_engine import Output


class Prompts(Protocol):
    """Puts a task's sentence into a policy's prompt."""

    def encode(self, instruction: str, /) -> Sequence[int]:
        """Ids of the whole prompt, special tokens included."""


class Processor(Protocol):
    """Text, images, proprioception and actions of a sample -> a policy's input. Picklable: a data worker owns one."""

    @property
    def prompts(self) -> Prompts:
        """What stands before the answer."""

    @property
    def pad(self) -> int:
        """Id that fills the shorter token sequences of a batch, behind their end."""

    def encode(
        self,
        instruction: str,
        images: Sequence[NDArray[np.uint8]],
        proprio: NDArray[np.floating] | None = None,
        actions: NDArray[np.floating] | None = None,
    ) -> dict[str, NDArray[np.generic]]:
        """One sample.

        Args:
            instruction: the task's sentence.
            images: RGB, (H, W, 3) uint8 of any size, primary camera first.
            proprio: (proprio_dim,) normalised.
            actions: (chunk, action_dim) normalised; None where they are to be predicted.

        Returns:
            `pixel_values` (6 * images, height, width) float32, `input_ids` and `labels` (L,) int64, and `proprio` and
            `actions` float32 where given.

        Raises:
            ValueError: an image or the actions have another shape.
        """

    def collate(self, samples: Sequence[Mapping[str, NDArray[np.generic]]]) -> dict[str, Tensor]:
        """Samples of `encode` -> the keyword arguments of the policy's `forward`, padded on the right.

        Raises:
            ValueError: no samples, or samples of which only some have proprio or actions.
        """


class Policy(Protocol):
    """From a batch of `Processor.collate` to a loss and a chunk of actions; every implementation is an `nn.Module`.

    What is trained is not only its parameters: it also says in which order they stand, what they were before training,
    and which of them no gradient reaches.
    """

    @property
    def config(self) -> BaseConfig:
        """Sizes: the backbone's `PolicyConfig`."""

    folder: Path | None
    """The checkpoint that it was loaded from; None for random weights."""
    trained_for: Mapping[str, Any]
    """`policy` of that checkpoint's `config.json`: sizes, normalisation, cameras."""
    fresh_modules: tuple[str, ...]
    """Modules that the checkpoint did not bring, with random weights."""
    deferred: frozenset[str]
    """Parameters that are still to be filled from `read_anchor`: until then they are NaN and take no memory."""

    def __call__(self, **batch: Tensor) -> Output:
        """One forward pass.

        Args:
            batch: as `Processor.collate` gives it: `pixel_values` (B, 6 * images, H, W) float, normalised for both
                towers; `input_ids` (B, L) int64: prompt, places of the actions, perhaps stop tokens, padding;
                `attention_mask` (B, L) bool or 0/1, False at padding; `labels` (B, L) int64, which say where the
                actions are, all else is ignored; where the policy reads it, `proprio` (B, proprio_dim) normalised,
                (proprio_dim,) is taken for B = 1; and to train, `actions` (B, chunk, action_dim) normalised.

        Returns:
            a named tuple, so that ZeRO-3 finds the tensors in it, with `loss` (fp32 scalar, None without the true
            actions) and `actions` (B, chunk, action_dim), normalised; in training mode None of a policy that generates
            them.

        Raises:
            ValueError: a shape that does not fit the configuration, or proprio missing or not expected.
            RuntimeError: a row of `labels` does not mark as many places as the policy has.
        """

    def stack(self) -> list[StackLayer]:
        """The ordered layers for a MAPS schedule; they cover every parameter exactly once."""

    def idle_parameters(self) -> frozenset[str]:
        """Parameters that can get no gradient, adapters among them: training leaves them as they are."""

    def published_name(self, name: str) -> str:
        """Name of a parameter or adapter -> its name in the published Hugging Face layout."""

    def read_anchor(self, name: str) -> Tensor | None:
        """The pretrained weights of one parameter, in the checkpoint's dtype; None where it has none."""

    def close_base(self) -> None:
        """Takes what `read_anchor` has mapped out of memory; it can still be called."""

    def read_processor(self, folder: Path) -> Processor:
        """The processor that makes this policy's input, of a checkpoint folder.

        Raises:
            CheckpointError: a file is missing or malformed.
        """

    def predict(
        self, images: Sequence[NDArray[np.uint8]], instruction: str, proprio: Sequence[float] | None = None
    ) -> NDArray[np.float32]:
        """Actions (chunk, action_dim) for one observation, in the units of the training data."""
