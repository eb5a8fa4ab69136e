"""The body of `maps-ray evaluate`: where results go, what is shown, and how it ends."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from maps_ray.evaluation.rollouts import tables
from maps_ray.evaluation.rollouts.checkpoint import read_facts
from maps_ray.evaluation.rollouts.plan import RolloutError, RolloutRequest
from maps_ray.evaluation.rollouts.record import record
from maps_ray.evaluation.rollouts.run import Progress, evaluate
from maps_ray.evaluation.rollouts.statistics import Rate
from maps_ray.evaluation.rollouts.summary import Evaluation, paired_as_json
from maps_ray.exit_codes import failed, stopped
from maps_ray.metrics import success
from maps_ray.models import checkpoint_folder
from maps_ray.run_copies import address_of
from maps_ray.run_storage import RunStorage, StorageError
from maps_ray.spec import Problem, SpecError
from maps_ray.tracking.spool import FOLDER

_LINE_S = 10.0


@dataclass(frozen=True)
class Options:
    """What the command line says besides the request."""

    checkpoint: Path
    against: Path | None = None
    out: Path | None = None
    """None: `rollouts/` in the run's folder, also on an object store, or `runs/rollouts/<checkpoint>` for a checkpoint
    that is no run's."""
    workers: int | None = None
    address: str | None = None
    tracking_uri: str | None = None
    as_json: bool = False


def run(options: Options, request: RolloutRequest) -> None:
    """Evaluates, prints the tables and records them.

    Raises:
        SpecError: bad input.
        typer.Exit: 1 when the episodes cannot be completed, 130 after Ctrl-C.
    """
    outs: dict[Path, Path] = {}
    try:
        # Both are checked before the first one runs for an hour.
        outs |= {path: _out(options, path, request) for path in (options.checkpoint, options.against) if path}
        done = {path: _evaluate(options, request, path, out) for path, out in outs.items()}
    except (RolloutError, KeyboardInterrupt) as ended:
        # What is finished goes beside the run all the same: any machine goes on from there.
        for out in outs.values():
            _put_back(out)
        if isinstance(ended, RolloutError):
            raise failed(str(ended)) from None
        raise stopped("stopped; the same command goes on from here") from None
    evaluation = done[options.checkpoint]
    other = done.get(options.against) if options.against else None
    pairs = evaluation.against(other) if other else {}
    places = {}
    for path, one in done.items():
        record(one, options.tracking_uri, pairs if one is evaluation else None)
        places[path] = _put_back(one.out)
    if options.as_json:
        report = {**evaluation.as_json(), "out": places[options.checkpoint]}
        if other:
            report["against"] = {**other.as_json(), "paired": paired_as_json(pairs)}
        typer.echo(json.dumps(report, indent=1))
        return
    console = Console()
    for one in done.values():
        for name in one.by_change():
            console.print(tables.tasks(one, name))
        console.print(tables.rates(one))
        if len(one.dimensions()) > 1:
            console.print(tables.dimensions(one))
        for name in one.suites:
            if (length := one.mean_length(name)) is not None:
                console.print(f"{name}: {length} instructions in a row")
            count, missing = one.left_out(name)
            if count:
                console.print(
                    f"{name}: {count} of {len(one.suites[name].tasks)} tasks did not run: {missing}", style="yellow"
                )
        _say_overall(console, one)
    if other:
        console.print(tables.comparison(pairs, other.checkpoint))
        for name, pair in pairs.items():
            if (warning := pair.warning()) is not None:
                console.print(f"{name}: {warning}", style="yellow")
    console.print(f"episodes, tables and videos: {', '.join(places.values())}")


def _say_overall(console: Console, evaluation: Evaluation) -> None:
    metrics = evaluation.metrics()
    same, other = metrics.get(success("id")), metrics.get(success("ood"))
    if same is not None and other is not None:
        console.print(f"in distribution {same:.1%}, out of distribution {other:.1%} (means over suites)")


def _evaluate(options: Options, request: RolloutRequest, checkpoint: Path, out: Path) -> Evaluation:
    with _Show(checkpoint.name) as show:
        return evaluate(checkpoint, request, out, workers=options.workers, on_progress=show, address=options.address)


def _put_back(out: Path) -> str:
    """Puts the results beside the run, where that is on an object store; returns where they are.

    Raises:
        typer.Exit: the store does not take them.
    """
    address = address_of(out)
    if address is None:
        return str(out)
    storage = RunStorage(address)
    try:
        for path in sorted(out.rglob("*")):
            name = path.relative_to(out)
            # What this machine has sent to MLflow is its own affair.
            if path.is_file() and name.parts[0] != FOLDER:
                storage.upload(path, name.as_posix())
    except StorageError as error:
        raise failed(f"{error}; the results are in {out}, and the same command puts them beside the run") from None
    return address


def _out(options: Options, checkpoint: Path, request: RolloutRequest) -> Path:
    """The folder of a checkpoint's episodes; another way to read the same checkpoint has a folder of its own."""
    facts = read_facts(checkpoint, request)
    if options.out is not None and options.against is None:
        return options.out
    conditions = [facts.identity(), request.seed, request.max_steps, request.rows, request.threads]
    digest = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:8]
    folder = checkpoint_folder(checkpoint).resolve()
    run_folder = folder.parent if folder.name == "final" else None
    if options.out is not None:
        return options.out / f"{(run_folder or folder).name}-{digest}"
    if run_folder is not None:
        return run_folder / "rollouts" / digest
    return Path("runs") / "rollouts" / f"{folder.name}-{digest}"


class _Show:
    """Episodes done, rate so far, time left: a bar in a terminal, lines in a log."""

    def __init__(self, title: str) -> None:
        console = Console(stderr=True)
        self._plain = not console.is_terminal
        self._title = title
        self._last = 0.0
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=self._plain,
        )
        self._task = self._bars.add_task(f"{title}: starting", total=None, rate="")

    def __enter__(self) -> _Show:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, progress: Progress) -> None:
        rate = f"success {Rate(progress.successes, progress.done)}" if progress.done else ""
        self._bars.update(self._task, completed=progress.done, total=progress.total, rate=rate, description=self._title)
        now = time.monotonic()
        if self._plain and (now - self._last > _LINE_S or progress.done == progress.total):
            print(f"{self._title}: episode {progress.done}/{progress.total}  {rate}", file=sys.stderr, flush=True)
            self._last = now


def split_names(values: list[str]) -> tuple[str, ...]:
    """`["a,b", "c"]` -> `("a", "b", "c")`."""
    return tuple(name.strip() for value in values for name in value.split(",") if name.strip())


def split_numbers(value: str | None) -> tuple[int, ...] | None:
    """`"0,3"` -> `(0, 3)`; None and `all` mean all.

    Raises:
        SpecError: anything else.
    """
    if value is None or value == "all":
        return None
    try:
        return tuple(int(number) for number in value.split(","))
    except ValueError:
        raise SpecError([Problem("--tasks", value, "must be 'all', or indices like 0,3")]) from None
