"""Collects demonstrations of the scripted expert in LIBERO as a LeRobotDataset v3.0."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from maps_ray.data.errors import DatasetError
from maps_ray.evaluation.experts.collect import Tally, collect
from maps_ray.evaluation.simulators import SimulatorMissing
from maps_ray.evaluation.simulators.workers import WorkerDied

EXAMPLES = """
Examples:

    python jobs/collect.py --suite libero_object --episodes 8 --out demos

    python jobs/collect.py --suite libero_spatial --tasks 0,2,7 --episodes 4 --out demos --workers 1

The second command appends to what the first wrote. After Ctrl-C, the same command goes on where it stopped.
Needs the simulator: pip install maps_ray\\[libero], apt-get install libosmesa6.
"""


def main(
    out: Annotated[Path, typer.Option(help="Data set folder; created, or continued.")],
    suite: Annotated[str, typer.Option(help="libero_object, libero_spatial, libero_goal, libero_10 or libero_90.")],
    tasks: Annotated[str, typer.Option(help="'all', or indices separated by commas.")] = "all",
    episodes: Annotated[int, typer.Option(min=1, help="Successful episodes of each task.")] = 8,
    workers: Annotated[int, typer.Option(min=1, help="Processes, about 1.8 GB each.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise in the actions.")] = 0,
) -> None:
    try:
        chosen = None if tasks == "all" else [int(task) for task in tasks.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{tasks!r} is neither 'all' nor like 0,2,7", param_hint="--tasks") from None
    tallies: list[Tally] = []
    try:
        with Progress() as progress:
            bar = progress.add_task(suite, total=None)
            for tallies in collect(out, suite, chosen, episodes, workers=workers, seed=seed):
                done = sum(tally.successes for tally in tallies)
                progress.update(bar, completed=done, total=episodes * len(tallies))
    except (SimulatorMissing, WorkerDied, DatasetError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    table = Table("task", "episodes", "attempts", "success")
    for tally in tallies:
        rate = f"{tally.successes / tally.attempts:.0%}" if tally.attempts else "-"
        table.add_row(tally.task.replace("_", " "), str(tally.successes), str(tally.attempts), rate)
    Console().print(table)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(help=__doc__, epilog=EXAMPLES)(main)
    app()
