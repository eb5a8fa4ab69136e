"""What a run needs on which device, what to change where it does not fit, and how long it takes."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from maps_ray.devices import GIB, Device
from maps_ray.metrics import SAMPLES_PER_SECOND
from maps_ray.run_copies import address_of
from maps_ray.spec import LoraSpec, Problem, RunSpec, SpecError, load_spec
from maps_ray.tracking.spool import read_history
from maps_ray.training.planning.subject import Subject, read_subject
from maps_ray.training.planning.terms import BUCKET, MAX_LIVE, Setup, Term, needed, terms

UTILISATION = 0.2
"""Share of a device's peak that the published runs of these models come to; see docs/sizing.md."""
RESERVED = GIB
"""Bytes of a GPU for the CUDA context, NCCL and workspaces."""
MARGIN = 0.05
"""Share of a GPU's memory that a plan leaves free, for what lies between tensors."""
_PROPOSALS = 4


@dataclass(frozen=True)
class Choice:
    """Settings of a spec that decide about memory, and what one rank then needs."""

    setup: Setup
    batch: int
    checkpointing: bool
    lora: int | None
    """Rank of the adapters."""
    terms: list[Term]
    hardware_flops: float
    """Of one sample, forward and backward, with what is computed again."""

    @property
    def device_bytes(self) -> int:
        return needed(self.terms)

    @property
    def host_bytes(self) -> int:
        return needed(self.terms, host=True)

    def fits(self, device: Device) -> bool:
        """Whether a GPU holds it, with what is reserved and a margin."""
        return self.device_bytes + RESERVED <= (1 - MARGIN) * device.memory


@dataclass(frozen=True)
class Measured:
    """The pace of a run that was made."""

    run: str
    samples_per_second: float
    """Of one worker."""
    workers: int


@dataclass(frozen=True)
class Verdict:
    """The run on one kind of device."""

    device: Device
    fits: bool
    proposals: list[tuple[dict[str, object], Choice]]
    """Changed fields -> what is then needed; each fits. Fewest changes first."""
    samples_per_second: float
    seconds: float
    gpu_hours: float


@dataclass(frozen=True)
class Plan:
    """All that `maps-ray plan` says."""

    spec: RunSpec
    subject: Subject
    ranks: int
    stages: dict[int, Choice]
    """The spec's run under each ZeRO stage."""
    verdicts: list[Verdict]
    model_flops: float
    """Of one sample, forward and backward, nothing computed twice."""
    utilisation: float
    measured: Measured | None = None
    assumptions: list[str] = field(default_factory=list)

    @property
    def chosen(self) -> Choice:
        """As the spec says."""
        return self.stages[self.spec.training.zero_stage]


def make_plan(
    spec: RunSpec,
    devices: Sequence[Device],
    *,
    ranks: int | None = None,
    utilisation: float = UTILISATION,
    measured: Path | None = None,
) -> Plan:
    """Plans a run.

    Args:
        spec: of the run; files that it names may be missing.
        devices: kinds of GPU to hold it against.
        ranks: GPUs; none takes `cluster.workers`.
        utilisation: share of a device's peak, in (0, 1].
        measured: folder of a run of the same policy, whose pace is taken in place of the utilisation.

    Raises:
        SpecError: a checkpoint's configuration that cannot be used, or no record in `measured`.
    """
    subject = read_subject(spec)
    pace = read_pace(measured) if measured is not None else None
    count = ranks or spec.cluster.most_workers
    planner = _Planner(subject, count)
    training = spec.training
    stages = {stage: planner.choice(stage, training.batch_size, training.gradient_accumulation) for stage in (1, 2, 3)}
    plain = subject.profile(training.batch_size)
    # With checkpointing, the second forward pass is no work of the model's.
    flops = plain.flops / plain.batch
    model_flops = flops - planner.again(subject)
    verdicts = []
    for device in devices:
        fits = stages[training.zero_stage].fits(device)
        rate = count * (
            pace.samples_per_second if pace is not None else utilisation * device.peak_flops(training.precision) / flops
        )
        samples = training.max_steps * count * training.batch_size * training.gradient_accumulation
        seconds = samples / rate
        proposals = [] if fits else planner.proposals(device)
        verdicts.append(Verdict(device, fits, proposals, rate, seconds, seconds * count / 3600))
    return Plan(spec, subject, count, stages, verdicts, model_flops, utilisation, pace, _assumptions(subject, pace))


def rank_needs(spec: RunSpec, ranks: int, *, cpu: bool) -> str:
    """What a rank needs and the largest parts of it, in words.

    Args:
        spec: of a run.
        ranks: workers.
        cpu: whether it runs on CPUs, where everything is in the machine's memory and buffers count as they are filled.

    Raises:
        SpecError: as `make_plan`.
    """
    training = spec.training
    planner = _Planner(read_subject(spec), ranks, cpu)
    choice = planner.choice(training.zero_stage, training.batch_size, training.gradient_accumulation)
    device = sorted((term for term in choice.terms if cpu or not term.host), key=lambda term: -term.bytes)
    parts = ", ".join(f"{term.name} {term.bytes / GIB:.3g}" for term in device[:5])
    total = choice.device_bytes + (choice.host_bytes if cpu else 0)
    return f"a rank needs {total / GIB:.3g} GiB at its worst moment ({parts})"


