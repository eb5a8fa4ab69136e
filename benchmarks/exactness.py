"""Is AdamSPD under ZeRO exact? Weights after 20 steps of real DeepSpeed processes against one process of `projection`.

    python benchmarks/exactness.py            # stages 1-3 x 1-3 processes x fp32, bf16 x all cases
    python benchmarks/exactness.py --quick    # 1 and 2 processes, fewer cases

Every error is ||sharded - reference|| / ||reference - start|| over all weights, on the fp32 masters, and must stay
below 1e-5. The reference runs `maps_ray.proximity.projection` on whole tensors, in two ways:

own     It computes gradients itself, from its own weights: everything is compared, the data-parallel mean,
        accumulation and clipping included. This decides in fp32.
given   It is fed the gradients that DeepSpeed hands to the optimizer (fp32, reduced, unscaled, clipped). This decides
        in bf16, where `own` says little: gradients are rounded to 8 bits by the backward pass, by each accumulation
        and by the reduction. The reference repeats these roundings, and with two processes it ends with the same bits.
        But a sum in another order (the norm that clips, the reduction over three processes) changes the last bit of a
        master, one such bit in many flips the rounding of a bf16 weight by 2^-9 of itself, and the runs part: by 1e-4
        to 1e-1 after 20 steps. Plain Adam (all strengths 0) parts as far. So does a reference that accumulates or
        reduces gradients in fp32 where DeepSpeed does it in bf16.

Exit code 1 when a case fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from processes import in_processes
from single_process import (
    BETAS,
    CLIP,
    EPS,
    LR,
    STEPS,
    Case,
    anchors,
    batch,
    build,
    extras,
    learning_rates,
    micro_batches,
    own_gradients,
    reference,
    strengths,
    trained,
)
from torch import Tensor, nn

# Sums in another order part by less; projecting every shard as if it were a tensor parts a thousand times as far
# (docs/benchmarks.md).
TOLERANCE = 1e-5
VARIANTS = ("plain", "clipping", "accumulation", "groups", "frozen_tied", "lora")
RULES = ("released", "init anchors", "rates", "weight decay", "ema", "l2_sp", "learned", "freeze until")

# What `training.deepspeed` lets a spec set, by the names of settings.
# So small that this network needs several buckets and sub-groups.
FIELDS: dict[str, dict[str, Any]] = {
    "buckets": {"overlap_comm": True, "reduce_bucket_size": 500, "allgather_bucket_size": 500},
    "no buckets": {"overlap_comm": False, "contiguous_gradients": False, "reduce_scatter": False},
    "prefetch": {
        "overlap_comm": True,
        "reduce_bucket_size": 2000,
        "sub_group_size": 300,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 1000,
        "stage3_max_reuse_distance": 0,
    },
    "all offload": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}


@dataclass(frozen=True)
class Result:
    """What came out of a case."""

    case: Case
    own: float
    given: float
    projection_rate: float
    """Share of the steps of tensors with a strength that the sharded run projected."""
    seconds: float

    @property
    def error(self) -> float:
        return self.own if self.case.dtype == "fp32" else self.given

    @property
    def passed(self) -> bool:
        return self.error < TOLERANCE


def deepspeed_config(case: Case) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": micro_batches(case),
        "gradient_clipping": CLIP if case.clips else 0.0,
        "bf16": {"enabled": case.dtype == "bf16"},
        "zero_allow_untested_optimizer": True,
        # Below DeepSpeed's 1e5, at which every tensor of this network would stay whole.
        "zero_optimization": {"stage": case.stage, "stage3_param_persistence_threshold": 100},
    }
    if case.setting == "fp32 accumulation":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if case.setting in ("cpu offload", "all offload"):
        config["zero_force_ds_cpu_optimizer"] = False
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if case.variant == "groups":
        config["zero_optimization"]["sub_group_size"] = 600
    config["zero_optimization"] |= FIELDS.get(case.setting, {})
    return config


def whole(spans: Sequence[Any], pick: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """Puts together what every process holds in its flats; `pick` gives the tensor that is laid out like a flat."""
    tensors = {}
    for span in spans:
        full = torch.zeros(span.shape)
        piece = pick(span.flat).detach().narrow(0, span.offset, span.numel)
        full.view(-1)[span.start : span.start + span.numel] = piece
        dist.all_reduce(full)
        tensors[span.name] = full
    return tensors


def groups_of(case: Case, model: nn.Module) -> list[dict[str, Any]]:
    rates = learning_rates(case, list(trained(model)))
    return [
        {"params": [parameter for name, parameter in trained(model).items() if rates[name] == rate], "lr": rate}
        for rate in sorted(set(rates.values()), reverse=True)
    ]


def run_case(case: Case) -> Result:
    """Runs one case; every process of the group calls it."""
    import deepspeed

    from maps_ray.proximity.zero import ShardedAdamSPD, bind
    from maps_ray.proximity.zero.partitions import spans
    from maps_ray.training.engine import silence

    began = time.perf_counter()
    model = build(case)
    start = {name: parameter.detach().float().clone() for name, parameter in trained(model).items()}
    strength_of, anchor_of = strengths(case, model), anchors(case, model)
    more = extras(case, list(trained(model)))
    if case.setting == "zero.Init":
        # Not told the dtype: DeepSpeed 0.19.8 makes bf16 of any on a CPU without fp16. The configuration has it.
        with deepspeed.zero.Init(config_dict_or_path=deepspeed_config(case)):
            model = build(case)
    groups = groups_of(case, model)
    optimizer = ShardedAdamSPD(groups, lr=LR, betas=BETAS, eps=EPS, weight_decay=more.weight_decay)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(case))
    binding = bind(
        engine,
        optimizer,
        strength_of,
        anchor_of.__getitem__,
        l2_sp=more.l2_sp,
        rates=more.rates,
        begins=more.begins,
        ema=more.ema,
        radius_rate=more.radius_rate,
    )
    silence(engine.module, binding, more.begins)
    if case.shards_as_tensors:
        binding._reduce = lambda sums: sums
    layout = spans(engine)
    given: list[dict[str, Tensor]] = []
    stepped: dict[str, Tensor] = {}

    def record(_optimizer: Any, _args: Any, _kwargs: Any) -> None:
        flats = [flat for group in optimizer.param_groups for flat in group["params"]]
        here = [span for span in layout if any(span.flat is flat for flat in flats)]
        stepped.update(whole(here, lambda flat: flat.grad))

    optimizer.register_step_pre_hook(record)
    projections = held = 0
    for step in range(STEPS):
        stepped.clear()
        for micro in range(micro_batches(case)):
            engine.backward(engine(*batch(step, micro, dist.get_rank())))
            engine.step()
        given.append(dict(stepped))
        entries = binding.statistics()
        projections += sum(entry.projected for entry in entries.values())
        held += sum(strength_of[name] > 0 for name in entries)
    sharded = whole(layout, lambda flat: flat if more.ema is None else binding.averages(flat))
    engine.destroy()
    own, fed = reference(case, own_gradients(case)), reference(case, lambda step, _: given[step])
    errors = distance(sharded, own, start), distance(sharded, fed, start)
    return Result(case, *errors, projections / max(held, 1), time.perf_counter() - began)


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """||found - expected|| / ||expected - start|| over all tensors."""
    if found.keys() != expected.keys():
        raise AssertionError(f"tensors differ: {sorted(found.keys() ^ expected.keys())}")
    error = sum(float((found[name] - expected[name]).double().square().sum()) for name in expected)
    moved = sum(float((expected[name] - start[name]).double().square().sum()) for name in expected)
    return (error / moved) ** 0.5


def run_cases(cases: Sequence[Case]) -> list[Result]:
    """Runs cases of one world size in the process group at hand."""
    return [run_case(case) for case in cases]


def matrix(quick: bool) -> Iterator[list[Case]]:
    """The cases, in lists of one world size."""
    for world in (1, 2) if quick else (1, 2, 3):
        cases = [
            Case(stage, world, dtype, variant)
            for stage in (1, 2, 3)
            for dtype in ("fp32", "bf16")
            for variant in VARIANTS
            if not quick or variant == "plain" or (world == 2 and dtype == "fp32")
        ]
        cases += [Case(stage, world, "fp32", rule) for stage in (1, 2, 3) for rule in RULES if not quick or world == 2]
        settings = [
            Case(1, world, "bf16", "accumulation", "fp32 accumulation"),
            Case(2, world, "fp32", "accumulation", "cpu offload"),
            Case(3, world, "fp32", "groups", "cpu offload"),
            Case(3, world, "fp32", "frozen_tied", "zero.Init"),
            Case(1, world, "fp32", "plain", "cpu offload"),
            Case(2, world, "fp32", "clipping", "buckets"),
            Case(2, world, "fp32", "accumulation", "no buckets"),
            Case(3, world, "fp32", "groups", "prefetch"),
            Case(3, world, "fp32", "frozen_tied", "all offload"),
        ]
        yield cases + settings * (world > 1)


def row(result: Result) -> str:
    case = result.case
    name = case.variant + (f", {case.setting}" if case.setting else "")
    return (
        f"{case.stage:5} {case.world:9} {case.dtype:6} {name:33} {result.own:9.1e} {result.given:9.1e} "
        f"{result.projection_rate:9.2f} {result.seconds:7.1f}  {'ok' if result.passed else 'FAILED'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 and 2 processes, fewer cases")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    began, results = time.perf_counter(), []
    print("stage processes dtype  case                                    own     given projected seconds")
    for cases in matrix(options.quick):
        found = in_processes(cases[0].world, run_cases, cases)
        print("\n".join(row(result) for result in found), flush=True)
        results += found
    failed = [result for result in results if not result.passed]
    worst = max(results, key=lambda result: result.error)
    print(
        f"{len(results) - len(failed)} of {len(results)} exact to {TOLERANCE:g}, worst {worst.error:.1e}, "
        f"{time.perf_counter() - began:.0f} s"
    )
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
