"""What a sweep runs: its plan, its schedules, the run of each trial; names and numbers that tell schedules apart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Literal, TypedDict, cast

from maps_ray.metrics import SAMPLES_PER_SECOND
from maps_ray.models import ModelInfo
from maps_ray.proximity.schedule import frozen_layers, layer_strengths
from maps_ray.proximity.stack import StackLayer
from maps_ray.run_copies import fetched
from maps_ray.spec import ProximitySpec, RunSpec, parse
from maps_ray.spec.sweep_spec import SweepSpec
from maps_ray.sweeps.space import (
    BASELINE_SECTIONS,
    MergeFields,
    MergeSpace,
    Point,
    ScheduleFields,
    Space,
    Value,
    baselines,
    with_fields,
)
from maps_ray.tracking.spool import read_history
from maps_ray.tracking.store import resolve_uri
from maps_ray.training.preflight import model_info, training_rules

Source = Literal["known", "baseline", "searched", "merged"]
TRIED = ("known", "searched")
"""Sources of schedules that a scheduler judges, and that say what a module's place and strength do."""
_LETTERS = {"language_early": "E", "language_late": "L"}


@dataclass(frozen=True)
class Schedule:
    """One schedule of a sweep."""

    number: int
    source: Source
    label: str
    """The baseline's name, the code of the order, or `merged`."""
    proximity: ScheduleFields
    """What it changes in the base."""
    point: Point | None = None
    """Where the searcher has it; None where the space does not hold it."""
    same_as: int | None = None
    """An earlier schedule with the same strengths, whose result counts for this one too."""

    @property
    def tag(self) -> str:
        """What its trials are called, without the seed."""
        return self.label if self.source == "baseline" else f"{self.label}-{self.number:03d}"


@dataclass(frozen=True)
class ResolvedSchedule:
    """What a schedule means for a model, module by module; modules are the finest that the stack names."""

    code: str
    positions: Mapping[str, int] = field(default_factory=dict)
    """Module -> its place in the order, 1 for the one held most."""
    strengths: Mapping[str, float] = field(default_factory=dict)
    """Module -> mean strength of its layers."""
    frozen: tuple[str, ...] = ()
    merge: MergeFields = field(default_factory=MergeFields)
    """Of merged weights: what was merged and how."""

    def params(self) -> dict[str, object]:
        """As MLflow parameters."""
        params: dict[str, object] = {"order_code": self.code}
        params |= {f"merge_{name}": value for name, value in self.merge.items() if name != "weights"}
        params |= {f"merge_{module}": round(value, 6) for module, value in self.merge.get("weights", {}).items()}
        params |= {f"pos_{module}": place for module, place in self.positions.items()}
        return params | {f"lambda_{module}": round(value, 6) for module, value in self.strengths.items()}


def resolve_schedule(stack: Sequence[StackLayer], proximity: ProximitySpec) -> ResolvedSchedule:
    """What a schedule means for a model.

    Raises:
        ScheduleError: it does not fit the stack.
    """
    strengths = layer_strengths(stack, proximity)
    frozen = frozen_layers(stack, proximity.freeze)
    members: dict[str, list[str]] = {}
    names: dict[str, tuple[str, ...]] = {}
    for layer in stack:
        if layer.pretrained:
            members.setdefault(layer.modules[-1], []).append(layer.name)
            names[layer.modules[-1]] = layer.modules
    means = {module: fmean(strengths[name] for name in layers) for module, layers in members.items()}
    if proximity.strengths:
        line = sorted(members, key=lambda module: -means[module])
    else:
        line = [module for entry in proximity.order for module in members if entry in names[module]]
    letters = letters_of(list(members))
    return ResolvedSchedule(
        code="".join(letters[module] for module in line),
        positions={module: line.index(module) + 1 for module in members},
        strengths=means,
        frozen=tuple(module for module, layers in members.items() if frozen.issuperset(layers)),
    )


