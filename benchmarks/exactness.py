"""Is AdamSPD under ZeRO exact? Weights after 20 steps of real DeepSpeed processes against one process of `projection`.

    python benchmarks/exactness.py            # stages 1-3 x 1-3 processes x fp32, bf16 x six cases
    python benchmarks/exactness.py --quick    # 1 and 2 processes, fewer cases

Every error is ||sharded - reference|| / ||reference - start|| over all weights, on the fp32 masters, and must stay
below 1e-5. The reference runs `maps_ray.proximity.projection` on whole tensors, in two ways:

own     It computes gradients itself, from its own weights: everything is compared, the data-parallel mean,
        accumulation and clipping included. This decides in fp32.
given   It is fed the gradients that DeepSpeed hands to the optimizer (fp32, reduced, unscaled, clipped). This decides
        in bf16, where `own` says little: gradients are rounded to 8 bits by the backward pass, by each accumulation
        and by the reduction. The reference repeats these roundings, and up to two processes it ends with the same
        bits. A sum in another order (clipping's norm, the reduction over three processes) changes the last bit of a
        master, one such bit in many flips the rounding of a bf16 weight by 2^-9 of itself, and the runs part: 1e-4 to
        1e-2 after 20 steps, no matter which optimizer. Reducing in fp32 in one run and in bf16 in the other does the
        same.

Exit code 1 when a case fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from maps_ray.proximity.projection import Moments, adam_step, project

STEPS = 20
TOLERANCE = 1e-5
LR, BETAS, EPS = 2e-2, (0.9, 0.99), 1e-8
CLIP = 0.05
STRENGTHS = (1.0, 0.5, 0.0, 1.5, 0.8)
VARIANTS = ("plain", "clipping", "accumulation", "groups", "frozen_tied", "lora")


@dataclass(frozen=True)
class Case:
    """One configuration of DeepSpeed and the model."""

    stage: int
    world: int
    dtype: str
    variant: str
    setting: str = ""
    """`fp32 accumulation` (of bf16 gradients; selects BF16_Optimizer in stage 1), `cpu offload`, or `zero.Init`."""
    shards_as_tensors: bool = False
    """The wrong way, for comparison: projects every shard by its own norms."""

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype]


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


class Network(nn.Module):
    """A small network of odd sizes, so that no partition ends where a tensor ends."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(37, 19)
        self.wide = nn.Linear(19, 83)
        self.norm = nn.LayerNorm(83)
        self.narrow = nn.Linear(83, 19, bias=False)
        self.gain = nn.Parameter(torch.tensor([0.7]))
        self.output = nn.Linear(19, 37, bias=False)
        self.lora_a = nn.Parameter(torch.randn(5, 19) * 0.2)
        self.lora_b = nn.Parameter(torch.zeros(83, 5))
        if variant == "frozen_tied":
            self.output.weight = self.embedding.weight
            self.wide.requires_grad_(False)
        adapters = {"lora_a", "lora_b"}
        for name, parameter in self.named_parameters():
            if name in adapters or variant == "lora":
                parameter.requires_grad_(variant == "lora" and name in adapters | {"gain"})

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(tokens)
        hidden = self.wide(x) + x @ self.lora_a.t() @ self.lora_b.t()
        hidden = torch.tanh(self.norm(hidden))
        logits = self.output(x + self.gain * self.narrow(hidden))
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def build(case: Case) -> Network:
    return Network(case.variant).to(case.torch_dtype)


def batch(step: int, micro: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1_000_003 * step + 1009 * micro + rank)
    # With labels that mean nothing the weights wander, and gradients oppose the drift about as often as not.
    return torch.randint(0, 37, (4, 11), generator=generator), torch.randint(0, 37, (4, 11), generator=generator)


def micro_batches(case: Case) -> int:
    return 3 if case.variant == "accumulation" else 1


def strengths(model: nn.Module) -> dict[str, float]:
    """A strength for every parameter; the adapters and the gain, which has no anchor at strength 0, at the end."""
    found = {name: STRENGTHS[index % len(STRENGTHS)] for index, (name, _) in enumerate(model.named_parameters())}
    return found | {name: value for name, value in (("lora_a", 1.0), ("lora_b", 0.6), ("gain", 0.0)) if name in found}


def anchors(model: nn.Module) -> dict[str, Tensor | None]:
    """The start weights; zero anchors for adapters, none for the gain."""
    unanchored = {"lora_a", "lora_b", "gain"}
    return {
        name: None if name in unanchored else parameter.detach().clone() for name, parameter in model.named_parameters()
    }


def learning_rates(case: Case, names: Sequence[str]) -> dict[str, float]:
    return {name: LR * (0.3 if case.variant == "groups" and index % 2 else 1.0) for index, name in enumerate(names)}


