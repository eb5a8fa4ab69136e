"""The method on whole tensors, in plain torch: the reference that every other form of it is measured against.

MAPS (arXiv 2511.19878) gives each tensor its strength; the rule itself is selective projection decay
(arXiv 2411.01713, algorithm 1). Norms and the inner product are accumulated in float64: a step moves a weight by a
hundred-thousandth of its distance, so the ratio lives in digits that a float32 sum does not have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Adam's state of one tensor (arXiv 1412.6980)."""

    first: Tensor
    second: Tensor
    step: int = 0


def adam_step(
    theta: Tensor, grad: Tensor, moments: Moments, lr: float, betas: tuple[float, float], eps: float
) -> Tensor:
    """theta - lr * m_hat / (sqrt(v_hat) + eps). Updates `moments` in place and returns a new tensor."""
    moments.step += 1
    # The operations of `torch.optim.adam._single_tensor_adam`, in its order: another order rounds otherwise.
    moments.first.lerp_(grad, 1 - betas[0])
    moments.second.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    step_size = lr / (1 - betas[0] ** moments.step)
    denominator = moments.second.sqrt().div_(math.sqrt(1 - betas[1] ** moments.step)).add_(eps)
    return torch.addcdiv(theta, moments.first, denominator, value=-step_size)


def project(tilde: Tensor, theta: Tensor, grad: Tensor, anchor: Tensor, strength: float) -> tuple[Tensor, float | None]:
    """Draws a step back toward the anchor where the gradient opposes the drift.

    Args:
        tilde: the weights after the plain Adam step.
        theta: the weights before it.
        grad: the gradient that made the step.
        anchor: the pretrained weights theta0 (zeros for an adapter). All four have one shape.
        strength: lambda; 0 projects nothing, 1 holds the radius, more pulls back.

    Returns:
        the weights after the step, and the ratio r in [0, 1], or None where c = -<grad, theta - theta0> is not
        negative and nothing is projected.
    """
    before, after = theta - anchor, tilde - anchor
    # Not "<= 0": a sum that is NaN projects nothing, as in `step.projection_pulls`.
    if not torch.sum(grad.double() * before.double()) > 0:
        return tilde, None
    ratio = projection_ratio(float(before.double().norm()), float(after.double().norm()))
    return tilde.sub(after, alpha=strength * ratio), ratio


def projection_ratio(before: float, after: float) -> float:
    """r = clamp((after - before) / after, 0, 1) of the distances from the anchor; 0 where `after` is 0."""
    return (after - before) / after if after > before else 0.0
