"""Trains a spec and variants of it one after the other, and puts them side by side."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from maps_ray.reports.comparison_report import write_report
from maps_ray.reports.records import Comparison, RunRecord, StrengthRow
from maps_ray.reports.table import as_data, print_table
from maps_ray.run_copies import fetched
from maps_ray.run_storage import run_storage
from maps_ray.spec import RunSpec, load_spec
from maps_ray.spec.credentials import redact
from maps_ray.tracking import Tracker, replay, resolve_uri, ui_command
from maps_ray.training.preflight import check, strengths
from maps_ray.training.run_folder import is_begun
from maps_ray.training.train import train

_BASELINE_NOTE = (
    "Both runs start from the same pretrained weights and see the same samples in the same order. "
    "Held-out episodes are of tasks that were trained on; unseen tasks ask for an object that training never picks."
)


def compare(
    spec_path: str | Path,
    overrides: Sequence[str],
    baseline: Sequence[str],
    *,
    label: str = "MAPS",
    baseline_label: str = "no MAPS",
    console: Console | None = None,
    as_json: bool = False,
) -> Path | None:
    """Trains the spec and its baseline, prints the table and writes `report.html` into the spec's run folder.

    A run that is finished is not run again, one that was interrupted is continued.

    Args:
        spec_path: run spec.
        overrides: `field=value`, for both runs.
        baseline: `field=value`, what the baseline changes.
        label: name of the spec's run in table and report.
        baseline_label: name of the baseline.
        console: where to print.
        as_json: print one object, and say all else on the error output.

    Returns:
        the report's path; None when a run was stopped by Ctrl-C: the same command continues it.

    Raises:
        SpecError: one of the specs cannot run, or a run folder belongs to another spec.
        TrainingError: a run failed.
    """
    console = console or Console(stderr=as_json)
    spec = load_spec(spec_path, overrides)
    changed = load_spec(spec_path, [*overrides, *baseline])
    changed = changed.model_copy(update={"name": f"{spec.name}-baseline"})
    runs = {label: spec, baseline_label: changed}
    for run in runs.values():
        check(run)
    for name, run in runs.items():
        console.print(f"[bold]{name}[/bold]: {run.training.max_steps} steps on {run.cluster.most_workers} workers")
        result = train(run, resume=is_begun(run))
        if result.status == "stopped":
            return None
    command = ["maps-ray", "compare", str(spec_path)]
    command += [part for change in baseline for part in ("--against", redact(change))]
    command += [part for change in overrides for part in ("--set", redact(change))]
    folders = {name: _folder(run) for name, run in runs.items()}
    comparison = Comparison(
        title=f"{label} against {baseline_label}",
        runs=[_record(run, folders[name], name) for name, run in runs.items()],
        baseline=baseline_label,
        command=shlex.join(command),
        notes=[_BASELINE_NOTE],
    )
    report = write_report(folders[label] / "report.html", comparison)
    if (storage := run_storage(spec)) is not None:
        storage.upload(report, report.name)
    for folder in folders.values():
        Tracker.open(folder).artifact(report)
        if (missing := replay(folder).missing) is not None:
            print(missing, file=sys.stderr)
    if as_json:
        print(json.dumps({**as_data(comparison), "report": str(report)}, indent=1))
        return report
    print_table(comparison, console)
    command_ui = ui_command(resolve_uri(spec.tracking.uri, spec.cluster.local_storage))
    # Paths may be long, and have brackets, which are rich's markup.
    console.print(f"\nReport: {report}\nAll records, in the MLflow UI:\n  {command_ui}", soft_wrap=True, markup=False)
    return report


def _folder(spec: RunSpec) -> Path:
    """Of a finished run; fetched where it is on an object store."""
    return spec.run_dir if run_storage(spec) is None else fetched(spec.run_place, spec.cluster.scratch, weights=False)


def _record(spec: RunSpec, folder: Path, label: str) -> RunRecord:
    record = RunRecord.read(folder, label)
    record.strengths = [StrengthRow(**row) for row in strengths(spec)]
    return record