# ------------------------------------------------------------------------------------------------------- the reference


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def added_up(grads: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The sum, rounded to the gradients' dtype after every addend, as DeepSpeed accumulates and reduces."""
    total = {name: grad.clone() for name, grad in grads[0].items()}
    for further in grads[1:]:
        for name, grad in further.items():
            total[name] += grad
    return total


def mean(grads: Sequence[Mapping[str, Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
    return added_up([{name: grad.to(dtype) / len(grads) for name, grad in part.items()} for part in grads])


def own_gradients(case: Case) -> Callable[[int, Mapping[str, Tensor]], dict[str, Tensor]]:
    """A function of step and master weights that gives the gradients a single process computes."""
    model = build(case)

    def backward(step: int, micro: int, rank: int) -> dict[str, Tensor]:
        model.zero_grad()
        (model(*batch(step, micro, rank)) / micro_batches(case)).backward()
        dtype = torch.float32 if case.setting == "fp32 accumulation" else case.torch_dtype
        return {name: parameter.grad.to(dtype, copy=True) for name, parameter in trained(model).items()}

    def gradients(step: int, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, parameter in trained(model).items():
            parameter.data.copy_(masters[name])
        grads = [[backward(step, micro, rank) for micro in range(micro_batches(case))] for rank in range(case.world)]
        # Stage 1 reduces what each process accumulated; stages 2 and 3 accumulate what was reduced.
        if case.stage == 1:
            total = mean([added_up(micros) for micros in grads], case.torch_dtype)
        else:
            total = added_up([mean(ranks, case.torch_dtype) for ranks in zip(*grads, strict=True)])
        total = {name: grad.float() for name, grad in total.items()}
        if case.variant == "clipping":
            norm = float(torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in total.values()])))
            excess = max((norm + 1e-6) / CLIP, 1.0)
            total = {name: grad / excess for name, grad in total.items()}
        return total

    return gradients


def reference(case: Case, gradients: Callable[[int, Mapping[str, Tensor]], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The fp32 masters after all steps of the plain rule on whole tensors."""
    model = build(case)
    masters = {name: parameter.detach().float().clone() for name, parameter in trained(model).items()}
    moments = {name: Moments(torch.zeros_like(w), torch.zeros_like(w)) for name, w in masters.items()}
    strength_of, anchor_of = strengths(model), anchors(model)
    rates = learning_rates(case, list(masters))
    for step in range(STEPS):
        for name, grad in gradients(step, masters).items():
            theta = masters[name]
            tilde = adam_step(theta, grad, moments[name], rates[name], BETAS, EPS)
            anchor = anchor_of[name]
            anchor = torch.zeros_like(theta) if anchor is None else anchor.float()
            masters[name], _ = project(tilde, theta, grad, anchor, strength_of[name])
    return masters


# ----------------------------------------------------------------------------------------------------- the sharded run


def deepspeed_config(case: Case) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": micro_batches(case),
        "gradient_clipping": CLIP if case.variant == "clipping" else 0.0,
        "bf16": {"enabled": case.dtype == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": case.stage, "stage3_param_persistence_threshold": 100},
    }
    if case.setting == "fp32 accumulation":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if case.setting == "cpu offload":
        config["zero_force_ds_cpu_optimizer"] = False
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if case.variant == "groups":
        config["zero_optimization"]["sub_group_size"] = 600
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
    from maps_ray.proximity.zero.layout import spans

    began = time.perf_counter()
    model = build(case)
    start = {name: parameter.detach().float().clone() for name, parameter in trained(model).items()}
    strength_of, anchor_of = strengths(model), anchors(model)
    if case.setting == "zero.Init":
        with deepspeed.zero.Init(config_dict_or_path=deepspeed_config(case), dtype=case.torch_dtype):
            model = build(case)
    optimizer = ShardedAdamSPD(groups_of(case, model), lr=LR, betas=BETAS, eps=EPS)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(case))
    binding = bind(engine, optimizer, strength_of, anchor_of.__getitem__)
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
    sharded = whole(layout, lambda flat: flat)
    engine.destroy()
    own, fed = reference(case, own_gradients(case)), reference(case, lambda step, _: given[step])
    errors = distance(sharded, own, start), distance(sharded, fed, start)
    return Result(case, *errors, projections / held, time.perf_counter() - began)


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """||found - expected|| / ||expected - start|| over all tensors."""
    if found.keys() != expected.keys():
        raise AssertionError(f"tensors differ: {sorted(found.keys() ^ expected.keys())}")
    error = sum(float((found[name] - expected[name]).double().square().sum()) for name in expected)
    moved = sum(float((expected[name] - start[name]).double().square().sum()) for name in expected)
    return (error / moved) ** 0.5


# ------------------------------------------------------------------------------------------------------------ processes


def _process(rank: int, world: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(world), LOCAL_SIZE=str(world), DEEPSPEED_LOG_LEVEL="error")
    torch.set_num_threads(1)
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    # Without this the first collective compiles a shared-memory extension, and fails where there is no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    deepspeed.init_distributed("gloo", verbose=False)
    result = function(*arguments)
    if rank == 0:
        torch.save(result, f"{folder}/result.pt")
    dist.barrier()
    dist.destroy_process_group()


def in_processes(world: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls `function` in `world` gloo processes ready for DeepSpeed; returns what rank 0 returned."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (world, folder, function, arguments), nprocs=world)
        return torch.load(f"{folder}/result.pt", weights_only=False)


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
        settings = [
            Case(1, world, "bf16", "accumulation", "fp32 accumulation"),
            Case(2, world, "fp32", "accumulation", "cpu offload"),
            Case(3, world, "fp32", "groups", "cpu offload"),
            Case(3, world, "fp32", "frozen_tied", "zero.Init"),
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
