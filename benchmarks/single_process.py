"""The single-process side of `exactness.py`: a small network, its batches, and the plain rule on whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from maps_ray.proximity.projection import Moments, adam_step, project
from maps_ray.proximity.schedule import released_strengths

STEPS = 20
LR, BETAS, EPS = 2e-2, (0.9, 0.99), 1e-8
CLIP = 0.05
STRENGTHS = (1.0, 0.5, 0.0, 1.5, 0.8)


@dataclass(frozen=True)
class Case:
    """One configuration of DeepSpeed and the model."""

    stage: int
    world: int
    dtype: str
    variant: str
    setting: str = ""
    """`fp32 accumulation` (of bf16 gradients; selects BF16_Optimizer in stage 1), `cpu offload`, `zero.Init`, or one of
    `exactness.FIELDS`."""
    shards_as_tensors: bool = False
    """The wrong way, for comparison: projects every shard by its own norms."""

    @property
    def clips(self) -> bool:
        return self.variant in ("clipping", "freeze until")

    @property
    def trains_adapters(self) -> bool:
        return self.variant in ("lora", "init anchors")

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype]


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
            lora = variant in ("lora", "init anchors")
            if name in adapters or lora:
                parameter.requires_grad_(lora and name in adapters | {"gain"})

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(tokens)
        hidden = self.wide(x) + x @ self.lora_a.t() @ self.lora_b.t()
        hidden = torch.tanh(self.norm(hidden))
        logits = self.output(x + self.gain * self.narrow(hidden))
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def build(case: Case) -> Network:
    return Network(case.variant).to(case.torch_dtype)


def batch(step: int, micro: int, rank: int) -> tuple[Tensor, Tensor]:
    # So far apart that no two of step, micro-batch and rank have one seed.
    generator = torch.Generator().manual_seed(1_000_003 * step + 1009 * micro + rank)
    # With labels that mean nothing the weights wander, and gradients oppose the drift about as often as not.
    return torch.randint(0, 37, (4, 11), generator=generator), torch.randint(0, 37, (4, 11), generator=generator)


def micro_batches(case: Case) -> int:
    return 3 if case.variant == "accumulation" else 1


def strengths(case: Case, model: nn.Module) -> dict[str, float]:
    """A strength for every parameter; the adapters and the gain, which has no anchor at strength 0, at the end."""
    names = [name for name, _ in model.named_parameters()]
    found = {name: STRENGTHS[index % len(STRENGTHS)] for index, name in enumerate(names)}
    if case.variant == "released":
        # Each parameter stands for a layer of its own; biases and norms are what the recipe tells apart.
        dimensions = {f"layers.{index}.{name}": p.dim() for index, (name, p) in enumerate(model.named_parameters())}
        found = dict(zip(names, released_strengths(dimensions, lambda_max=1.5).values(), strict=True))
    if case.variant == "l2_sp":
        found = dict.fromkeys(names, 0.0)
    return found | {name: value for name, value in (("lora_a", 1.0), ("lora_b", 0.6), ("gain", 0.0)) if name in found}


def anchors(case: Case, model: nn.Module) -> dict[str, Tensor | None]:
    """The start weights; zero anchors for adapters unless they are held to their start, none for the gain."""
    unanchored = {"gain"} if case.variant == "init anchors" else {"lora_a", "lora_b", "gain"}
    return {
        name: None if name in unanchored else parameter.detach().clone() for name, parameter in model.named_parameters()
    }


def learning_rates(case: Case, names: Sequence[str]) -> dict[str, float]:
    """Those of the optimizer's groups."""
    if case.trains_adapters:
        return dict.fromkeys(names, 5 * LR)
    return {name: LR * (0.3 if case.variant == "groups" and index % 2 else 1.0) for index, name in enumerate(names)}


@dataclass(frozen=True)
class Extras:
    """What a variant gives `bind` and the optimizer beside strengths and anchors."""

    rates: dict[str, float] = field(default_factory=dict)
    begins: dict[str, int] = field(default_factory=dict)
    l2_sp: dict[str, float] = field(default_factory=dict)
    ema: float | None = None
    radius_rate: float | None = None
    weight_decay: float = 0.0


