"""What the commands `sweep` and `report` do, and what a sweep came to by itself: a schedule as a run of its own (`train
--from-trial`), merged weights as a command."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from maps_ray.spec import Problem, RunSpec, SpecError, load_spec, nearest
from maps_ray.spec.paths import escape
from maps_ray.spec.sweep_spec import load_sweep
from maps_ray.sweeps.folder import SPEC_FILE, find_sweep, read_base, read_spec, source_run, spec_of_copies
from maps_ray.sweeps.journal import Journal
from maps_ray.sweeps.plan import make_plan
from maps_ray.sweeps.schedules import Plan
from maps_ray.sweeps.space import BASELINE_SECTIONS, ScheduleFields, with_fields
from maps_ray.training.mirror import Mirror


def load_plan(path: Path | None, overrides: Sequence[str], resume: str | None, go_on: bool) -> tuple[Plan, bool]:
    """The checked plan, and whether it continues a sweep.

    Args:
        path: sweep spec; none takes the one of the sweep to resume.
        overrides: `field=value` changes of the sweep spec.
        resume: name, folder or address of the sweep to continue.
        go_on: continue the sweep of this spec where it was begun, else begin it.

    Raises:
        SpecError: neither spec nor sweep is given, or the sweep cannot run.
    """
    if path is None and resume is None:
        raise SpecError([Problem("SPEC", None, "give a sweep spec, or --resume NAME")])
    if path is not None:
        plan = make_plan(load_sweep(path, overrides))
        if resume is not None and Path(resume).name != plan.spec.name:
            raise SpecError([Problem("--resume", resume, f"the spec's name is {plan.spec.name!r}")])
        return plan, resume is not None or (go_on and Mirror.of(plan.base).has(SPEC_FILE))
    assert resume is not None
    if overrides:
        raise SpecError([Problem("--set", list(overrides), "give the sweep spec too: only its fields can be changed")])
    folder = find_sweep(resume)
    return make_plan(spec_of_copies(folder)), True


def run_and_report(plan: Plan, resume: bool) -> str | None:
    """Runs the sweep and writes its report; returns where that is, None when the sweep was stopped."""
    from maps_ray.sweeps.driver import run_sweep
    from maps_ray.tracking import ui_command

    written: list[str] = []

    def finish(folder: Path) -> None:
        written.append(Path(write_report_of(str(folder))).name)
        Mirror.of(plan.base).push(*written)

    result = run_sweep(plan, resume, finish=finish)
    if result.status == "stopped":
        print(f"stopped after {result.trials} trials; continue with: maps-ray sweep --resume {_name(plan)}")
        return None
    report = f"{result.place}/{written[0]}"
    print(f"{result.trials} trials ended; report: {report}")
    print(f"All records, in the MLflow UI:\n  {ui_command(plan.tracking_uri)}")
    return report


def write_report_of(name: str, form: Literal["html", "json", "csv"] = "html") -> str:
    """Writes the report of a sweep into its folder and records it, or puts it beside the sweep on its object store;
    returns where it is."""
    from maps_ray.run_storage import RunStorage
    from maps_ray.sweeps.sweep_report import IMPORTANCE_FILE, write_sweep_report
    from maps_ray.tracking import Tracker, replay
    from maps_ray.tracking.spool import Spool

    folder = find_sweep(name)
    report = write_sweep_report(folder, form)
    files = [report, *([folder / IMPORTANCE_FILE] if form == "csv" else [])]
    if "://" in name:
        for file in files:
            RunStorage(name).upload(file, file.name)
        return f"{name.rstrip('/')}/{report.name}"
    if not Spool(folder).exists:
        # A driver that ended before the sweep had a run in MLflow.
        return str(report)
    tracker = Tracker.open(folder)
    for file in files:
        tracker.artifact(file)
    if (missing := replay(folder).missing) is not None:
        print(missing, file=sys.stderr)
    return str(report)


def _name(plan: Plan) -> str:
    """As `--resume` finds it from here."""
    here = Path("runs").resolve() / plan.folder.name
    return shlex.quote(plan.folder.name if here == plan.folder.resolve() else plan.base.run_place)


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
    # Escaped: a dollar sign in a resolved path is none of a variable.
    first = [f"name={spec.name}-{trial}", f"cluster.storage={json.dumps(escape(str(base.cluster.storage)))}", *chosen]
    # The user's own last, so that they win.
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
