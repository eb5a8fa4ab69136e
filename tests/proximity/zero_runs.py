"""What the tests of `proximity.zero` run inside a DeepSpeed process group. Every function returns plain data."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from exactness import deepspeed_config, groups_of, run_case, whole
from single_process import BETAS, EPS, LR, Case, anchors, batch, build, strengths, trained

from maps_ray.proximity.zero import ShardedAdamSPD, averaged, bind
from maps_ray.proximity.zero.partitions import spans
from maps_ray.training.state import Snapshot, load_state


def start(case: Case, optimizer_class: type = ShardedAdamSPD, **zero_options: Any) -> tuple[Any, Any]:
    model = build(case)
    optimizer = optimizer_class(groups_of(case, model), lr=LR, betas=BETAS, eps=EPS)
    config = deepspeed_config(case)
    config["zero_optimization"].update(zero_options)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, optimizer


def bound(case: Case) -> tuple[Any, Any]:
    engine, optimizer = start(case)
    model = build(case)
    bind(engine, optimizer, strengths(case, model), anchors(case, model).__getitem__)
    return engine, optimizer


def train(engine: Any, first: int, last: int) -> None:
    for step in range(first, last):
        engine.backward(engine(*batch(step, 0, dist.get_rank())))
        engine.step()


def refusal(function: Any) -> list[str]:
    """What a call that must fail says, in every process."""
    try:
        function()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    else:
        said = "nothing"
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, said)
    return gathered


def refusals() -> dict[str, list[str]]:
    """What is said of each thing that cannot be bound."""
    case = Case(2, dist.get_world_size(), "fp32", "plain")
    model = build(case)
    strength_of, anchor_of = strengths(case, model), anchors(case, model)
    said = {}

    engine, optimizer = start(case, round_robin_gradients=True)
    said["round robin"] = refusal(lambda: bind(engine, optimizer, strength_of, anchor_of.__getitem__))
    engine.destroy()

    engine, optimizer = start(case)
    said["unbound"] = refusal(lambda: train(engine, 0, 1))
    other = ShardedAdamSPD(build(case).parameters())
    said["other optimizer"] = refusal(lambda: bind(engine, other, strength_of, anchor_of.__getitem__))
    few = {name: value for name, value in strength_of.items() if name != "norm.bias"} | {"nrm.bias": 1.0}
    said["strengths"] = refusal(lambda: bind(engine, optimizer, few, anchor_of.__getitem__))
    negative = strength_of | {"norm.bias": -1.0}
    said["negative"] = refusal(lambda: bind(engine, optimizer, negative, anchor_of.__getitem__))
    # The last tensor lies on the last process alone, and still every process must hear of it.
    turned = anchor_of | {"output.weight": torch.zeros(19, 37)}
    said["anchor shape"] = refusal(lambda: bind(engine, optimizer, strength_of, turned.__getitem__))
    broken = anchor_of | {"output.weight": torch.full((37, 19), math.nan)}
    said["anchor nan"] = refusal(lambda: bind(engine, optimizer, strength_of, broken.__getitem__))
    absent = {name: anchor for name, anchor in anchor_of.items() if name != "output.weight"}
    said["anchor absent"] = refusal(lambda: bind(engine, optimizer, strength_of, absent.__getitem__))

    zero = engine.optimizer
    masters = zero.single_partition_of_fp32_groups[0].data
    masters.copy_(masters.roll(1))
    said["masters"] = refusal(lambda: bind(engine, optimizer, strength_of, anchor_of.__getitem__))
    masters.copy_(masters.roll(-1))
    # Two tensors of equal size and equal weights, one in the other's place: only their address tells them apart.
    offsets = zero.round_robin_bit16_offsets[0]
    names = [name for name, _ in trained(model).items()]
    weight, bias = names.index("wide.bias"), names.index("norm.bias")
    for parameter in (engine.module.wide.bias, engine.module.norm.bias):
        parameter.data.zero_()
    masters.copy_(zero.bit16_groups_flat[0].chunk(dist.get_world_size())[dist.get_rank()])
    offsets[weight], offsets[bias] = offsets[bias], offsets[weight]
    said["swapped"] = refusal(lambda: bind(engine, optimizer, strength_of, anchor_of.__getitem__))
    engine.destroy()

    plain = Case(2, dist.get_world_size(), "fp32", "plain")
    config = deepspeed_config(plain)
    config["zero_optimization"]["stage"] = 0
    optimizer = ShardedAdamSPD(groups_of(plain, model))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    said["stage 0"] = refusal(lambda: bind(engine, optimizer, strength_of, anchor_of.__getitem__))
    engine.destroy()
    return said


def strength_zero(stage: int) -> tuple[bool, bool]:
    """Whether strength 0 equals torch.optim.Adam bit for bit, and whether its drift is measured all the same."""
    case = Case(stage, dist.get_world_size(), "fp32", "plain")
    ends = []
    for optimizer_class in (ShardedAdamSPD, torch.optim.Adam):
        engine, optimizer = start(case, optimizer_class)
        if optimizer_class is ShardedAdamSPD:
            model = build(case)
            binding = bind(
                engine, optimizer, dict.fromkeys(strengths(case, model), 0.0), anchors(case, model).__getitem__
            )
        train(engine, 0, 10)
        ends.append(whole(spans(engine), lambda flat: flat))
        if optimizer_class is ShardedAdamSPD:
            statistics = binding.statistics()
        engine.destroy()
    measured = set(statistics) == {name for name, anchor in anchors(case, model).items() if anchor is not None} & set(
        ends[0]
    )
    still = all(entry.drift > 0 and not entry.projected for entry in statistics.values())
    return all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1]), measured and still


def l2_sp(stage: int) -> float:
    """Distance of L2-SP under ZeRO from Adam with the decoupled penalty written out, relative to the way gone."""
    coefficient = 0.3
    case = Case(stage, dist.get_world_size(), "fp32", "plain")
    start_weights = anchors(case, build(case))
    engine, optimizer = start(case)
    unprojected = dict.fromkeys(start_weights, 0.0)
    bind(engine, optimizer, unprojected, start_weights.__getitem__, l2_sp=coefficient)
    train(engine, 0, 12)
    ours = whole(spans(engine), lambda flat: flat)
    engine.destroy()

    # Under stage 1 every process holds the whole weights.
    engine, optimizer = start(Case(1, case.world, "fp32", "plain"), torch.optim.Adam)
    flat = engine.optimizer.single_partition_of_fp32_groups[0]
    origin = flat.detach().clone()
    held = torch.zeros_like(origin)
    for span in spans(engine):
        if start_weights[span.name] is not None:
            held.narrow(0, span.offset, span.numel).fill_(coefficient)

    def penalise(*_: Any) -> None:
        with torch.no_grad():
            flat.sub_(LR * held * (flat - origin))

    optimizer.register_step_pre_hook(penalise)
    for step in range(12):
        engine.backward(engine(*batch(step, 0, dist.get_rank())))
        engine.step()
    theirs = whole(spans(engine), lambda flat: flat)
    engine.destroy()
    apart = math.hypot(*(float((ours[name] - theirs[name]).double().norm()) for name in theirs))
    anchored = [name for name in theirs if start_weights[name] is not None]
    return apart / math.hypot(*(float((theirs[name] - start_weights[name]).double().norm()) for name in anchored))


def statistics(stage: int) -> dict[str, Any]:
    """Statistics of the last step beside drifts computed from the whole weights."""
    case = Case(stage, dist.get_world_size(), "bf16", "lora" if stage == 1 else "plain")
    engine, optimizer = bound(case)
    before = optimizer.binding.statistics()
    train(engine, 0, 12)
    masters = whole(spans(engine), lambda flat: flat)
    anchor_of = anchors(case, build(case))
    modules = {name: name.split(".")[0] for name in masters}
    tensors, of_modules = optimizer.binding.statistics(), optimizer.binding.module_statistics(modules)
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, tensors)
    engine.destroy()
    return {
        "before": before,
        "tensors": tensors,
        "modules": of_modules,
        "same": all(other == tensors for other in everywhere),
        "drift": {
            name: float((master - (0 if anchor_of[name] is None else anchor_of[name])).double().norm())
            for name, master in masters.items()
        },
        "anchor": {name: float(anchor.double().norm()) for name, anchor in anchor_of.items() if anchor is not None},
        "held": {name for name, strength in strengths(case, build(case)).items() if strength > 0} & set(masters),
    }


def resumed(stage: int, setting: str, folder: str) -> tuple[bool, set[str]]:
    """Whether a resumed run ends with the bits of an undisturbed one, and the keys of the optimizer's state."""
    case = Case(stage, dist.get_world_size(), "bf16", "groups", setting)
    engine, _ = bound(case)
    train(engine, 0, 6)
    engine.save_checkpoint(folder)
    train(engine, 6, 12)
    undisturbed = whole(spans(engine), lambda flat: flat)
    engine.destroy()
    engine, optimizer = bound(case)
    engine.load_checkpoint(folder)
    keys = {key for state in optimizer.state.values() for key in state}
    train(engine, 6, 12)
    again = whole(spans(engine), lambda flat: flat)
    engine.destroy()
    return all(torch.equal(undisturbed[name], again[name]) for name in undisturbed), keys


