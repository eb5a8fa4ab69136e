"""The folder of a sweep: who may write it, and with which spec."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from maps_ray.spec import Problem, RunSpec, SpecError, dump, parse, read_dumped
from maps_ray.spec.sweep_spec import SweepSpec
from maps_ray.sweeps.journal import Ended, Journal
from maps_ray.sweeps.plan import Plan, baselines, make_plan
from maps_ray.sweeps.space import Space, load_space
from maps_ray.training.run_folder import read_json, write_atomically, write_json

SPEC_FILE = "sweep.json"
BASE_FILE = "base.yaml"
SPACE_FILE = "space.yaml"
ENDED_FILE = "ended.json"
KEPT, GIVEN = "kept", "given"
"""In a trial's folder: copies of its checkpoints that others may go on from, and one that it goes on from itself."""
# What may differ when a sweep goes on: how much of it is done, and how it is recorded and spread.
_MAY_CHANGE = (
    *("num_samples", "merge.num_samples", "time_budget_s", "worker_hours", "max_concurrent", "callbacks"),
    *("seconds_per_step", "measured_run", "base: cluster.", "base: tracking.uri", "base: tracking.credentials"),
)

_PLANS: dict[Path, Plan] = {}


def begin_folder(plan: Plan, resume: bool) -> None:
    """Makes the folder, or checks that it holds this very sweep.

    Raises:
        SpecError: it exists and `resume` is false; there is nothing to resume; or the specs differ, with each
            difference.
    """
    folder = plan.folder
    started = (folder / SPEC_FILE).is_file()
    if started and not resume:
        message = f"{folder} exists already; continue that sweep with --resume {plan.spec.name}, or choose another name"
        raise SpecError([Problem("name", plan.spec.name, message)])
    if resume and not started:
        raise SpecError([Problem("--resume", plan.spec.name, f"nothing to resume: {folder / SPEC_FILE} is missing")])
    spec = plan.spec
    if started:
        earlier = read_spec(folder)
        now = _content(spec, plan.base, plan.space)
        before = _content(earlier, read_base(folder), read_space(folder))
        # A sweep that goes on by its name was read from this folder: the files it came from stay on record.
        spec = spec.model_copy(update={"base": earlier.base, "overrides": earlier.overrides, "space": earlier.space})
        problems = [
            Problem(
                field,
                now.get(field),
                f"the sweep was started with {before.get(field)!r}; set it back, or start another",
            )
            for field in sorted(before.keys() | now.keys())
            if before.get(field) != now.get(field) and not field.startswith(_MAY_CHANGE)
        ]
        if problems:
            raise SpecError(problems)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError([Problem("base: cluster.storage", str(folder.parent), f"cannot be written: {error}")]) from None
    write_atomically(folder / BASE_FILE, dump(plan.base))
    write_atomically(folder / SPACE_FILE, yaml.safe_dump(plan.space.spec.model_dump(mode="json", exclude_none=True)))
    chosen = baselines(plan.spec.space) if spec.baselines else {}
    write_atomically(folder / "baselines.yaml", yaml.safe_dump({name: chosen[name] for name in spec.baselines}))
    # Sweeps from before they ran on Ray Tune said it in the journal alone.
    for ended in Journal(folder).ended.values():
        if not (folder / "trials" / ended.trial / ENDED_FILE).exists():
            write_ended(folder / "trials" / ended.trial, ended)
    # Last: it is what makes the folder a sweep's.
    write_json(folder / SPEC_FILE, spec.model_dump(mode="json"))
    _PLANS[folder] = plan


def plan_of(folder: Path) -> Plan:
    """The plan of a sweep's folder: the one that this process runs, else one made from the folder's own copies."""
    if folder not in _PLANS:
        _PLANS[folder] = make_plan(spec_of_copies(folder))
    return _PLANS[folder]


def spec_of_copies(folder: Path) -> SweepSpec:
    """The sweep's spec with the folder's copies of base and space: what they were made from may have been edited."""
    spec = read_spec(folder)
    copies = {"base": folder / BASE_FILE, "overrides": (), "space": [str(folder / SPACE_FILE)] if spec.space else []}
    return spec.model_copy(update=copies)


def find_sweep(name: str, storage: Path | None = None) -> Path:
    """The folder of a sweep, by its path or by its name under `storage`, which is `runs` by default.

    Raises:
        SpecError: there is none.
    """
    candidates = [Path(name), (storage or Path("runs")) / name]
    found = next((path for path in candidates if (path / SPEC_FILE).is_file()), None)
    if found is None:
        message = f"no sweep there: neither {candidates[0]} nor {candidates[1]} holds {SPEC_FILE}; give the folder"
        raise SpecError([Problem("NAME", name, message)])
    return found.resolve()


def read_spec(folder: Path) -> SweepSpec:
    """The sweep spec that a folder was started with."""
    return parse(SweepSpec, read_json(folder / SPEC_FILE))


def read_base(folder: Path) -> RunSpec:
    """The base that a folder's trials start from, the sweep's overrides included."""
    return read_dumped(folder / BASE_FILE)


def read_space(folder: Path) -> Space:
    """The space that a folder's sweep searches."""
    return load_space(spec_of_copies(folder).space)


def write_ended(run_dir: Path, ended: Ended) -> None:
    """Puts how a trial ended into its folder too, for whoever is asked for it again."""
    run_dir.mkdir(parents=True, exist_ok=True)
    facts = {"status": ended.status, "step": ended.step, "values": ended.values, "error": ended.error}
    write_json(run_dir / ENDED_FILE, facts)


def copy_folder(folder: Path, to: Path) -> None:
    """A folder of files again; hard links where the storage has them. Complete, or not there."""
    partial = to.with_name(f".{to.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for path in folder.iterdir():
        try:
            os.link(path, partial / path.name)
        except OSError:
            shutil.copyfile(path, partial / path.name)
    partial.rename(to)


def give_copy(folder: Path, kept: Path, trial: str) -> None:
    """Puts a copy of a checkpoint beside a trial's own, to go on from; who kept it may not keep it so long."""
    given = folder / "trials" / trial / GIVEN
    shutil.rmtree(given, ignore_errors=True)
    copy_folder(kept, given / kept.name)


def drop_copies(folder: Path) -> None:
    """Removes the copies of checkpoints, when no trial can go on from one any more."""
    for name in (KEPT, GIVEN):
        for path in (folder / "trials").glob(f"*/{name}"):
            shutil.rmtree(path, ignore_errors=True)


def append_line(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _content(spec: SweepSpec, base: RunSpec, space: Space) -> dict[str, Any]:
    own = _flat({k: v for k, v in spec.model_dump(mode="json").items() if k not in ("base", "overrides", "space")})
    own |= _flat(space.spec.model_dump(mode="json"), "space")
    return own | {f"base: {field}": value for field, value in _flat(base.model_dump(mode="json")).items()}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for name, part in value.items() for k, v in _flat(part, f"{prefix}.{name}".lstrip(".")).items()}