def letters_of(modules: Sequence[str]) -> dict[str, str]:
    """One letter for each module: D, S, P, E, L where the usual names are used."""
    letters: dict[str, str] = {}
    for module in modules:
        wanted = [_LETTERS.get(module, ""), *module.upper(), *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
        letters[module] = next(c for c in wanted if c.isalpha() and c not in letters.values())
    return letters


@dataclass(frozen=True)
class Plan:
    """A checked sweep."""

    spec: SweepSpec
    base: RunSpec
    """With the sweep's name, overrides and workers."""
    space: Space
    info: ModelInfo
    _identities: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def folder(self) -> Path:
        """All that the sweep writes, trials included: `cluster.storage / name`; under an object store, this node's copy
        of it."""
        return self.base.run_dir

    @property
    def tracking_uri(self) -> str:
        return resolve_uri(self.base.tracking.uri, self.base.cluster.local_storage)

    def resolved(self, fields: ScheduleFields) -> ResolvedSchedule:
        """What a schedule means that changes these fields of the base's `proximity`."""
        if "merge" in fields:
            return ResolvedSchedule("merged", merge=fields["merge"])
        return resolve_schedule(self.info.stack, with_fields(self.base.proximity, fields))

    def identity(self, fields: ScheduleFields) -> str:
        """Equal for schedules that train alike, seeds aside: the rules of every tensor, and what else the run is told.

        Raises:
            SpecError: fields of a baseline that do not fit the base.
        """
        key = json.dumps(fields, sort_keys=True)
        if key not in self._identities:
            self._identities[key] = self._identity(fields)
        return self._identities[key]

    def _identity(self, fields: ScheduleFields) -> str:
        if "merge" in fields:
            return json.dumps(fields["merge"], sort_keys=True)
        spec = trial_spec(self.base, self.folder, self.spec.name, self.base.training.seed, fields)
        rules = training_rules(spec, model_info(spec) if "model" in fields else self.info)
        chosen, adapted = spec.proximity, spec.model.lora is not None
        learned = (chosen.radius_rate,) if chosen.shape == "learned" else ()
        anchor = chosen.lora_anchor or {"paper": "zero", "released": "init"}[chosen.recipe] if adapted else None
        # The same strengths, come to in another way (a point, a baseline), differ in their last digits.
        rounded = [{name: round(value, 9) for name, value in part.items()} for part in vars(rules).values()]
        sections = {name: getattr(spec, name).model_dump(mode="json") for name in BASELINE_SECTIONS}
        return json.dumps([rounded, sections, learned, anchor], sort_keys=True)

    def known(self) -> list[Schedule]:
        """The base's order with the strengths of `known_strengths`, the baselines, and the run that is to be merged as
        it is."""
        return list(self._known)

    @cached_property
    def _known(self) -> list[Schedule]:
        schedules: list[Schedule] = []
        for strength in self.spec.known_strengths if self.spec.space else ():
            fields: ScheduleFields = {"lambda_max": strength, "shape": "linear"}
            point = self.space.encode(with_fields(self.base.proximity, fields))
            schedules.append(Schedule(len(schedules), "known", self.resolved(fields).code, fields, point))
        chosen = baselines(self.spec.space)
        for name in self.spec.baselines:
            schedules.append(Schedule(len(schedules), "baseline", name, chosen[name]))
        if self.spec.merge is not None and self.spec.merge.run is not None:
            fields = MergeSpace(self.spec.merge, ()).unmerged()
            schedules.append(Schedule(len(schedules), "merged", "merged", fields))
        return schedules

    def drawn(self, number: int, point: Point, merges: MergeSpace | None = None) -> Schedule:
        """The schedule of a point of the space, or of `merges`."""
        fields = (merges or self.space).decode(point)
        return Schedule(number, "merged" if merges else "searched", self.resolved(fields).code, fields, point)

    def names(self, schedule: Schedule) -> list[str]:
        """Of its trials: one for each seed, and one where a given run is merged."""
        name = schedule.tag
        once = self.spec.seeds == 1 or "run" in schedule.proximity.get("merge", {})
        return [name] if once else [f"{name}-s{index}" for index in range(self.spec.seeds)]

    def seconds_per_step(self) -> float | None:
        """As given, or as an earlier run measured it; None when neither is known."""
        if self.spec.seconds_per_step is not None or self.spec.measured_run is None:
            return self.spec.seconds_per_step
        rates = [value for _, value in read_history(self._measured_run).metrics[SAMPLES_PER_SECOND]]
        training = self.base.training
        samples = self.base.cluster.most_workers * training.batch_size * training.gradient_accumulation
        return samples / sorted(rates)[len(rates) // 2]

    @cached_property
    def _measured_run(self) -> Path:
        run = self.spec.measured_run
        assert run is not None
        return run if isinstance(run, Path) else fetched(run, self.base.cluster.scratch, without="final|rollouts")

    def trial_hours(self) -> float | None:
        """Worker-hours of the steps of one trial; None where the time of a step is not known."""
        seconds = self.seconds_per_step()
        return seconds and seconds * self.base.training.max_steps * self.base.cluster.most_workers / 3600


def trial_spec(base: RunSpec, folder: Path, name: str, seed: int, proximity: ScheduleFields) -> RunSpec:
    """The run of one trial.

    Args:
        base: with the sweep's overrides and workers.
        folder: of the sweep, as its driver has it.
        name: of the trial.
        seed: of the run.
        proximity: what the trial changes.

    Raises:
        SpecError: fields of a baseline that do not fit the base.
    """
    # Beside the sweep's folder, and not by `local_storage`: a trial's actor may have another scratch.
    uri = resolve_uri(base.tracking.uri, folder.parent)
    trials = folder / "trials" if isinstance(base.cluster.storage, Path) else f"{base.run_place}/trials"
    own: dict[str, object] = {
        section: {**getattr(base, section).model_dump(), **proximity.get(section, {})} for section in BASELINE_SECTIONS
    }
    if any(section in proximity for section in BASELINE_SECTIONS):
        # The whole spec is read again: what one section asks for may need another.
        base = parse(RunSpec, {**base.model_dump(), **own})
    return base.model_copy(
        update={
            "name": name,
            "proximity": with_fields(base.proximity, proximity),
            "training": base.training.model_copy(update={"seed": seed}),
            "tracking": base.tracking.model_copy(update={"uri": uri}),
            "cluster": base.cluster.model_copy(update={"storage": trials}),
        }
    )


class TrialFacts(TypedDict):
    """What a trial is, whatever a scheduler makes of its point."""

    name: str
    seed: int
    source: Source
    schedule: int
    """Number of its schedule."""
    proximity: ScheduleFields


TrialConfig = Mapping[str, object]
"""What Ray Tune hands a trial: `TrialFacts` under `trial`, and beside them dimension -> value of its point, for
schedulers change numbers at the top of a configuration and no others."""


def facts_of(config: TrialConfig) -> TrialFacts:
    """The trial's own facts, out of its configuration."""
    return cast(TrialFacts, config["trial"])


def fields_of(config: TrialConfig, space: Space) -> ScheduleFields:
    """What a trial's configuration changes in the base: its point, where it has one, stands above the rest."""
    fields = facts_of(config)["proximity"]
    if "merge" in fields or not all(dimension.name in config for dimension in space.dimensions):
        return fields
    return {**fields, **space.decode(cast(Mapping[str, Value], config))}
