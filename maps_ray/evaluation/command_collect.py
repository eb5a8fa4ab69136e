"""`maps-ray collect`: demonstrations of the scripted experts, or how often they succeed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from maps_ray.exit_codes import failed, stopped
from maps_ray.spec import Problem, SpecError
from maps_ray.spec.paths import output


def collect(
    suite: Annotated[
        str, typer.Option(help="A suite of LIBERO, LIBERO-PRO or Metaworld, for instance libero_object_swap.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", parser=output, help="Data set folder; created, or continued.")
    ] = None,
    episodes: Annotated[int, typer.Option(min=1, help="Successful episodes of each task.")] = 50,
    tasks: Annotated[str, typer.Option(help="'all', or indices separated by commas.")] = "all",
    workers: Annotated[int, typer.Option(min=1, help="Processes, about 1.8 GB each.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise in the actions.")] = 0,
    image_size: Annotated[int, typer.Option(min=32, max=1024, help="Side of the pictures in pixels.")] = 128,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure the expert without cameras; nothing is written.")
    ] = False,
    attempts: Annotated[int, typer.Option(min=1, help="With --dry-run: attempts at each task.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: one object instead of a table.")] = False,
) -> None:
    """Collect demonstrations of a scripted expert as a LeRobotDataset v3.0.

    Attempts start from the suite's recorded initial states in their order. After Ctrl-C, the same command goes on
    where it was; a larger --episodes appends. Needs the extra `libero` or
    `metaworld`, and an OpenGL library (libosmesa6 or libegl1).

    Examples: `maps-ray collect --suite libero_spatial --episodes 50 --out demos`,
    `maps-ray collect --suite libero_goal --tasks 1,4,8 --dry-run`
    """
    if out is None and not dry_run:
        raise SpecError([Problem("--out", None, "name the folder of the data set, or measure with --dry-run")])
    if as_json and not dry_run:
        raise SpecError([Problem("--json", True, "goes with --dry-run")])
    from maps_ray.data.dataset_error import DatasetError
    from maps_ray.evaluation.simulators import SimulatorMissing
    from maps_ray.evaluation.simulators.processes import ProcessDied

    chosen = _indices(tasks)
    try:
        if out is None or dry_run:
            _measure(suite, chosen, attempts, workers, seed, as_json)
        else:
            _collect(out, suite, chosen, episodes, workers, seed, image_size)
    except (DatasetError, SimulatorMissing, ValueError) as error:
        raise SpecError([Problem("", None, str(error))]) from None
    except ProcessDied as error:
        raise failed(f"{error}; the same command goes on where it was") from None
    except KeyboardInterrupt:
        raise stopped("stopped" if dry_run else "stopped; the same command goes on where it was") from None


def _indices(tasks: str) -> list[int] | None:
    if tasks == "all":
        return None
    try:
        return [int(task) for task in tasks.split(",")]
    except ValueError:
        raise SpecError([Problem("--tasks", tasks, "give 'all', or indices such as 0,2,7")]) from None


def _collect(
    out: Path, suite: str, tasks: list[int] | None, episodes: int, workers: int, seed: int, image_size: int
) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress
    from rich.table import Table

    from maps_ray.evaluation.experts.collect import Tally, collect

    tallies: list[Tally] = []
    with Progress(transient=True) as progress:
        bar = progress.add_task(suite, total=None)
        for tallies in collect(out, suite, tasks, episodes, workers=workers, seed=seed, image_size=image_size):
            done = sum(tally.present + tally.successes for tally in tallies)
            progress.update(bar, completed=done, total=episodes * len(tallies))
    table = Table("task", "", "episodes", "new", "attempts", "success", title=escape(f"{suite} in {out}"))
    for column in table.columns[2:]:
        column.justify = "right"
    for tally in tallies:
        rate = f"{tally.successes / tally.attempts:.0%}" if tally.attempts else "-"
        total = tally.present + tally.successes
        table.add_row(
            str(tally.index), tally.task.replace("_", " "), str(total), str(tally.successes), str(tally.attempts), rate
        )
    Console().print(table)
    short = [tally for tally in tallies if tally.present + tally.successes < episodes]
    for tally in short:
        typer.echo(
            f"task {tally.index} has {tally.present + tally.successes} of {episodes} episodes: "
            f"its {tally.initial_states} initial states are used up"
        )


def _measure(suite: str, tasks: list[int] | None, attempts: int, workers: int, seed: int, as_json: bool) -> None:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from maps_ray.evaluation.experts.attempts import Attempt, measure, summarise

    done: list[Attempt] = []
    with Progress(transient=True, console=Console(stderr=True)) as progress:
        bar = progress.add_task(f"{suite}: attempts", total=None)
        for done in measure(suite, tasks, attempts, workers=workers, seed=seed):
            progress.update(bar, completed=len(done))
    if as_json:
        data = {"tasks": [asdict(row) for row in summarise(done)], "failures": [asdict(a) for a in done if a.failure]}
        typer.echo(json.dumps(data, indent=1))
        return
    table = Table("task", "", "attempts", "success", "mean steps", "seconds each", title=f"Scripted expert, {suite}")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in summarise(done):
        steps = f"{row.mean_steps:.0f}" if row.successes else "-"
        rate = f"{row.successes / row.attempts:.0%}"
        table.add_row(
            str(row.task), row.name.replace("_", " "), str(row.attempts), rate, steps, f"{row.mean_seconds:.1f}"
        )
    Console().print(table)
    for attempt in done:
        if attempt.failure:
            typer.echo(f"task {attempt.task}, initial state {attempt.initial_state}: {attempt.failure}")
