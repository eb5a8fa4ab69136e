import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from maps_ray.proximity.adam_spd import AdamSPD
from maps_ray.proximity.projection import Moments, adam_step, project

TRACES = Path(__file__).parents[1] / "fixtures" / "adamspd"
RELEASED = Path(__file__).parents[1] / "fixtures" / "maps_released" / "spd_released"


def replay(trace: str, folder: Path = TRACES, device: str = "cpu"):
    """Runs a trace of a published optimizer; yields (step, name, weights, weights of the trace)."""
    meta = json.loads((folder / f"{trace}.json").read_text())
    data = np.load(folder / f"{trace}.npz")
    dtype = getattr(torch, meta["dtype"].removeprefix("torch."))

    def read(key: str) -> torch.Tensor:
        return torch.tensor(data[key]).to(device, dtype)

    parameters, groups = {}, []
    for group in meta["groups"]:
        for name in group["names"]:
            parameters[name] = torch.nn.Parameter(read(f"{name}/start"))
        anchors = [read(f"{name}/anchor") for name in group["names"]] if group["pre"] else None
        params = [parameters[name] for name in group["names"]]
        groups.append({"params": params, "anchors": anchors, "strength": group["lambda"]})
    optimizer = AdamSPD(groups, lr=meta["lr"], betas=tuple(meta["betas"]), eps=meta["eps"])
    for step in range(len(data[f"{next(iter(parameters))}/grads"])):
        for name, parameter in parameters.items():
            absent = np.isnan(data[f"{name}/condition"][step])
            parameter.grad = None if absent else read(f"{name}/grads")[step].clone()
        optimizer.step()
        for name, parameter in parameters.items():
            yield step, name, parameter.detach(), read(f"{name}/weights")[step]
    for name, parameter in parameters.items():
        # What never gets a gradient has no state.
        assert int(optimizer.state[parameter].get("step", 0)) == int(data.get(f"{name}/final_step", 0))


@pytest.mark.parametrize("trace", ["main_f32", "lambda0"])
def test_traces_of_the_published_optimizer(trace):
    for step, name, weights, expected in replay(trace):
        assert torch.allclose(weights, expected, rtol=0, atol=3e-6), (step, name)


def test_a_trace_of_the_released_code():
    """Biases and heads at strength 0, tensors of a layer with norms and LayerScale, adapters held to their own start,
    one that never gets a gradient."""
    seen, away = set(), 0.0
    for _, name, weights, expected in replay("f32", RELEASED):
        seen.add(name)
        away = max(away, (weights - expected).abs().max().item())
    assert len(seen) == 13 and {"layers.3.q_proj.lora_A.default.weight", "unused.blocks.23.weight"} <= seen
    assert away < 2.5e-7


def test_bf16_trace_stays_near():
    # A bf16 weight moves in steps of 2^-9 of itself, and one rounding more or less shows: W2, held by a strength of
    # 10, swings around its anchor and doubles such a step several times.
    for step, name, weights, expected in replay("main_bf16"):
        assert torch.allclose(weights, expected, rtol=0, atol=0.05 if name == "W2" else 0.008), (step, name)


@pytest.mark.parametrize("name", json.loads((TRACES / "edge_cases.json").read_text()))
def test_edge_cases(name):
    case = json.loads((TRACES / "edge_cases.json").read_text())[name]
    parameter = torch.nn.Parameter(torch.tensor(case["theta"]))
    parameter.grad = torch.tensor(case["grad"])
    group = {"params": [parameter], "anchors": [torch.tensor(case["anchor"])], "strength": case["weight_decay"]}
    AdamSPD([group], lr=case["lr"]).step()
    # The published code divides 0 by 0 in one case; here the ratio is then 0 and the weights stay.
    expected = case["theta"] if np.isnan(case["after"]).any() else case["after"]
    assert parameter.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-37)


def steps(optimizer, parameters, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(300, 400), (7,), (), (1, 3, 5)]  # the first is longer than a block
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def anchored(parameters):
    return [parameter.detach() * 0.9 for parameter in parameters]


