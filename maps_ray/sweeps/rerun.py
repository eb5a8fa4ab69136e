"""A schedule that a sweep found, as a run of its own."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from maps_ray.spec import Problem, RunSpec, SpecError, load_spec, nearest
from maps_ray.spec.paths import escape
from maps_ray.sweeps.folder import find_sweep, read_base, read_spec
from maps_ray.sweeps.journal import Journal
from maps_ray.sweeps.space import BASELINE_SECTIONS, with_fields


def spec_of_trial(path: str, overrides: Iterable[str] = ()) -> RunSpec:
    """The base run spec at its full length, with the schedule of a trial.

    Args:
        path: `NAME/TRIAL`, or the trial's folder.
        overrides: `field=value` changes of the run spec.

    Raises:
        SpecError: no such sweep or trial, or an override that cannot be.
    """
    sweep, _, trial = path.rstrip("/").rpartition("/")
    folder = find_sweep(str(Path(sweep).parent) if Path(sweep).name == "trials" else sweep)
    journal = Journal(folder)
    names = {ended.trial: ended.schedule for ended in journal.ended.values()}
    if trial not in names:
        raise SpecError(
            [Problem("--from-trial", path, f"no ended trial {trial!r} in {folder}; {nearest(trial, names)}")]
        )
    spec, base = read_spec(folder), read_base(folder)
    fields = journal.schedules[names[trial]].proximity
    proximity = with_fields(base.proximity, fields).model_dump(mode="json")
    chosen = [f"proximity.{name}={json.dumps(value)}" for name, value in proximity.items()]
    for section in BASELINE_SECTIONS:
        chosen += [f"{section}.{name}={json.dumps(value)}" for name, value in fields.get(section, {}).items()]
    first = [f"name={spec.name}-{trial}", f"cluster.storage={json.dumps(escape(str(base.cluster.storage)))}", *chosen]
    return load_spec(spec.base, [*first, *overrides])
