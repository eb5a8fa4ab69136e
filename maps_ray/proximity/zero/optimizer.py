"""The client optimizer that DeepSpeed steps on its fp32 master partitions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import ParamsT

from maps_ray.proximity.adam_spd import check_hyperparameters, check_options, plain_adam_step

if TYPE_CHECKING:
    from maps_ray.proximity.zero.binding import Binding


class ShardedAdamSPD(torch.optim.Adam):
    """`torch.optim.Adam` whose steps `bind` has tied to anchors and strengths.

    DeepSpeed calls `step` once for each parameter group (stages 1 and 2), once for each sub-group (stage 3) or once in
    all (BF16_Optimizer), with unscaled and clipped fp32 gradients. Each call holds whole sets of tensors, so one small
    all-reduce in each makes the projection exact. The state is Adam's own: `step`, `exp_avg`, `exp_avg_sq`; anchors
    are no part of it. With all strengths 0 the weights are those of `torch.optim.Adam` with the same `fused`, and with
    `weight_decay` those of `torch.optim.AdamW`, bit for bit.

    Args:
        params: the model's parameters or groups of them; a group may have its own `lr`, `betas` and `eps`.
        lr: learning rate.
        betas: decay of the first and the second moment, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled, as in AdamW; on every parameter.
        fused: as in `torch.optim.Adam`; several times faster, and differs from the plain operations in the last bit.
            None means fused where a step is projected and torch has it.

    Raises:
        ValueError: a hyperparameter out of range, or an option that the rule has no place for.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        weight_decay: float = 0.0,
        fused: bool | None = None,
    ) -> None:
        check_hyperparameters(lr, betas, eps)
        if not (math.isfinite(weight_decay) and weight_decay >= 0):
            raise ValueError(f"weight_decay = {weight_decay!r}: must be a finite number, at least 0")
        self.binding: Binding | None = None
        """What `bind` ties to the steps."""
        # `torch.optim.AdamW` is Adam with this `decoupled_weight_decay` (torch 2.13).
        super().__init__(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, decoupled_weight_decay=True, fused=fused
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; strengths and anchors are given to `bind`, by parameter name."""
        check_options(param_group, self.defaults, {"params", "param_names", "lr", "betas", "eps"})
        super().add_param_group(param_group)
        check_hyperparameters(*(self.param_groups[-1][key] for key in ("lr", "betas", "eps")))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Steps the master partitions now in `param_groups`.

        Raises:
            RuntimeError: `bind` was not called.
        """
        if closure is not None:
            raise ValueError("a closure cannot be evaluated again under ZeRO")
        if self.binding is None:
            raise RuntimeError("ShardedAdamSPD has no strengths yet: call bind(engine, optimizer, ...) before stepping")
        flats = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        self.binding.step(flats, lambda: plain_adam_step(self))