@pytest.mark.parametrize("fused", [None, False])
def test_equals_the_reference_up_to_rounding(fused):
    parameters = tensors()
    anchors = anchored(parameters)
    weights = [parameter.detach().clone() for parameter in parameters]
    moments = [Moments(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
    optimizer = AdamSPD([{"params": parameters, "anchors": anchors, "strength": 1.2}], lr=0.02, fused=fused)
    generator = torch.Generator().manual_seed(5)
    projected = 0
    for _ in range(20):
        for index, parameter in enumerate(parameters):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            tilde = adam_step(weights[index], parameter.grad, moments[index], 0.02, (0.9, 0.999), 1e-8)
            weights[index], ratio = project(tilde, weights[index], parameter.grad, anchors[index], 1.2)
            projected += bool(ratio)
        optimizer.step()
    assert projected > 10
    for parameter, weight in zip(parameters, weights, strict=True):
        assert torch.allclose(parameter, weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("groups", [lambda p: p, lambda p: [{"params": p, "anchors": anchored(p), "strength": 0.0}]])
def test_strength_zero_is_plain_adam_bit_for_bit(groups):
    ours, plain = tensors(), tensors()
    steps(AdamSPD(groups(ours), lr=0.01), ours, 20)
    steps(torch.optim.Adam(plain, lr=0.01), plain, 20)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_none_means_zero_anchors():
    ours, explicit = tensors(), tensors()
    steps(AdamSPD([{"params": ours, "anchors": None, "strength": 0.8}], lr=0.1), ours, 20)
    zeros = [torch.zeros_like(parameter) for parameter in explicit]
    steps(AdamSPD([{"params": explicit, "anchors": zeros, "strength": 0.8}], lr=0.1), explicit, 20)
    assert all(torch.equal(a, b) for a, b in zip(ours, explicit, strict=True))


def test_bf16_anchors_of_fp32_weights_equal_their_fp32_copies():
    ours, explicit = tensors(), tensors()
    rounded = [parameter.detach().bfloat16() for parameter in ours]
    steps(AdamSPD([{"params": ours, "anchors": rounded, "strength": 1.0}], lr=0.1), ours, 10)
    full = [anchor.float() for anchor in rounded]
    steps(AdamSPD([{"params": explicit, "anchors": full, "strength": 1.0}], lr=0.1), explicit, 10)
    assert all(torch.equal(a, b) for a, b in zip(ours, explicit, strict=True))


def test_weights_that_are_not_contiguous():
    whole, view = (torch.nn.Parameter(torch.randn(400, 300, generator=torch.Generator().manual_seed(3))) for _ in "ab")
    view.data = view.data.t().contiguous().t()
    for parameter in (whole, view):
        anchor = parameter.detach().clone().contiguous() * 0.9
        steps(AdamSPD([{"params": [parameter], "anchors": [anchor], "strength": 1.0}], lr=0.05), [parameter], 10)
    # The plain operations, which the second takes, round twice more at each step.
    assert torch.allclose(whole, view, rtol=0, atol=5e-6)


def test_state_dict_round_trip_continues_bit_for_bit():
    parameters = tensors()
    anchors = anchored(parameters)
    optimizer = AdamSPD([{"params": parameters, "anchors": anchors, "strength": 0.7}], lr=0.01)
    steps(optimizer, parameters, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    assert set(saved["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    assert "anchors" not in saved["param_groups"][0]
    again = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    restored = AdamSPD([{"params": again, "anchors": anchors, "strength": 0.7}], lr=0.5)
    restored.load_state_dict(saved)
    for trained, chosen in ((parameters, optimizer), (again, restored)):
        steps(chosen, trained, 10, seed=9)
    assert all(torch.equal(a, b) for a, b in zip(parameters, again, strict=True))


def test_a_copied_optimizer_keeps_its_anchors():
    parameters = tensors()
    optimizer = AdamSPD([{"params": parameters, "anchors": anchored(parameters), "strength": 0.7}], lr=0.05)
    copied = copy.deepcopy(optimizer)
    twins = copied.param_groups[0]["params"]
    steps(optimizer, parameters, 10)
    steps(copied, twins, 10)
    assert all(torch.equal(a, b) for a, b in zip(parameters, twins, strict=True))


def test_lr_schedulers_and_closures():
    parameters = tensors()
    optimizer = AdamSPD([{"params": parameters, "anchors": anchored(parameters), "strength": 0.7}], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)

    def closure():
        optimizer.zero_grad()
        loss = sum(parameter.square().sum() for parameter in parameters)
        loss.backward()
        return loss

    first = float(optimizer.step(closure).detach())
    scheduler.step()
    held = [parameter.detach().clone() for parameter in parameters]
    assert float(optimizer.step(closure).detach()) < first
    assert all(torch.equal(a, b) for a, b in zip(parameters, held, strict=True))


def test_step_hooks_run_once():
    parameters = tensors()
    torch.optim.Adam(tensors())  # torch hooks the class at its first instance
    optimizer = AdamSPD([{"params": parameters, "anchors": None, "strength": 1.0}])
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    steps(optimizer, parameters, 1)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"anchors": [torch.zeros(2, 3)], "strength": -0.1}, "strength of a group = -0.1"),
        ({"anchors": [torch.zeros(2, 3)], "strength": float("nan")}, "strength of a group = nan"),
        ({"anchors": [], "strength": 1.0}, "0 anchors for 1 parameters"),
        ({"anchors": [torch.zeros(3, 2)], "strength": 1.0}, r"anchor 0 has shape \(3, 2\), its parameter \(2, 3\)"),
        ({"strength": 1.0, "lr": -1.0}, "lr = -1.0"),
        ({"strength": 1.0, "betas": (0.9, 1.0)}, "betas"),
        ({"strength": 1.0, "eps": -1e-8}, "eps"),
        ({"weight_decay": 0.5}, "weight_decay = 0.5; it may have anchors, betas, eps, lr"),
        ({"lambda": 0.5}, "lambda = 0.5"),
    ],
)
def test_groups_out_of_range_are_refused(group, message):
    with pytest.raises(ValueError, match=message):
        AdamSPD([{"params": [torch.nn.Parameter(torch.zeros(2, 3))], **group}])


@pytest.mark.parametrize("option", [{"lr": -1.0}, {"betas": (-0.1, 0.9)}, {"eps": float("inf")}])
def test_options_out_of_range_are_refused(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        AdamSPD([torch.nn.Parameter(torch.zeros(2))], **option)


def test_an_anchor_that_would_move_with_its_parameter_is_refused():
    parameter = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="clone it"):
        AdamSPD([{"params": [parameter], "anchors": [parameter.detach()], "strength": 1.0}])


def test_complex_parameters_are_refused():
    with pytest.raises(ValueError, match="complex64"):
        AdamSPD([{"params": [torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))], "strength": 1.0}])
