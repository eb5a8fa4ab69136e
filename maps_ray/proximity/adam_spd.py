"""Adam with selective projection decay, on whole tensors in one process."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from maps_ray.proximity.blocks import Rule, Segment
from maps_ray.proximity.flat_step import fused_is_there, make_step
from maps_ray.proximity.step import Hyperparameters, ProjectedStep, StepInputs, projection_pulls

_Kind = tuple[torch.device, torch.dtype, bool]
"""What parameters must share to be stepped together: device, dtype, and whether torch's fused Adam steps them."""


def plain_adam_step(optimizer: torch.optim.Adam) -> None:
    """`torch.optim.Adam.step` from within a subclass's step, without running the step hooks a second time."""
    step: Callable[..., object] = torch.optim.Adam.step
    # torch wraps the step of a class in its hooks when the first instance of that very class is made.
    if getattr(step, "hooked", False):
        step = step.__wrapped__  # type: ignore[attr-defined]
    step(optimizer)


def adam_state(state: dict[str, Tensor], parameter: Tensor, fused: bool) -> dict[str, Tensor]:
    """`torch.optim.Adam`'s state of a parameter, made where there is none yet.

    The fused step wants its number on the parameter's device, the other one on the host.
    """
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    # Moments that were loaded may have other strides, and `_fuses` looks at parameter and gradient alone.
    for key in ("exp_avg", "exp_avg_sq"):
        if parameter.is_contiguous() and not state[key].is_contiguous():
            state[key] = state[key].contiguous()
    if fused and state["step"].device != parameter.device:
        state["step"] = state["step"].to(parameter.device)
    return state


def _fuses(parameter: Tensor, grad: Tensor, wanted: bool | None) -> bool:
    # torch's fused step runs along the memory, whatever the strides say. In half precision the published optimizer
    # rounds after each operation, as the plain step does.
    exact = parameter.dtype in (torch.float32, torch.float64)
    alike = parameter.is_contiguous() and grad.is_contiguous()
    return fused_is_there([parameter]) and alike and (exact if wanted is None else wanted)


def check_hyperparameters(lr: float | Tensor, betas: tuple[float, float], eps: float) -> None:
    """Raises ValueError where `torch.optim.Adam` would run on with nonsense."""
    if not (math.isfinite(lr) and lr >= 0):
        raise ValueError(f"lr = {lr!r}: must be a finite number, at least 0")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas = {betas!r}: must be two numbers in [0, 1)")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps = {eps!r}: must be a finite number, at least 0")


def check_options(group: Mapping[str, object], defaults: Mapping[str, object], allowed: set[str]) -> None:
    """Raises ValueError for an option of Adam that the rule has no place for, such as `weight_decay`."""
    for key in sorted(group.keys() - allowed):
        if key not in defaults or group[key] != defaults[key]:
            raise ValueError(f"a group has {key} = {group[key]!r}; it may have {', '.join(sorted(allowed))}")


def check_strength(strength: float, where: str) -> None:
    """Raises ValueError for a strength that is negative or no number."""
    if not (math.isfinite(strength) and strength >= 0):
        raise ValueError(f"strength of {where} = {strength!r}: must be a finite number, at least 0")