def averages(stage: int, setting: str) -> dict[str, bool]:
    """Whether the model has the averaged weights within `averaged`, and the trained ones behind it."""
    case = Case(stage, dist.get_world_size(), "bf16", "ema", setting)
    engine, optimizer = start(case)
    model = build(case)
    bind(engine, optimizer, strengths(case, model), anchors(case, model).__getitem__, ema=0.9)
    train(engine, 0, 6)
    kept = whole(spans(engine), optimizer.binding.averages)
    masters = whole(spans(engine), lambda flat: flat)

    def shows(weights: dict[str, torch.Tensor]) -> bool:
        same = True
        for name, parameter in engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]) if stage == 3 else contextlib.nullcontext():
                if name in weights:
                    same &= torch.equal(parameter.detach(), weights[name].to(parameter.dtype))
        return same

    apart = not torch.equal(kept["wide.weight"], masters["wide.weight"])
    with averaged(engine):
        engine.eval()
        within, output = shows(kept), engine(*batch(9, 0, 0)).detach()
    engine.train()
    found = {"apart": apart, "within": within, "behind": shows(masters)}
    found["forward"] = not torch.equal(output, engine(*batch(9, 0, 0)).detach())
    train(engine, 6, 8)
    engine.destroy()
    return found


def restored(stage: int, folder: str) -> bool:
    """Whether averages, learned radii and late starts go on from our own checkpoint with the same bits."""
    case = Case(stage, dist.get_world_size(), "fp32", "plain")
    model = build(case)
    names = list(trained(model))

    def begin() -> tuple[Any, Any]:
        engine, optimizer = start(case)
        late = dict.fromkeys(names[::3], 4)
        anchor_of = anchors(case, model)
        options = {"begins": late, "ema": 0.9, "radius_rate": 0.02}
        bind(engine, optimizer, strengths(case, model), anchor_of.__getitem__, **options)
        return engine, optimizer

    def end(engine: Any, optimizer: Any) -> list[Any]:
        train(engine, 3, 9)
        ends = [whole(spans(engine), lambda flat: flat), whole(spans(engine), optimizer.binding.averages)]
        return [*ends, optimizer.binding.radii()]

    engine, optimizer = begin()
    train(engine, 0, 3)
    rank, world = dist.get_rank(), dist.get_world_size()
    Path(folder).mkdir(exist_ok=True)
    Snapshot().take(engine).write(Path(folder), rank)
    dist.barrier()
    undisturbed = end(engine, optimizer)
    engine.destroy()
    engine, optimizer = begin()
    files = {part.name: part.stat().st_size for part in Path(folder).iterdir()}
    load_state(engine, Path(folder), world, rank, world, files=files)
    again = end(engine, optimizer)
    engine.destroy()
    same = all(torch.equal(undisturbed[kind][name], again[kind][name]) for kind in (0, 1) for name in names)
    return same and undisturbed[2] == again[2] and any(row[0] > 0 for row in again[2].values())


def everything(folder: str) -> dict[str, Any]:
    """All of the above in one process group: starting one takes longer than using it."""
    return {
        "wrong": [
            run_case(Case(stage, dist.get_world_size(), "fp32", "plain", shards_as_tensors=True)) for stage in (1, 2, 3)
        ],
        "refusals": refusals(),
        "strength_zero": {stage: strength_zero(stage) for stage in (1, 2, 3)},
        "l2_sp": {stage: l2_sp(stage) for stage in (1, 2, 3)},
        "statistics": {stage: statistics(stage) for stage in (1, 2, 3)},
        "averages": {
            (stage, setting): averages(stage, setting)
            for stage, setting in ((1, "fp32 accumulation"), (2, ""), (3, ""))
        },
        "restored": {stage: restored(stage, f"{folder}/restored{stage}") for stage in (1, 2, 3)},
        "resumed": {
            (stage, setting): resumed(stage, setting, f"{folder}/{stage}{setting}")
            for stage, setting in ((1, "fp32 accumulation"), (2, ""), (3, ""))
        },
    }
