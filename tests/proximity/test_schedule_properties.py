"""What holds of every schedule and every sharding, on examples that hypothesis thinks up."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maps_ray.proximity.schedule import released_strengths, schedule
from maps_ray.proximity.stack import StackLayer
from maps_ray.proximity.zero.partitions import _cut

MODULES = ("dinov2", "siglip", "projector", "language")
depths = st.lists(st.integers(1, 6), min_size=len(MODULES), max_size=len(MODULES))
lambdas = st.floats(0, 1e3, allow_nan=False)
shapes = st.sampled_from(["linear", "cosine", "constant"])


def stack_of(counts: list[int]) -> list[StackLayer]:
    return [
        StackLayer(f"{module}.{i}", (module,), rf"{module}\.{i}\..*")
        for module, count in zip(MODULES, counts, strict=True)
        for i in range(count)
    ]


@settings(max_examples=60, deadline=None)
@given(depths, st.permutations(MODULES), shapes, lambdas, st.sampled_from(["layer", "module"]), st.floats(0.1, 10))
def test_a_schedule_falls_along_its_order(counts, order, shape, lambda_max, granularity, factor) -> None:
    stack = stack_of(counts)
    strengths = schedule(stack, order, shape, lambda_max, granularity)
    assert list(strengths) == [layer.name for layer in stack]
    line = [strengths[layer.name] for module in order for layer in stack if layer.modules == (module,)]
    assert line[0] == lambda_max
    assert all(first >= second >= 0 for first, second in pairwise(line))
    if shape != "constant":
        assert line[-1] == pytest.approx(0, abs=1e-12 * max(lambda_max, 1))
    # Strengths are a share of lambda_max, and a module's layers stay together whatever stands around them.
    scaled = schedule(stack, order, shape, lambda_max * factor, granularity)
    assert scaled == pytest.approx({name: value * factor for name, value in strengths.items()})
    # The other way round is the mirror image.
    mirrored = schedule(stack[::-1], order[::-1], shape, lambda_max, granularity)
    for name, value in strengths.items():
        assert value + mirrored[name] == pytest.approx(2 * lambda_max if shape == "constant" else lambda_max, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(depths, shapes, lambdas, st.data())
def test_the_released_recipe_gives_a_layer_one_strength(counts, shape, lambda_max, data) -> None:
    kinds = {"weight": 2, "bias": 1, "norm.weight": 1}
    tensors = {f"{layer.name}.{kind}": n for layer in stack_of(counts) for kind, n in kinds.items()}
    tensors |= {"embedding.weight": 2, "final_norm.weight": 1, "action_head.fc1.weight": 2}
    kept = data.draw(st.sets(st.sampled_from(list(tensors)), min_size=1))
    trained = {name: dimensions for name, dimensions in tensors.items() if name in kept}
    strengths = released_strengths(trained, lambda_max, shape)
    assert list(strengths) == list(trained)
    assert all(0 <= value <= lambda_max for value in strengths.values())
    assert all(strengths[name] == 0 for name in trained if name.endswith(".bias") or name.startswith("action_head"))
    if shape == "constant":
        assert set(strengths.values()) <= {0.0, lambda_max}
        return
    held = {name: value for name, value in strengths.items() if not name.endswith(".bias") and "head" not in name}
    layers: dict[str, set[float]] = {}
    for name, value in held.items():
        numbered = name.split(".")[1].isdigit()
        layers.setdefault(".".join(name.split(".")[:2]) if numbered else "last place", set()).add(value)
    assert all(len(values) == 1 for values in layers.values())
    line = [layers[name].pop() for name in layers if name != "last place"]
    assert all(first >= second for first, second in pairwise(line))
    # Even the last place is held a little: the released line ends one place before zero.
    assert all(value > 0 for value in held.values()) or lambda_max < 1e-300


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 5), st.integers(0, 7))
def test_every_element_lies_in_one_shard(sizes, processes, padding) -> None:
    """However tensors are cut over processes, the spans together hold each element once, at the right place."""
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    whole = sum(sizes) + padding
    whole += -whole % processes
    model_flat = torch.arange(whole, dtype=torch.float32)
    names = {parameter: f"p{i}" for i, parameter in enumerate(parameters)}
    for parameter, offset in zip(parameters, offsets, strict=True):
        parameter.data = model_flat[offset : offset + parameter.numel()]
    seen: dict[str, list[int]] = {name: [] for name in names.values()}
    for rank in range(processes):
        flat = model_flat[rank * whole // processes : (rank + 1) * whole // processes].clone()
        for span in _cut(parameters, offsets, model_flat, flat, rank, names):
            assert span.numel == span.weight.numel()
            assert torch.equal(flat[span.offset : span.offset + span.numel], span.weight)
            seen[span.name] += range(span.start, span.start + span.numel)
    assert seen == {f"p{i}": list(range(size)) for i, size in enumerate(sizes)}
