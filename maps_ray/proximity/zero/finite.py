"""No step on a loss or gradient norm that is not finite, decided where the numbers are, without asking the host.

DeepSpeed decides it on the host: it fetches the norm before the optimizer runs, which empties the device's queue in
every step. Here the decision is a tensor. torch's fused Adam takes it as `found_inf`, the protocol of gradient scalers,
and leaves weights and moments alone.

What this relies on in DeepSpeed 0.19: each ZeRO optimizer sets `_global_grad_norm` before it steps the client
optimizer, and asks `is_invalid_grad_norm` of its own module on the host whether to step at all.
"""

from __future__ import annotations

import deepspeed.runtime.bf16_optimizer
import deepspeed.runtime.zero.stage3
import deepspeed.runtime.zero.stage_1_and_2
import torch
from torch import Tensor

from maps_ray.proximity.zero.deepspeed_engine import Engine


class NotFinite(ArithmeticError):
    """A step that was not made because loss or gradient norm are not finite; raised in every process alike."""


class FiniteGuard:
    """Keeps the weights of one engine from the first step that is not finite on; later steps are not made either.

    Args:
        engine: what `deepspeed.initialize` returned.
        optimizer: the client optimizer that was given to it.
    """

    def __init__(self, engine: Engine, optimizer: torch.optim.Optimizer) -> None:
        self._engine = engine
        self.spoiled = torch.zeros((), device=engine.device)
        """float32 scalar on the device: 1 once a step was not finite. Equal in every process."""
        self.loss: Tensor = torch.zeros((), device=engine.device)
        """Of the step to be made, averaged over all processes; set it before `engine.step()`."""
        self.norm = torch.zeros((), device=engine.device)
        """Of the last step's gradients, before they were clipped."""
        for module in (
            deepspeed.runtime.bf16_optimizer,
            deepspeed.runtime.zero.stage3,
            deepspeed.runtime.zero.stage_1_and_2,
        ):
            # In each importing module: `from ... import` has given each of them a name of its own.
            module.is_invalid_grad_norm = _leave_it_to_the_guard
        optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        # Called for every group or sub-group of a step; all see the same loss and norm. The flag only ever rises: steps
        # queued behind a spoiled one, before the host has heard of it, must leave the weights alone too.
        # Under offload the norm may lie on the host.
        norm = self.norm = self._engine.optimizer._global_grad_norm.to(self.spoiled.device)
        sound = torch.isfinite(norm) & (norm >= 0)  # Of a norm that is not finite some helpers make -1.
        sound &= torch.isfinite(self.loss)
        self.spoiled.copy_(torch.maximum(self.spoiled, (~sound).to(self.spoiled)))
        if all(group.get("fused") for group in optimizer.param_groups):
            optimizer.found_inf = self.spoiled  # type: ignore[attr-defined]
        elif self.spoiled.item():
            # Plain Adam knows no `found_inf`: an exception alone keeps it from the step, for one wait for the device.
            raise NotFinite("the loss or the gradient norm of this step is not finite")


def _leave_it_to_the_guard(norm: object) -> bool:
    return False
