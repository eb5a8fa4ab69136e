"""What policies of all backbones share: anchors, idle parameters, checks of inputs, actions in a robot's units."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from maps_ray.models.checkpoint_faults import Shape
from maps_ray.models.collate import Sample
from maps_ray.models.contracts import Processor
from maps_ray.models.decoder import Attention
from maps_ray.models.files.weights import BaseTensors, base_state, stand_in
from maps_ray.models.lora import base_name
from maps_ray.models.predict import Codec, finite
from maps_ray.models.sizes import BaseConfig
from maps_ray.models.vision_tower import VisionTower
from maps_ray.proximity.stack import StackLayer

Made = TypeVar("Made", bound="BasePolicy")


def with_random_weights(make: Callable[[], Made], dtype: torch.dtype, seed: int) -> Made:
    """A policy that `make` builds from the generator of `seed`; the global generator is left as it was."""
    # The weights are made on the CPU. Without `devices` torch would first initialise every GPU to keep its generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = make()
    policy.fresh_modules = tuple(dict.fromkeys(layer.modules[0] for layer in policy.stack()))
    return policy.to(dtype)


def assemble(
    make: Callable[[], Made],
    folder: Path,
    raw: Mapping[str, Any],
    base: BaseTensors,
    pretrained: Mapping[str, Shape],
    parameter_name: Callable[[str], str],
    modules: tuple[dict[str, Tensor], list[str]],
    dtype: torch.dtype,
    deferred: bool,
) -> Made:
    """A policy with the weights of a checkpoint.

    Args:
        make: builds it; called where tensors take no memory.
        folder: the checkpoint.
        raw: contents of its `config.json`.
        base: its pretrained tensors.
        pretrained: their keys and shapes.
        parameter_name: key -> name of the parameter.
        modules: the other weights under the policy's names, and the modules that have random ones, as `module_state`
            returns them.
        dtype: of the parameters.
        deferred: leave the pretrained weights in their file, see `BasePolicy.deferred`.

    Raises:
        CheckpointError: a weight is NaN or infinite.
    """
    state, fresh = modules
    names = {key: parameter_name(key) for key in pretrained}
    if deferred:
        state |= {names[key]: stand_in(shape, dtype) for key, shape in pretrained.items()}
    else:
        state |= base_state(str(folder), base, names, dtype)
    with torch.device("meta"):
        policy = make()
    # What `make` built on `meta` has no memory to copy into. Strict, so that no parameter is left there.
    policy.load_state_dict(state, assign=True)
    policy.fresh_modules, policy.deferred = tuple(fresh), frozenset(names.values() if deferred else ())
    policy.folder, policy.trained_for = folder, raw.get("policy") or {}
    return policy


class BasePolicy(nn.Module):
    """A module with an ordered stack, the anchors of its parameters, and `predict`: a `contracts.Policy`."""

    config: Any
    """Sizes: the backbone's `PolicyConfig`."""
    folder: Path | None = None
    """The checkpoint that the policy was loaded from; None for random weights."""
    trained_for: Mapping[str, Any] = MappingProxyType({})
    """`policy` of its `config.json`."""
    runs_on: torch.device | None = None
    """Where inputs go, for a policy on several devices; none means where its weights are."""
    codec: Codec | None = None
    """Read from the folder when it is first needed; set it for another data set or normalisation."""

    def __init__(self, config: BaseConfig, attention: Attention, base: BaseTensors | None) -> None:
        """Sets what is no network.

        Args:
            config: sizes.
            attention: of the language model: `sdpa`, or `eager` to look at attention weights.
            base: the checkpoint that the policy starts from, for `read_anchor`.

        Raises:
            ValueError: another attention.
        """
        super().__init__()
        if attention not in get_args(Attention):
            raise ValueError(f"attention = {attention!r}: must be {' or '.join(map(repr, get_args(Attention)))}")
        self.config = config
        self.attention: Attention = attention
        self.fresh_modules: tuple[str, ...] = ()
        """Modules that the checkpoint did not bring, with random weights."""
        self.deferred: frozenset[str] = frozenset()
        """Parameters that are still to be filled from `read_anchor`: until then they are NaN and take no memory."""
        self._base = base

    def stack(self) -> list[StackLayer]:
        """The ordered layers for a MAPS schedule; they cover every parameter exactly once."""
        raise NotImplementedError

    def read_processor(self, folder: Path) -> Processor:
        """The processor that makes this policy's input, of a checkpoint folder.

        Raises:
            CheckpointError: a file is missing or malformed.
        """
        raise NotImplementedError

    def idle_modules(self) -> list[str]:
        """Modules whose parameters no loss of this policy depends on."""
        return [
            f"{name}.{part}"
            for name, module in self.named_modules()
            if isinstance(module, VisionTower)
            for part in module.idle_modules()
        ]

    def idle_parameters(self) -> frozenset[str]:
        """Parameters that can get no gradient, adapters among them: training leaves them as they are."""
        return frozenset(
            f"{module}.{name}"
            for module in self.idle_modules()
            for name, _ in self.get_submodule(module).named_parameters()
        )

    @staticmethod
    def checkpoint_key(name: str) -> str:
        """Name of a parameter -> its key in a checkpoint."""
        raise NotImplementedError

    @classmethod
    def published_name(cls, name: str) -> str:
        """Name of a parameter or adapter -> its name in the published Hugging Face layout."""
        return cls.checkpoint_key(name)

    def read_anchor(self, name: str) -> Tensor | None:
        """The pretrained weights of one parameter, in the checkpoint's dtype.

        Args:
            name: parameter name in this policy.

        Returns:
            The weights, possibly a view of the memory-mapped file (copy it before writing), or None for a parameter
            without pretrained weights: a new module's, or an adapter's, whose anchor is zero.
        """
        key = self.checkpoint_key(base_name(name))
        return self._base.read(key) if self._base is not None and key in self._base else None

    def close_base(self) -> None:
        """Takes what `read_anchor` has mapped out of memory; it can still be called."""
        if self._base is not None:
            self._base.give_back()

    def check_pixels(self, pixel_values: Tensor) -> None:
        """Raises `ValueError` unless these are (B, 6 * images, H, W) of the policy's images."""
        size, images = self.config.image_size, self.config.num_images
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (6 * images, size, size):
            raise ValueError(
                f"pixel_values have shape {list(pixel_values.shape)}, expected [B, {6 * images}, {size}, {size}] for "
                f"{images} image(s)"
            )

    def chunk_shape(self, batch: int, actions: Tensor | None) -> tuple[int, int, int]:
        """(B, chunk, action_dim); raises `ValueError` where the actions have another shape."""
        expected = (batch, self.config.chunk, self.config.action_dim)
        if actions is not None and tuple(actions.shape) != expected:
            raise ValueError(f"actions have shape {list(actions.shape)}, expected {list(expected)}")
        return expected

    def predict(
        self,
        images: Sequence[NDArray[np.uint8]],
        instruction: str,
        proprio: Sequence[float] | NDArray[np.floating] | None = None,
    ) -> NDArray[np.float32]:
        """Actions for one observation; the policy is run in evaluation mode and left in the mode it was in.

        Args:
            images: RGB (H, W, 3) uint8 of any size, upright as in the training data, primary camera first.
            instruction: the task's sentence.
            proprio: (proprio_dim,) in recorded units, where the policy reads it.

        Returns:
            (chunk, action_dim) in the units of the training data. A gripper dimension that was not normalised stays as
            the policy predicts it.

        Raises:
            CheckpointError: the folder has no statistics, or several and none was chosen.
            ValueError: an observation that does not fit, see `Codec.encode`.
            NotFiniteError: the policy predicts NaN or infinities, which no robot must get.
        """
        return finite(self.predict_batch([self.ready_codec().encode(images, instruction, proprio)])[0])

    def predict_batch(
        self, samples: Sequence[Sample], *, length: int | None = None, seeds: Sequence[int] | None = None
    ) -> NDArray[np.float32]:
        """Actions for several observations, in one forward pass; else as `predict`.

        Args:
            samples: of `ready_codec().encode`.
            length: of the padded token sequences, see `Codec.batch`.
            seeds: one for each sample, of the noise that a diffusion head denoises; none draws it from torch's own
                generator. Other heads draw nothing.

        Returns:
            (samples, chunk, action_dim) in the units of the training data. Unlike `predict` it hands on what is not
            finite, for the caller to say which observation gave it.

        Raises:
            CheckpointError: as `predict`.
        """
        codec = self.ready_codec()
        batch = codec.batch(samples, length)
        if seeds is not None and getattr(self.config, "head", None) == "diffusion":
            shape = (self.config.chunk, self.config.action_dim)
            # On the CPU, and for each sample: the noise does not depend on the device or on who else is in the batch.
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            batch["noise"] = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        device, training = self.runs_on or next(self.parameters()).device, self.training
        self.eval()
        try:
            with torch.no_grad():
                actions = self(**{name: tensor.to(device) for name, tensor in batch.items()}).actions
        finally:
            self.train(training)
        # fp32 first: numpy has no bfloat16.
        return codec.units.action.unnormalize(actions.float().cpu().numpy())

    def ready_codec(self) -> Codec:
        """The policy's codec, read from its folder when there is none yet.

        Raises:
            CheckpointError: the folder has no statistics, or several and none was chosen.
        """
        if self.codec is None:
            self.codec = Codec.read(self)
        return self.codec
