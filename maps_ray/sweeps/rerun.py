"""What a sweep found, by itself: a schedule as a run of its own, merged weights as a command."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path

from maps_ray.spec import Problem, RunSpec, SpecError, load_spec, nearest
from maps_ray.spec.paths import escape
from maps_ray.sweeps.folder import find_sweep, place_of, read_base, read_spec
from maps_ray.sweeps.journal import Journal
from maps_ray.sweeps.space import BASELINE_SECTIONS, MergeFields, ScheduleFields, with_fields


def spec_of_trial(path: str, overrides: Iterable[str] = ()) -> RunSpec:
    """The base run spec at its full length, with the schedule of a trial.

    Args:
        path: `NAME/TRIAL`, the trial's folder or its address.
        overrides: `field=value` changes of the run spec.

    Raises:
        SpecError: no such sweep or trial, or an override that cannot be.
    """
    sweep, _, trial = path.rstrip("/").rpartition("/")
    folder = find_sweep(sweep.removesuffix("/trials"))
    journal = Journal(folder)
    names = {ended.trial: ended.schedule for ended in journal.ended.values()}
    if trial not in names:
        raise SpecError(
            [Problem("--from-trial", path, f"no ended trial {trial!r} in {folder}; {nearest(trial, names)}")]
        )
    spec, base = read_spec(folder), read_base(folder)
    fields = journal.schedules[names[trial]].proximity
    if "merge" in fields:
        message = f"is merged, not trained: {merge_command(folder, trial, fields)}"
        raise SpecError([Problem("--from-trial", path, message)])
    proximity = with_fields(base.proximity, fields).model_dump(mode="json")
    chosen = [f"proximity.{name}={json.dumps(value)}" for name, value in proximity.items()]
    for section in BASELINE_SECTIONS:
        chosen += [f"{section}.{name}={json.dumps(value)}" for name, value in fields.get(section, {}).items()]
    first = [f"name={spec.name}-{trial}", f"cluster.storage={json.dumps(escape(str(base.cluster.storage)))}", *chosen]
    return load_spec(spec.base, [*first, *overrides])


def merge_command(folder: Path, trial: str, fields: ScheduleFields) -> str:
    """The command that writes the weights of a merged trial.

    Args:
        folder: of the sweep.
        trial: name of the trial.
        fields: of its schedule.
    """
    run, how = source_run(folder, trial, fields["merge"])
    chosen = (
        [f"--weights {','.join(f'{module}={share!r}' for module, share in how['weights'].items())}"]
        if "weights" in how
        else []
    )
    chosen += [f"--lines {','.join(map(repr, how['lines']))}"] if "lines" in how else []
    return f"maps-ray merge {shlex.quote(run)} {' '.join(chosen)} --out {shlex.quote(f'merged/{trial}')}"


def source_run(folder: Path, trial: str, merge: MergeFields) -> tuple[str, MergeFields]:
    """The run whose weights a trial merges, of several seeds that of its own; and how, as `merge` takes it."""
    how = merge.copy()
    if "run" in how:
        return how.pop("run"), how
    seed = f"-s{trial.rpartition('-s')[2]}" if read_spec(folder).seeds > 1 else ""
    return f"{place_of(folder)}/trials/{how.pop('of')}{seed}", how
