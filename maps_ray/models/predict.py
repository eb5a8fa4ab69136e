"""From camera images, a sentence and recorded proprioception to a policy's input, and what must not leave it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from maps_ray.models.checkpoint_faults import CheckpointError
from maps_ray.models.collate import IGNORED, Sample
from maps_ray.models.contracts import Policy, Processor
from maps_ray.models.resampling import center_crop, evaluation_image
from maps_ray.models.units import Images, Normalization, Units, units_and_images


@dataclass(frozen=True)
class Codec:
    """What stands between a robot and a policy: its processor, and the units of the data it was trained on."""

    processor: Processor
    units: Units
    images: Images
    image_size: tuple[int, int]
    num_images: int
    use_proprio: bool

    @classmethod
    def read(
        cls,
        policy: Policy,
        *,
        dataset: str | None = None,
        normalization: Normalization | None = None,
        images: Images | None = None,
    ) -> Codec:
        """Reads processor and statistics of the checkpoint that a policy was loaded from.

        Without `policy` in the checkpoint's `config.json` the published training is assumed: quantiles, and images as
        in the published evaluation.

        Args:
            policy: loaded from a folder.
            dataset: key in `dataset_statistics.json`; may be left out where there is only one.
            normalization: `q01_q99` or `min_max`; none takes what the checkpoint says.
            images: see `Images`; none takes what the checkpoint says.

        Raises:
            CheckpointError: no folder, no statistics, or statistics of another robot.
        """
        folder, config, trained_for = policy.folder, policy.config, policy.trained_for
        if folder is None:
            raise CheckpointError("the policy was not loaded from a folder: it has no statistics of actions")
        normalization, images = units_and_images(trained_for, {"normalization": normalization, "images": images})
        units = Units.read(folder, normalization, dataset)
        where = f"{folder / 'dataset_statistics.json'}: {units.key}"
        if units.action.low.size != config.action_dim:
            raise CheckpointError(f"{where} has {units.action.low.size} action dimensions, not {config.action_dim}")
        if config.use_proprio and (units.proprio is None or units.proprio.low.size != config.proprio_dim):
            dimensions = "no" if units.proprio is None else str(units.proprio.low.size)
            raise CheckpointError(f"{where} has {dimensions} proprio dimensions, not {config.proprio_dim}")
        size = (config.image_size, config.image_size)
        return cls(policy.read_processor(folder), units, images, size, config.num_images, config.use_proprio)

    def encode(
        self,
        images: Sequence[NDArray[np.uint8]],
        instruction: str,
        proprio: Sequence[float] | NDArray[np.floating] | None,
    ) -> Sample:
        """One observation as a sample of the processor.

        Raises:
            ValueError: another number of images, an image that is not RGB bytes, proprioception that is missing, not
                expected, of another length or not finite, or a sentence that is no Unicode text.
        """
        try:
            # JSON can carry one (`"\ud800"`), and the tokenizer would fail at it with an error that names no field.
            instruction.encode()
        except UnicodeEncodeError:
            raise ValueError("the instruction has half of a surrogate pair, which is no character") from None
        if len(images) != self.num_images:
            raise ValueError(f"{len(images)} images were given; the policy reads {self.num_images}, primary first")
        for image in images:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise ValueError(f"an image must be (H, W, 3) uint8, found {list(image.shape)} {image.dtype}")
        if (proprio is not None) != self.use_proprio:
            raise ValueError(
                f"proprio was {'not ' if proprio is None else ''}given, the policy has use_proprio = {self.use_proprio}"
            )
        state = None
        if proprio is not None and self.units.proprio is not None:
            # float64, as the published deployment computes: see `VectorUnits.normalize`.
            values = np.asarray(proprio, np.float64)
            if values.shape != self.units.proprio.low.shape or not np.isfinite(values).all():
                expected = list(self.units.proprio.low.shape)
                raise ValueError(f"proprio has shape {list(values.shape)}, expected {expected} finite numbers")
            state = self.units.proprio.normalize(values)
            if not np.isfinite(state).all():
                raise ValueError("proprio has a value too large for the policy's float32")
        sample: Sample = self.processor.encode(instruction, [self._prepare(image) for image in images], state)
        return sample

    def batch(self, samples: Sequence[Sample], length: int | None = None) -> dict[str, torch.Tensor]:
        """Samples of `encode` -> the policy's input, token sequences padded on the right.

        Args:
            samples: at least one.
            length: of the padded sequences; none means the longest one's.

        Raises:
            ValueError: a sequence is longer than `length`.
        """
        batch: dict[str, torch.Tensor] = self.processor.collate(samples)
        missing = 0 if length is None else length - batch["input_ids"].shape[1]
        if missing < 0:
            raise ValueError(f"a sample has {batch['input_ids'].shape[1]} tokens, more than {length}")
        for name, value in (("input_ids", self.processor.pad), ("labels", IGNORED), ("attention_mask", False)):
            batch[name] = functional.pad(batch[name], (0, missing), value=value)
        return batch

    def _prepare(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if self.images == "openvla":
            return evaluation_image(image, self.image_size)
        # At the size the camera has: training augments before the processor resizes.
        return center_crop(image) if self.images == "crop" else image


class NotFiniteError(ArithmeticError):
    """A policy's actions are NaN or infinite."""


def finite(actions: NDArray[np.float32]) -> NDArray[np.float32]:
    """The actions; raises `NotFiniteError` where one of them is NaN or infinite."""
    broken = int((~np.isfinite(actions)).sum())
    if broken:
        raise NotFiniteError(
            f"{broken} of {actions.size} predicted values are not finite: weights or statistics of the checkpoint are "
            "damaged, or too large for its dtype"
        )
    return actions
