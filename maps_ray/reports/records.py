"""What a comparison of runs is made of: plain data, readable back from a run's folder without MLflow."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import yaml

from maps_ray.reports.rollouts import RolloutRecord
from maps_ray.tracking.spool import read_history

if TYPE_CHECKING:
    from maps_ray.proximity.schedule import StrengthRow as StrengthFields
    from maps_ray.training.run_folder import EvaluationEntry, SplitErrors

OVERALL = "action"
"""The part that stands for the whole action."""
SPLITS = ("held_out", "ood")
_ENDING = "_l1"


@dataclass(frozen=True)
class EpisodeError:
    """Mean action error over the samples of one episode."""

    episode: str
    errors: Mapping[str, float]
    """Per part of the action; at least `action`."""
    samples: int = 1


@dataclass(frozen=True)
class SplitResult:
    """Action errors on one split: mean absolute errors of normalised actions, over the predicted chunk."""

    split: str
    """`held_out` (in distribution) or `ood`."""
    samples: int
    errors: Mapping[str, float]
    """Per part (`action` for the whole, `position`, `rotation`, `gripper`), over all samples."""
    tasks: Mapping[str, float] = field(default_factory=dict)
    """Task's sentence to its error over the whole action."""
    episodes: tuple[EpisodeError, ...] = ()


@dataclass(frozen=True)
class StrengthRow:
    """One layer of the stack and how strongly it is held."""

    module: str
    strength: float
    tensors: int
    parameters: int
    frozen: bool = False
    """Its weights never change."""
    strengths: dict[str, int] = field(default_factory=dict)
    """Strength -> number of tensors, where they differ."""
    frozen_tensors: int = 0
    """How many of its tensors never change, where others do."""


@dataclass
class RunRecord:
    """One run, as a report shows it. Everything but the name may be missing; the report leaves that part out."""

    name: str
    label: str
    spec: dict[str, object] = field(default_factory=dict)
    metrics: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """Per name the (step, value) pairs by rising step."""
    evaluations: dict[str, SplitResult] = field(default_factory=dict)
    """By split."""
    rollouts: RolloutRecord | None = None
    """The last ones; None for a run without."""
    strengths: list[StrengthRow] = field(default_factory=list)
    """In stack order."""
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds."""
    environment: dict[str, str] = field(default_factory=dict)
    status: str = "RUNNING"
    started: int | None = None
    """Milliseconds since 1970."""
    command: str | None = None
    """The command line that starts this run again."""

    @classmethod
    def read(cls, run_dir: str | Path, label: str | None = None) -> RunRecord:
        """Reads a run from its folder: the spool, `spec.yaml`, `evaluation.json` and, if there, `strengths.json`.

        Args:
            label: how the report names it; the run's name by default.

        Raises:
            FileNotFoundError: no run was begun there.
            ValueError: one of the files is damaged; names it.
        """
        run_dir = Path(run_dir)
        history = read_history(run_dir)
        evaluations = cast("list[EvaluationEntry]", _read(run_dir / "evaluation.json") or [])
        strengths = cast("list[StrengthFields]", _read(run_dir / "strengths.json") or [])
        environment = history.artifacts.get("environment.json")
        timings = {}
        if history.end_time is not None:
            timings["whole run"] = (history.end_time - history.identity.start_time) / 1000
        spec = run_dir / "spec.yaml"
        return cls(
            name=history.identity.run_name,
            label=label or history.identity.run_name,
            spec=cast(dict[str, object], _read(spec) or {}),
            metrics=history.metrics,
            evaluations=parse_evaluation(evaluations[-1]["splits"]) if evaluations else {},
            rollouts=RolloutRecord.read(run_dir),
            strengths=[StrengthRow(**row) for row in strengths],
            timings=timings,
            environment=cast(dict[str, str], (_read(environment) if environment else None) or {}),
            status=history.status,
            started=history.identity.start_time,
            command=f"maps-ray train {shlex.quote(_short(spec))} --set name={history.identity.run_name}-again",
        )

    def section(self, name: str) -> dict[str, object]:
        """A section of its spec; empty where it is not known."""
        section = self.spec.get(name)
        return section if isinstance(section, dict) else {}

    def last(self, metric: str) -> float | None:
        """The metric's value at its last step."""
        points = self.metrics.get(metric)
        return points[-1][1] if points else None


@dataclass
class Comparison:
    """Runs side by side; differences are taken against the run labelled `baseline`."""

    title: str
    runs: list[RunRecord]
    baseline: str
    command: str | None = None
    """The command line that makes the whole comparison again."""
    notes: list[str] = field(default_factory=list)
    """Paragraphs that say what was compared."""

    def __post_init__(self) -> None:
        labels = [run.label for run in self.runs]
        if len(set(labels)) < len(labels):
            raise ValueError(f"two runs of the comparison have the same label: {', '.join(labels)}")
        if self.baseline not in labels:
            raise ValueError(f"baseline {self.baseline!r} is none of the runs: {', '.join(labels)}")

    @property
    def baseline_run(self) -> RunRecord:
        return next(run for run in self.runs if run.label == self.baseline)


def parse_evaluation(splits: Mapping[str, SplitErrors]) -> dict[str, SplitResult]:
    """Results of one evaluation, split by split.

    Args:
        splits: split -> result; in those of earlier versions an episode has one number, the error of the whole action.
    """
    return {
        split: SplitResult(
            split=split,
            samples=result["samples"],
            errors=_errors(result),
            tasks=result.get("tasks", {}),
            episodes=tuple(_episode(index, value) for index, value in result.get("episodes", {}).items()),
        )
        for split, result in splits.items()
    }


def _errors(result: Mapping[str, object]) -> dict[str, float]:
    errors = {name.removesuffix(_ENDING): value for name, value in result.items() if name.endswith(_ENDING)}
    return cast(dict[str, float], errors)


def _episode(index: str, value: float | Mapping[str, float]) -> EpisodeError:
    if isinstance(value, Mapping):
        return EpisodeError(index, _errors(value), int(value.get("samples", 1)))
    return EpisodeError(index, {OVERALL: value})


def _read(path: Path) -> object:
    """The content of a YAML or JSON file; None when there is no such file."""
    try:
        text = path.read_text(encoding="utf-8")
        return yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None


def _short(path: Path) -> str:
    """Relative to the working directory where it lies below it."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