class AdamSPD(torch.optim.Adam):
    """Adam whose steps are projected toward an anchor, tensor by tensor (MAPS, arXiv 2511.19878).

    A group is `{"params": [...], "anchors": [...] or None, "strength": 0.5}`, with `lr`, `betas` and `eps` of its own
    if wanted. `anchors` are the pretrained weights, one for each parameter, kept by reference; none means zero
    anchors, as for LoRA. A group without `strength`, or with strength 0, is plain Adam, bit for bit. Parameters
    without a gradient are skipped. Anchors are no part of `state_dict`: give them again before `load_state_dict`.

    Args:
        params: groups, or parameters alone (strength 0).
        lr: learning rate.
        betas: decay of the first and the second moment, each in [0, 1).
        eps: added to the root of the second moment.
        fused: as in `torch.optim.Adam`.

    Raises:
        ValueError: a hyperparameter or strength out of range, a wrong number of anchors, an anchor of another shape
            or one that shares its parameter's memory, a parameter that is not real floating point, or an option of
            Adam that this rule has no place for, such as `weight_decay`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        fused: bool | None = None,
    ) -> None:
        check_hyperparameters(lr, betas, eps)
        self._anchors: dict[Tensor, Tensor | None] = {}
        self._flats: dict[_Kind, tuple[object, ProjectedStep]] = {}
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=fused)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; see the class."""
        group = dict(param_group)
        anchors = group.pop("anchors", None)
        group.setdefault("strength", 0.0)
        check_options(group, self.defaults, {"params", "param_names", "anchors", "strength", "lr", "betas", "eps"})
        super().add_param_group(group)
        try:
            self._check_group(self.param_groups[-1], anchors)
        except ValueError:
            # The caller may catch it and go on: a group that is refused must not be stepped.
            self.param_groups.pop()
            raise
        params = self.param_groups[-1]["params"]
        self._anchors.update(zip(params, anchors or [None] * len(params), strict=True))

    @staticmethod
    def _check_group(group: dict[str, Any], anchors: list[Tensor] | None) -> None:
        check_hyperparameters(group["lr"], group["betas"], group["eps"])
        check_strength(group["strength"], "a group")
        params = group["params"]
        for index, param in enumerate(params):
            if not param.is_floating_point():
                raise ValueError(f"parameter {index} of the group is {param.dtype}; real floating point is needed")
        if anchors is None:
            return
        if len(anchors) != len(params):
            raise ValueError(f"{len(anchors)} anchors for {len(params)} parameters: give one for each, or None")
        for index, (param, anchor) in enumerate(zip(params, anchors, strict=True)):
            if anchor.shape != param.shape:
                shapes = f"{tuple(anchor.shape)}, its parameter {tuple(param.shape)}"
                raise ValueError(f"anchor {index} has shape {shapes}")
            if anchor.data_ptr() == param.data_ptr() and param.numel():
                raise ValueError(f"anchor {index} shares its parameter's memory and would move with it: clone it")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Makes one step; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        held = [group for group in groups if group["strength"] > 0]
        # Groups without a strength are torch's own to step.
        self.param_groups = [group for group in groups if group["strength"] == 0]
        try:
            if self.param_groups:
                plain_adam_step(self)
        finally:
            self.param_groups = groups
        self._step_held([(p, number) for number, group in enumerate(held) for p in group["params"]], held)
        return loss

    def _step_held(self, candidates: list[tuple[Tensor, int]], groups: list[dict[str, Any]]) -> None:
        by_kind: dict[_Kind, list[tuple[Tensor, int]]] = {}
        for parameter, number in candidates:
            if parameter.grad is not None:
                fused = _fuses(parameter, parameter.grad, groups[number]["fused"])
                by_kind.setdefault((parameter.device, parameter.dtype, fused), []).append((parameter, number))
        for kind, members in by_kind.items():
            parameters = [parameter for parameter, _ in members]
            fused = kind[2]
            rules = [Rule(groups[number]["strength"]) for _, number in members]
            key = (tuple(map(id, parameters)), tuple(rules))
            # Parameters without a gradient are left out, so who steps together may change from step to step.
            if self._flats.get(kind, (None,))[0] != key:
                segments = [
                    [Segment(column, 0, parameter.numel(), rule)]
                    for column, (parameter, rule) in enumerate(zip(parameters, rules, strict=True))
                ]
                anchors = [self._anchor(parameter) for parameter in parameters]
                numbers = [number for _, number in members]
                made = make_step(parameters, segments, anchors, numbers, len(parameters), fused)
                self._flats[kind] = (key, made)
            flat = self._flats[kind][1]
            states = [adam_state(self.state[parameter], parameter, fused) for parameter in parameters]
            of_group = [Hyperparameters.of(group) for group in groups]
            grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
            sums = flat.advance(StepInputs(parameters, grads, states, [of_group[number] for _, number in members]))
            strengths = torch.tensor([rule.strength for rule in rules], dtype=torch.float64, device=kind[0])
            flat.pull(parameters, projection_pulls(sums, strengths)[1])

    def _anchor(self, param: Tensor) -> Tensor | None:
        if param not in self._anchors:
            raise RuntimeError("a group's parameters were replaced; under ZeRO use proximity.zero.ShardedAdamSPD")
        return self._anchors[param]

    def __getstate__(self) -> dict[str, object]:
        # torch names the three fields that it keeps; a copy without anchors could not step. Blocks point into the
        # original's memory, and are made anew.
        return {**super().__getstate__(), "_anchors": self._anchors, "_flats": {}}
