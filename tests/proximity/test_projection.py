import math

import pytest
import torch

from maps_ray.proximity.projection import Moments, adam_step, project, projection_ratio


def test_adam_step_equals_torch():
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(7, 5))
    optimizer = torch.optim.Adam([parameter], lr=0.01, betas=(0.8, 0.95), eps=1e-6)
    theta = parameter.detach().clone()
    moments = Moments(torch.zeros_like(theta), torch.zeros_like(theta))
    for _ in range(10):
        parameter.grad = torch.randn(7, 5)
        optimizer.step()
        theta = adam_step(theta, parameter.grad, moments, 0.01, (0.8, 0.95), 1e-6)
    assert torch.equal(theta, parameter)


def test_strength_one_holds_the_radius():
    anchor, theta = torch.zeros(3), torch.tensor([3.0, 4.0, 0.0])
    tilde, grad = torch.tensor([6.0, 8.0, 0.0]), torch.tensor([1.0, 1.0, 0.0])
    held, ratio = project(tilde, theta, grad, anchor, 1.0)
    assert ratio == 0.5
    assert float(held.norm()) == pytest.approx(5.0)
    slowed, _ = project(tilde, theta, grad, anchor, 0.5)
    assert float(slowed.norm()) == pytest.approx(7.5)
    pulled, _ = project(tilde, theta, grad, anchor, 1.5)
    assert float(pulled.norm()) == pytest.approx(2.5)


@pytest.mark.parametrize("grad", [[-1.0, -1.0], [4.0, -3.0], [0.0, 0.0], [math.nan, 1.0]])
def test_a_gradient_that_does_not_oppose_the_drift_projects_nothing(grad):
    tilde = torch.tensor([6.0, 8.0])
    after, ratio = project(tilde, torch.tensor([3.0, 4.0]), torch.tensor(grad), torch.zeros(2), 1.0)
    assert ratio is None
    assert torch.equal(after, tilde)


def test_nothing_is_projected_at_the_anchor():
    anchor = torch.randn(5)
    assert project(anchor + 1, anchor, torch.randn(5), anchor, 1.0)[1] is None


def test_a_step_onto_the_anchor_gives_ratio_zero():
    anchor = torch.ones(2)
    after, ratio = project(anchor.clone(), torch.tensor([2.0, 2.0]), torch.ones(2), anchor, 3.0)
    assert ratio == 0
    assert torch.equal(after, anchor)


@pytest.mark.parametrize(("before", "after", "ratio"), [(1, 2, 0.5), (2, 1, 0), (0, 0, 0), (0, 1, 1), (1, math.nan, 0)])
def test_ratio_stays_between_zero_and_one(before, after, ratio):
    assert projection_ratio(before, after) == ratio