class _Planner:
    """Needs of the spec's run and of variants of it."""

    def __init__(self, subject: Subject, ranks: int, cpu: bool = False) -> None:
        self._ranks = ranks
        self._cpu = cpu
        training = subject.spec.training
        self._own = (subject.spec.model.lora is not None, training.activation_checkpointing)
        self._subjects = {self._own: subject}
        self._subject = subject

    def choice(
        self, stage: int, batch: int, accumulation: int, *, checkpointing: bool = False, lora: bool = False
    ) -> Choice:
        """What these settings need; checkpointing and LoRA that the spec asks for stay."""
        key = (self._own[0] or lora, self._own[1] or checkpointing)
        if key not in self._subjects:
            self._subjects[key] = self._subject.changed(lora=LoraSpec() if lora else None, checkpointing=key[1])
        subject = self._subjects[key]
        training = subject.spec.training
        chosen = training.deepspeed
        setup = Setup(
            stage,
            self._ranks,
            training.precision,
            accumulation,
            fused=training.fused == "auto",
            averaged=training.ema is not None,
            offload=chosen.offload_optimizer is not None,
            offload_weights=stage == 3 and chosen.offload_param is not None,
            bucket=chosen.reduce_bucket_size or BUCKET,
            max_live=MAX_LIVE if chosen.stage3_max_live_parameters is None else chosen.stage3_max_live_parameters,
            lazy=self._cpu,
        )
        one = subject.profile(subject.spec.training.batch_size)
        rank = subject.spec.model.lora.rank if subject.spec.model.lora else None
        parts = terms(subject.counts, setup, subject.activations(batch))
        return Choice(setup, batch, key[1], rank, parts, one.flops / one.batch)

    def again(self, subject: Subject) -> float:
        """Operations of a sample that checkpointing computes twice: the forward pass of the blocks."""
        if not subject.spec.training.activation_checkpointing:
            return 0.0
        spec = subject.spec
        training = spec.training.model_copy(update={"activation_checkpointing": False})
        plain = Subject(
            spec.model_copy(update={"training": training}),
            subject.raw,
            subject.dimensions,
            subject.prompt_tokens,
            subject.stored_dtype,
        )
        return subject.profile(training.batch_size).flops / training.batch_size - plain.profile(1).flops

    def proposals(self, device: Device) -> list[tuple[dict[str, object], Choice]]:
        """Smallest sets of changes with which the run fits a device; adapters only where nothing else helps."""
        for lora in (False,) if self._own[0] else (False, True):
            fitting: list[tuple[dict[str, object], Choice]] = []
            for changes, choice in self._variants(lora):
                smaller = any(earlier.keys() <= changes.keys() for earlier, _ in fitting)
                if not smaller and choice.fits(device):
                    fitting.append((changes, choice))
            if fitting:
                return fitting[:_PROPOSALS]
        return []

    def _variants(self, lora: bool) -> Iterator[tuple[dict[str, object], Choice]]:
        """Changed fields and what they come to, fewest changes first; the global batch stays."""
        training = self._subject.spec.training
        stages = range(training.zero_stage, 4)
        checkpointing = (False,) if self._own[1] else (False, True)
        batches = [size for size in range(training.batch_size, 0, -1) if training.batch_size % size == 0]
        variants = []
        for stage, again, batch in itertools.product(stages, checkpointing, batches):
            passes = training.gradient_accumulation * training.batch_size // batch
            changes: dict[str, object] = {}
            if lora:
                changes["model.lora.rank"] = LoraSpec().rank
            if again:
                changes["training.activation_checkpointing"] = True
            if stage != training.zero_stage:
                changes["training.zero_stage"] = stage
            if batch != training.batch_size:
                changes |= {"training.batch_size": batch, "training.gradient_accumulation": passes}
            if changes:
                variants.append((len(changes), changes, (stage, batch, passes, again)))
        # Stable: of equally many changes those come first in which `product` stays nearest to the spec.
        for _, changes, (stage, batch, passes, again) in sorted(variants, key=lambda variant: variant[0]):
            yield changes, self.choice(stage, batch, passes, checkpointing=again, lora=lora)


def read_pace(folder: Path) -> Measured:
    """The pace of a run: the median over the second half of its steps.

    Raises:
        SpecError: no run, or none that has recorded its pace.
    """
    try:
        rates = read_history(folder).metrics.get(SAMPLES_PER_SECOND, [])
        workers = load_spec(folder / "spec.yaml").cluster.most_workers
    except (OSError, SpecError) as error:
        raise SpecError([Problem("--measured", str(folder), f"no run can be read there: {error}")]) from None
    if not rates:
        raise SpecError([Problem("--measured", str(folder), "the run has recorded no step yet")])
    rate = statistics.median(value for _, value in rates[len(rates) // 2 :])
    return Measured(address_of(folder) or str(folder), rate / workers, workers)


def _assumptions(subject: Subject, measured: Measured | None) -> list[str]:
    said = list(subject.assumptions)
    said.append(
        "memory is that of tensors under DeepSpeed 0.19 with the spec's buckets, attention by torch's fused kernels; "
        f"{RESERVED / GIB:.0f} GiB of a GPU go to the CUDA context, NCCL and workspaces, and {MARGIN:.0%} stays free"
    )
    if subject.counts.without_gradient:
        said.append(
            f"{subject.counts.without_gradient / 1e6:,.0f} M trained parameters get no gradient; they take masters, "
            "moments and anchors all the same"
        )
    if measured is not None:
        said.append(
            f"the pace is that of {measured.run} on {measured.workers} worker(s), {measured.samples_per_second:.3g} "
            "samples/s each: of the same policy and the same device, and more workers are as fast each"
        )
    else:
        said.append(
            "time follows from operations at a share of the device's peak; data, evaluation and checkpoints never "
            "hold training up, and communication is in the utilisation"
        )
    return said
