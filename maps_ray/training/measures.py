"""What a step takes: times, memory, tokens and operations, measured without holding the device up."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from maps_ray import metrics
from maps_ray.devices import device_titled
from maps_ray.spec import TrainingSpec


class Late:
    """A few numbers on their way to the host; who reads them later does not wait for what the device got after them."""

    def __init__(self, values: Tensor) -> None:
        """
        Args:
            values: one dimension, any device.
        """
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            # Cheap in each step: torch keeps pinned memory that is free for the next who asks (its caching host
            # allocator).
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            # A copy: the guard's tensors are written again by the next step.
            self._host = values.clone()

    def read(self) -> list[float]:
        """The numbers, after waiting for the device to have computed them."""
        if self._event is not None:
            self._event.synchronize()
        return list(self._host.tolist())


class Laps:
    """Seconds of the parts of one step: on a GPU from events in its queue, which nothing waits for before `seconds`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, torch.cuda.Event | float]] = [("", self._now())]

    def lap(self, part: str) -> None:
        """What ran since the lap before belongs to `part`."""
        self._marks.append((part, self._now()))

    def seconds(self) -> dict[str, float]:
        """Part -> seconds, those of several laps added up. On a GPU the step must have ended."""
        sums: dict[str, float] = defaultdict(float)
        for (_, begin), (part, end) in zip(self._marks, self._marks[1:], strict=False):
            sums[part] += _between(begin, end)
        return dict(sums)

    def _now(self) -> torch.cuda.Event | float:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(begin: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    """Seconds; both of one kind."""
    if isinstance(begin, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return begin.elapsed_time(end) / 1000
    assert not isinstance(end, torch.cuda.Event)
    return end - begin


@dataclass(frozen=True)
class Reading:
    """What one step gave, before it is read."""

    step: int
    rate: float
    """Learning rate."""
    values: Late
    """Loss over all workers, gradient norm, and whether this step or one before it was not finite."""
    laps: Laps
    seconds: float
    tokens: int
    """Of this worker, as `flops`."""
    flops: float

    def costs(self, device: torch.device, world_size: int, peak: float | None) -> dict[str, float]:
        """Times of the parts of the step, memory, tokens, and utilisation where the device's peak is known."""
        values = {metrics.part_seconds(part): seconds for part, seconds in self.laps.seconds().items()}
        values[metrics.PEAK_MEMORY_GIB] = peak_memory_gib(device)
        # From this worker's share: the others' are as long, but for padding.
        values[metrics.TOKENS_PER_SECOND] = self.tokens * world_size / self.seconds
        if peak:
            values[metrics.MODEL_FLOPS_UTILISATION] = self.flops / self.seconds / peak
        return values


class Work:
    """Tokens and operations of the forward passes made inside it, from shapes alone.

        with work:
            loss = model(**inputs).loss

    Operations are those of linear and convolution layers, forward and backward, a multiply-add as two; what gets no
    gradient counts none, what activation checkpointing computes again does not count. Attention's own products are left
    out: a few percent at the lengths of these policies. They are counted in the first pass, and from then on taken to
    grow with the tokens.
    """

    def __init__(self, model: nn.Module, is_language: Callable[[str], bool]) -> None:
        """
        Args:
            model: the policy, sharded or not.
            is_language: whether a parameter of this name belongs to the language model, whose positions are the tokens.
        """
        self.tokens = 0
        """Positions of the language model's first linear layer since `take`."""
        self._counting = False
        self._pass_tokens = 0
        self._pass_flops = 0.0
        self._per_token: float | None = None
        self._handles: list[RemovableHandle] = []
        first = None
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                self._handles.append(module.register_forward_hook(self._count))
                if first is None and isinstance(module, nn.Linear) and is_language(f"{name}.weight"):
                    first = module
        if first is not None:
            # Not among the handles: tokens are counted in every pass, operations in the first alone.
            first.register_forward_hook(self._count_tokens)

    def __enter__(self) -> None:
        self._counting = True

    def __exit__(self, *_: object) -> None:
        self._counting = False
        for handle in self._handles:
            handle.remove()
        if self._handles and self._pass_tokens:
            self._per_token = self._pass_flops / self._pass_tokens
        self._handles = []
        self.tokens += self._pass_tokens
        self._pass_tokens = 0

    def take(self) -> tuple[int, float]:
        """Tokens and operations since the last call."""
        tokens, self.tokens = self.tokens, 0
        return tokens, tokens * (self._per_token or 0.0)

    def _count_tokens(self, module: nn.Module, inputs: tuple[object, ...], output: Tensor) -> None:
        if self._counting and isinstance(module, nn.Linear):
            self._pass_tokens += output.numel() // module.out_features

    def _count(self, module: nn.Module, inputs: tuple[object, ...], output: Tensor) -> None:
        if not self._counting:
            return
        if isinstance(module, nn.Linear):
            products = output.numel() * module.in_features
        else:
            assert isinstance(module, nn.Conv2d)
            area = module.kernel_size[0] * module.kernel_size[1]
            products = output.numel() * area * module.in_channels // module.groups
        # Backward is a product as large for the gradient of the weights, and one for that of the inputs (Kaplan et al.
        # 2020, arXiv 2001.08361, 2.1: 2 N forward, 4 N backward).
        trained = module.weight is not None and module.weight.requires_grad
        passed_on = bool(inputs) and isinstance(inputs[0], Tensor) and inputs[0].requires_grad
        self._pass_flops += 2.0 * products * (1 + trained + passed_on)


def peak_flops(device: torch.device, training: TrainingSpec) -> float | None:
    """Most operations a second of this device in the precision of training; None where it is not known."""
    if device.type != "cuda":
        return None
    known = device_titled(torch.cuda.get_device_name(device))
    return None if known is None else known.peak_flops(training.precision)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this process had on the device so far; on a CPU of the process as a whole."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Linux counts it in KiB, where macOS counts bytes (getrusage(2)).
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
