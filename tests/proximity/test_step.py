"""The projected step on flat memory beside the rule on whole tensors, and what it costs in operations."""

import importlib.util
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from maps_ray.proximity import blocks, cpu_step
from maps_ray.proximity.adam_spd import AdamSPD
from maps_ray.proximity.blocks import Limits, Rule, Segment
from maps_ray.proximity.cpu_step import CpuStep
from maps_ray.proximity.flat_step import FlatStep
from maps_ray.proximity.projection import Moments, adam_step, project
from maps_ray.proximity.step import Hyperparameters, StepInputs, projection_pulls


class Operations(TorchDispatchMode):
    """Counts what torch dispatches."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def operations(count, numel, fused=None, anchor_dtype=torch.float32):
    generator = torch.Generator().manual_seed(count)
    parameters = [torch.nn.Parameter(torch.randn(numel, generator=generator)) for _ in range(count)]
    anchors = [(parameter.detach() - 0.1).to(anchor_dtype) for parameter in parameters]
    optimizer = AdamSPD([{"params": parameters, "anchors": anchors, "strength": 1.0}], lr=1e-3, fused=fused)
    for step in range(3):
        for index, (parameter, anchor) in enumerate(zip(parameters, anchors, strict=True)):
            # Every second gradient opposes the drift.
            parameter.grad = (parameter.detach() - anchor) * (-1) ** index
        if step == 2:
            with Operations() as found:
                optimizer.step()
        else:
            optimizer.step()
    return found.counts


@pytest.mark.parametrize(("few", "many"), [((10, 64), (1000, 64)), ((10, 1_000_000), (1000, 10_000))])
def test_a_thousand_tensors_cost_no_more_operations_than_ten(few, many):
    ten, thousand = operations(*few), operations(*many)
    assert sum(thousand.values()) <= sum(ten.values())
    # Reading a number would make an accelerator drain its queue.
    assert thousand["aten._local_scalar_dense.default"] == ten["aten._local_scalar_dense.default"] == 0


STRENGTHS = [1.0, 0.0, 0.5, 1.7]
LR, BETAS, EPS = 0.02, (0.9, 0.999), 1e-8


def plain(parameters, segments, anchors, groups, tensors, fused):
    return FlatStep(parameters, segments, anchors, groups, tensors, fused)


def compiled(parameters, segments, anchors, groups, tensors, fused):
    return CpuStep(parameters, segments, anchors, tensors)


def flat_run(lengths, rules, anchor_dtype, fused, padding=5, steps=8, make=plain):
    """A flat with padding between its tensors, beside the same tensors alone; returns both ends."""
    generator = torch.Generator().manual_seed(len(lengths))
    begins, numel = [], padding
    for length in lengths:
        begins.append(numel)
        numel += length + padding
    flat = torch.randn(numel, generator=generator)
    anchor = None if anchor_dtype is None else (flat + 0.3 * torch.randn(numel, generator=generator)).to(anchor_dtype)
    state = {"step": torch.zeros(()), "exp_avg": torch.zeros(numel), "exp_avg_sq": torch.zeros(numel)}
    segments = [Segment(i, b, n, rule) for i, (b, n, rule) in enumerate(zip(begins, lengths, rules, strict=True))]
    plan = make([flat], [segments], [anchor], [0], len(lengths), fused)
    whole = [flat[b : b + n].clone() for b, n in zip(begins, lengths, strict=True)]
    moments = [Moments(torch.zeros(n), torch.zeros(n)) for n in lengths]
    numbers = Hyperparameters(LR, BETAS, EPS, 0.1)
    projected = 0
    strengths = torch.tensor([rule.strength for rule in rules], dtype=torch.float64)
    for step in range(1, steps + 1):
        grad = torch.randn(numel, generator=generator)
        pulls = projection_pulls(plan.advance(StepInputs([flat], [grad], [state], [numbers], step)), strengths)
        plan.pull([flat], pulls[1])
        projected += int((pulls[0] >= 0).sum())
        for index, (begin, length, rule) in enumerate(zip(begins, lengths, rules, strict=True)):
            if step <= rule.begins:
                continue
            theta, part = whole[index], grad[begin : begin + length]
            start = torch.zeros(length) if anchor is None else anchor[begin : begin + length].float()
            lr = LR * rule.rate
            decayed = (theta - lr * rule.l2_sp * (theta - start)) * (1 - lr * 0.1)
            tilde = adam_step(decayed, part, moments[index], lr, BETAS, EPS)
            whole[index], _ = project(tilde, theta, part, start, rule.strength)
    return [flat[b : b + n] for b, n in zip(begins, lengths, strict=True)], whole, projected


@pytest.mark.parametrize(("make", "fused"), [(plain, True), (plain, False), (compiled, True)])
@pytest.mark.parametrize("anchor_dtype", [torch.float32, torch.bfloat16, None])
def test_a_flat_equals_the_rule_on_whole_tensors(monkeypatch, anchor_dtype, make, fused):
    monkeypatch.setattr(cpu_step, "_BLOCK", 700)
    monkeypatch.setattr(Limits, "of", classmethod(lambda cls, device: cls(block=700, small=300, shared=1000)))
    lengths = [2000, 3, 250, 299, 1, 300, 701, 40, 40, 40, 900, 17, 64]
    rules = [Rule(STRENGTHS[index % 4], (1.0, 0.3)[index % 5 == 3]) for index in range(len(lengths))]
    rules[-1] = Rule(0.8, begins=3)
    rules[-2] = Rule(0.0, l2_sp=0.4)
    ours, theirs, projected = flat_run(lengths, rules, anchor_dtype, fused, make=make)
    assert projected > 20
    for mine, whole in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, whole, rtol=2e-6, atol=2e-7)


def test_threads_change_no_bit(monkeypatch):
    monkeypatch.setattr(cpu_step, "_BLOCK", 1000)
    monkeypatch.setattr(cpu_step, "_TASK", 5000)
    lengths, rules = [20_000, 3, 30_000, 1, 7_777], [Rule(1.0), Rule(0.5), Rule(1.3), Rule(0.8), Rule(0.0)]
    before = torch.get_num_threads()
    ends = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            ends.append(torch.cat(flat_run(lengths, rules, torch.bfloat16, True, make=compiled)[0]))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(*ends)


@pytest.mark.parametrize("make", [plain, compiled])
def test_a_step_that_is_skipped_leaves_everything_as_it_is(make):
    flat, grad = torch.randn(3000), torch.full((3000,), torch.nan)
    before = flat.clone()
    state = {"step": torch.tensor(4.0), "exp_avg": torch.ones(3000), "exp_avg_sq": torch.ones(3000)}
    plan = make([flat], [[Segment(0, 0, 3000, Rule(1.0, l2_sp=0.1))]], [before * 0.9], [0], 1, True)
    sums = plan.advance(
        StepInputs([flat], [grad], [state], [Hyperparameters(0.1, BETAS, EPS, 0.1)], skip=torch.tensor(1.0))
    )
    assert not sums[0] > 0
    assert torch.equal(flat, before)
    assert state["step"] == 4
    assert torch.equal(state["exp_avg"], torch.ones(3000))
    assert torch.equal(state["exp_avg_sq"], torch.ones(3000))


def test_blocks_without_a_bound_add_every_tensor_up_by_segments(monkeypatch):
    # What an accelerator without Triton runs.
    monkeypatch.setattr(Limits, "of", classmethod(lambda cls, device: cls(block=1 << 20, small=None, shared=1 << 20)))
    lengths = [2000, 3, 250, 90_000]
    ours, theirs, _ = flat_run(lengths, [Rule(strength) for strength in STRENGTHS], torch.bfloat16, True)
    for mine, whole in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, whole, rtol=2e-6, atol=2e-7)


def test_parts_cover_a_parameter_in_order():
    rules = [Rule(1.0), Rule(0.0), Rule(1.0, rate=0.5)]
    segments = [Segment(0, 2, 1000, rules[0]), Segment(1, 1002, 50, rules[1]), Segment(2, 1060, 30, rules[2])]
    parts = list(blocks.cut(segments, 1100, Limits(400, 300, 500)))
    assert sum(length for part in parts for _, length in part) == 1100
    assert [(segment and segment.tensor) for part in parts for segment, _ in part] == [None, 0, 0, 0, 1, None, 2, None]
    assert all(len({segment.rule.pace for segment, _ in part if segment}) <= 1 for part in parts)


@pytest.mark.parametrize("make", [plain, compiled])
def test_a_small_step_far_from_the_anchor_keeps_its_digits(make):
    # The square of the distance has 4 digits fewer than are needed to see a step of a millionth of it.
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(300_000, generator=generator)
    anchor = flat - 1.0
    before = (flat.double() - anchor.double()).square().sum()
    state = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
    plan = make([flat], [[Segment(0, 0, flat.numel(), Rule(1.0))]], [anchor], [0], 1, True)
    grad = torch.randn(300_000, generator=generator)
    sums = plan.advance(StepInputs([flat], [grad], [state], [Hyperparameters(1e-6, BETAS, EPS, 0.0)]))
    expected = (flat.double() - anchor.double()).square().sum() - before
    assert float(sums[2, 0]) == pytest.approx(float(expected), rel=1e-4)


def test_triton_kernels_equal_the_rule_on_whole_tensors():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton: pip install triton")
    # Triton's interpreter runs kernels on the CPU, where it is asked to before Triton is imported.
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    worst = {name: float(value) for name, value in (line.split() for line in ended.stdout.splitlines())}
    assert len(worst) == 3
    assert max(worst.values()) < 1e-6


if __name__ == "__main__":
    from maps_ray.proximity.triton_step import TritonStep

    def kernels(parameters, segments, anchors, groups, tensors, fused):
        return TritonStep(parameters, segments, anchors, tensors)

    for dtype in (torch.float32, torch.bfloat16, None):
        lengths = [9000, 3, 250, 1025, 1, 17, 64]
        rules = [Rule(STRENGTHS[index % 4], (1.0, 0.3)[index % 5 == 3]) for index in range(len(lengths))]
        rules[-1] = Rule(0.8, begins=3)
        rules[-2] = Rule(0.0, l2_sp=0.4)
        ours, theirs, projected = flat_run(lengths, rules, dtype, True, steps=6, make=kernels)
        assert projected > 6
        print(dtype, max(float((mine - whole).abs().max()) for mine, whole in zip(ours, theirs, strict=True)))