def extras(case: Case, names: Sequence[str]) -> Extras:
    places = list(enumerate(names))
    return {
        "rates": Extras(rates={name: (1.0, 0.5, 0.1)[index % 3] for index, name in places}),
        "freeze until": Extras(begins={name: STEPS // 3 for index, name in places if index % 3}),
        "l2_sp": Extras(l2_sp={name: 3.0 * (1 - index / len(places)) for index, name in places if name != "gain"}),
        "ema": Extras(ema=0.9),
        "learned": Extras(radius_rate=0.02),
        "weight decay": Extras(weight_decay=0.5),
    }.get(case.variant, Extras())


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
    # Divided before it is added up, as in DeepSpeed's `average_tensor`: in bf16 the order shows.
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
        waiting = extras(case, list(masters)).begins
        total = {name: grad * (step >= waiting.get(name, 0)) for name, grad in total.items()}
        if case.clips:
            norm = float(torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in total.values()])))
            # As DeepSpeed's `unscale_and_clip_grads` has it, 1e-6 included.
            excess = max((norm + 1e-6) / CLIP, 1.0)
            total = {name: grad / excess for name, grad in total.items()}
        return total

    return gradients


class Radius:
    """A learned radius, on whole tensors and in Python's numbers (the equations of `maps_ray.proximity.radii`)."""

    def __init__(self, rate: float) -> None:
        self.rate, self.steps, self.first, self.second, self.value, self.floor = rate, 0, 0.0, 0.0, 0.0, 0.0

    def project(self, tilde: Tensor, theta: Tensor, grad: Tensor, anchor: Tensor) -> Tensor:
        way, back = (tilde - anchor).double(), (theta - anchor).double()
        length = float(way.norm())
        if self.steps == 0:
            self.value = self.floor = length
            self.steps = 1
            return tilde
        gradient = float((grad.double() * back).sum() / back.norm())
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        mean, square = self.first / (1 - 0.9**self.steps), self.second / (1 - 0.999**self.steps)
        self.steps += 1
        self.value -= self.rate * mean / (square**0.5 + 1e-8)
        self.value = min(max(self.value, self.floor), max(length, self.floor))
        return (anchor + min(1.0, self.value / length) * way).float()


def reference(case: Case, gradients: Callable[[int, Mapping[str, Tensor]], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The fp32 masters after all steps of the plain rule on whole tensors; their average, where a case keeps one."""
    model = build(case)
    masters = {name: parameter.detach().float().clone() for name, parameter in trained(model).items()}
    moments = {name: Moments(torch.zeros_like(w), torch.zeros_like(w)) for name, w in masters.items()}
    strength_of, anchor_of = strengths(case, model), anchors(case, model)
    lr_of, more = learning_rates(case, list(masters)), extras(case, list(masters))
    radii = {name: Radius(more.radius_rate or 0.0) for name in masters if strength_of[name] > 0 and more.radius_rate}
    averages = dict(masters)
    for step in range(STEPS):
        for name, grad in gradients(step, masters).items():
            theta, anchor = masters[name], anchor_of[name]
            anchor = torch.zeros_like(theta) if anchor is None else anchor.float()
            if step >= more.begins.get(name, 0):
                lr = lr_of[name] * more.rates.get(name, 1.0)
                decayed = theta - lr * more.l2_sp.get(name, 0.0) * (theta - anchor)
                decayed = decayed * (1 - lr * more.weight_decay)
                tilde = adam_step(decayed, grad, moments[name], lr, BETAS, EPS)
                if name in radii:
                    masters[name] = radii[name].project(tilde, theta, grad, anchor)
                else:
                    masters[name], _ = project(tilde, theta, grad, anchor, strength_of[name])
            if more.ema is not None:
                averages[name] = more.ema * averages[name] + (1 - more.ema) * masters[name]
    return masters if more.ema is None else averages
