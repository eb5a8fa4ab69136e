"""`maps-ray`: the command line. Each command imports what it needs when it runs: `--help` and checks stay quick."""

from __future__ import annotations

import io
import json
import os
import pwd
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from maps_ray.evaluation.command_collect import collect
from maps_ray.evaluation.command_evaluate import evaluate
from maps_ray.exit_codes import FAILED, REFUSED, failed, stopped
from maps_ray.models import EXPORT_FORMATS, CheckpointError, export_policy
from maps_ray.run_copies import fetched_argument, run_argument, run_at
from maps_ray.serving.command_serve import serve
from maps_ray.spec import Problem, RunSpec, SpecError, load_spec
from maps_ray.spec.paths import home, is_address, output
from maps_ray.training.command_init import init
from maps_ray.training.commands import check, checked_spec, plan
from maps_ray.training.run_faults import TrainingError

app = typer.Typer(
    name="maps-ray",
    help="Fine-tune vision-language-action models near their pretrained weights (MAPS) on Ray, DeepSpeed and MLflow.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
track = typer.Typer(help="The tracking records of a run.", no_args_is_help=True)
data = typer.Typer(help="Data sets of every format: LeRobot 2.0 to 3, RLDS, LIBERO HDF5.", no_args_is_help=True)

# What a person wants, in the order of their first day; `--help` groups the commands so.
BEGIN, TRAIN, USE, LOOK = "Begin", "Train and search", "Use what was trained", "Data and records"
app.command(rich_help_panel=BEGIN)(init)
app.command(rich_help_panel=BEGIN)(plan)
app.command(rich_help_panel=BEGIN)(check)

SpecPath = Annotated[
    Path, typer.Argument(metavar="SPEC", parser=fetched_argument, help="Run spec, a YAML file; see jobs/.")
]
ExportDtype = Literal["bfloat16", "float32"]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Override a field; may be given several times."),
]

Source = Annotated[
    str, typer.Argument(metavar="PATH_OR_URI", help="Folder or HDF5 file, file://, s3://, gs:// or hf://.")
]
Split = Annotated[str, typer.Option(help="Stored split.")]
Transform = Annotated[
    str | None, typer.Option(metavar="NAME", help="libero, bridge, calvin, aloha, or module:function.")
]


@app.command(rich_help_panel=BEGIN)
def strengths(
    spec: SpecPath,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="Of each trained tensor, under its published name, in model order.")
    ] = False,
) -> None:
    """Print the strength of each layer in stack order, or of each trained tensor: what the schedule will do.

    Needs the checkpoint's configuration, no weights and no GPU. `--json` prints a list of layers, or with `--tensors`
    an object `{name: strength}`.

    Examples: `maps-ray strengths jobs/tiny.yaml --set proximity.shape=cosine --json`,
    `maps-ray strengths jobs/tiny.yaml --set proximity.recipe=released --tensors --json`
    """
    from maps_ray.training.preflight import published_strengths
    from maps_ray.training.preflight import strengths as strength_rows

    if tensors:
        of_tensors = published_strengths(load_spec(spec, overrides or ()))
        lines = (f"{value:<12.6g}{name}" for name, value in of_tensors.items())
        typer.echo(json.dumps(of_tensors, indent=1) if as_json else "\n".join(lines))
        return
    rows = strength_rows(load_spec(spec, overrides or ()))
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    headings = ("module", "strength", "tensors", "parameters", "tensors that differ")
    table = Table(*headings, title="Proximity schedule, in stack order")
    for column in table.columns[1:4]:
        column.justify = "right"
    notes: list[str] = []
    for row in rows:
        strength = "frozen" if row.get("frozen") else f"{row['strength']:.4f}"
        several = row.get("strengths", {})
        others = [f"{count} at {value}" for value, count in several.items()]
        if row.get("frozen_tensors"):
            others.append(f"{row['frozen_tensors']} frozen")
        notes.append(", ".join(others))
        table.add_row(row["module"], strength, str(row["tensors"]), f"{row['parameters']:,}", notes[-1])
    if any(notes):
        table.columns[0].no_wrap = True
    else:
        table.columns.pop()
    Console().print(table)


@app.command(rich_help_panel=BEGIN)
def fields(
    of_sweep: Annotated[bool, typer.Option("--sweep", help="Of a sweep spec instead of a run spec.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A list of fields instead of text.")] = False,
) -> None:
    """Print every field of a run spec, or of a sweep spec, with its type, default and meaning.

    Examples: `maps-ray fields | less`, `maps-ray fields --sweep`
    """
    from maps_ray.spec.reference import reference, rows
    from maps_ray.spec.sweep_spec import SweepSpec

    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows(SweepSpec if of_sweep else RunSpec)], indent=1))
        return
    if of_sweep:
        text = reference(SweepSpec, "sweep spec", "maps-ray fields --sweep", "num_samples=12")
    else:
        text = reference(RunSpec, "run spec", "maps-ray fields", "training.learning_rate=1e-4")
    typer.echo(text, nl=False)


@app.command(rich_help_panel=TRAIN)
def train(
    spec: Annotated[
        Path | None, typer.Argument(metavar="[SPEC]", parser=fetched_argument, help="Run spec; not with --from-trial.")
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run from its last checkpoint.")] = False,
    go_on: Annotated[bool, typer.Option("--continue", help="Continue the run if it was begun, else begin it.")] = False,
    from_trial: Annotated[
        str | None, typer.Option(metavar="NAME/TRIAL", help="Train a sweep's schedule on its base, at full length.")
    ] = None,
) -> None:
    """Fine-tune as the spec says, on this machine or on the Ray cluster it names.

    Ctrl-C leaves a run that `--resume` continues.

    Examples: `maps-ray train jobs/tiny.yaml`, `maps-ray train --from-trial tiny-orders/DSPEL-001`
    """
    from maps_ray.training.run_folder import is_begun
    from maps_ray.training.train import train as run

    if (spec is None) == (from_trial is None):
        raise SpecError([Problem("SPEC", str(spec), "give a run spec, or --from-trial NAME/TRIAL")])
    if from_trial is not None:
        from maps_ray.sweeps.command import spec_of_trial
        from maps_ray.training.preflight import check as check_run

        chosen = spec_of_trial(from_trial, overrides or ())
        check_run(chosen, patient=False)
    else:
        assert spec is not None
        chosen = checked_spec(spec, overrides, patient=False)
    result = run(chosen, resume=resume or (go_on and is_begun(chosen)))
    if result.status == "stopped":
        raise stopped()
    typer.echo(f"finished after {result.step} steps; trained weights: {result.final}")


@app.command(rich_help_panel=TRAIN)
def compare(
    spec: SpecPath,
    against: Annotated[
        list[str] | None,
        typer.Option("--against", metavar="FIELD=VALUE", help="What the other run changes; repeatable."),
    ] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="One object instead of the table.")] = False,
) -> None:
    """Train the spec and a variant of it, print the table and write report.html.

    A run that is finished is not run again; one that was interrupted is continued.

    Example: `maps-ray compare jobs/tiny.yaml --against proximity.lambda_max=0`
    """
    from maps_ray.reports.compare import compare as run

    if run(spec, overrides or [], against or ["proximity.lambda_max=0"], as_json=as_json) is None:
        raise stopped()


@app.command(rich_help_panel=TRAIN)
def sweep(
    spec: Annotated[
        Path | None, typer.Argument(metavar="[SPEC]", parser=home, help="Sweep spec, a YAML file; see jobs/.")
    ] = None,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, print the plan and its cost, start nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: one object instead of a table.")] = False,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Continue this sweep: its name under runs/, its folder, or its s3:// address."
        ),
    ] = None,
    go_on: Annotated[bool, typer.Option("--continue", help="Continue the sweep of this spec if it was begun.")] = False,
) -> None:
    """Search orders, shapes and strengths: many trials of one base run, on this machine or on a Ray cluster.

    Ctrl-C leaves a sweep that `--resume NAME` continues.

    Examples: `maps-ray sweep jobs/sweep_orders.yaml --dry-run`, `maps-ray sweep --resume tiny-orders`
    """
    from maps_ray.sweeps.command import load_plan
    from maps_ray.sweeps.dry_run import plan_data, print_plan

    if as_json and not dry_run:
        raise SpecError([Problem("--json", True, "goes with --dry-run; of a sweep that ran: maps-ray report --format")])
    planned, resumed = load_plan(spec, overrides or (), resume, go_on)
    if dry_run:
        print_plan(planned) if not as_json else typer.echo(json.dumps(plan_data(planned), indent=1))
        return
    from maps_ray.sweeps.command import run_and_report

    if run_and_report(planned, resumed) is None:
        raise stopped()


@app.command(rich_help_panel=TRAIN)
def report(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A sweep's name under runs/, its folder, or its s3:// address.")
    ],
    form: Annotated[
        Literal["html", "json", "csv"], typer.Option("--format", help="html to read, json with all, csv as a table.")
    ] = "html",
) -> None:
    """Write report.html of a sweep, finished or not, into its folder and as an MLflow artifact; or beside it on an
    object store.

    Examples: `maps-ray report tiny-orders`, `maps-ray report tiny-orders --format csv`
    """
    from maps_ray.sweeps.command import write_report_of

    typer.echo(write_report_of(name, form))


@app.command(rich_help_panel=USE)
def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_FOLDER", parser=run_argument, help="Finished run or checkpoint: folder, or s3:// address."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", parser=output, help="New folder.")],
    layout: Annotated[str, typer.Option("--format", help=f"Whose scripts load it: {' or '.join(EXPORT_FORMATS)}.")],
    dtype: Annotated[ExportDtype | None, typer.Option(help="Of all weights; as stored when left out.")] = None,
    adapter: Annotated[
        str | None, typer.Option(metavar="DIR", parser=run_argument, help="Folder of a LoRA adapter to merge.")
    ] = None,
) -> None:
    """Write trained weights, heads, statistics, processor and tokenizer as the published evaluation scripts load them.

    Example: `maps-ray export runs/tiny --format openvla-oft --out exports/tiny --dtype bfloat16`
    """
    import torch

    with ExitStack() as stack:
        folder = stack.enter_context(run_at(source, field="RUN_OR_FOLDER"))
        added = adapter and stack.enter_context(run_at(adapter, field="--adapter"))
        try:
            written = export_policy(folder, out, layout, dtype=getattr(torch, dtype) if dtype else None, adapter=added)
        except CheckpointError as error:
            raise SpecError([Problem("RUN_OR_FOLDER", str(folder), str(error))]) from None
    typer.echo(f"{layout}: {written}")


@app.command(rich_help_panel=USE)
def merge(
    run: Annotated[
        str, typer.Argument(metavar="RUN", parser=run_argument, help="Finished run: its folder, or its s3:// address.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", parser=output, help="New checkpoint folder.")],
    weights: Annotated[
        str | None,
        typer.Option(metavar="MODULE=A,...", help="How much of the training each module keeps; the others keep all."),
    ] = None,
    lines: Annotated[
        str | None, typer.Option(metavar="FIRST,LAST", help="The same, growing linearly along the run's order.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="DIR", parser=run_argument, help="Where the run's base is now, if it moved.")
    ] = None,
) -> None:
    """Draw trained weights back toward their base without training: theta = (1 - a) theta0 + a theta.

    `--weights` takes an `a` from 0 (the base) to 1 (as trained) for each module or group (WiSE-FT, RETAIN), `--lines`
    the `a` of the first and the last layer (LiNeS). The new folder is a checkpoint like any other.

    Examples: `maps-ray merge runs/tiny --weights dinov2=0.5,language=0.2 --out merged/tiny`,
    `maps-ray merge runs/tiny --lines 0.2,0.8 --out merged/tiny-lines`
    """
    from maps_ray.training.merge import merge as run_merge
    from maps_ray.training.merge import parse_lines, parse_weights

    chosen = None if weights is None else parse_weights(weights)
    ends = None if lines is None else parse_lines(lines)
    with ExitStack() as stack:
        folder = stack.enter_context(run_at(run))
        start = stack.enter_context(run_at(base, field="--base")) if base is not None else None
        typer.echo(run_merge(folder, out, weights=chosen, lines=ends, base=start))


app.command(rich_help_panel=USE)(serve)
app.command(rich_help_panel=USE)(evaluate)
app.add_typer(data, name="data", rich_help_panel=LOOK)
app.command(rich_help_panel=LOOK)(collect)
app.add_typer(track, name="track", rich_help_panel=LOOK)


@track.command()
def replay(
    path: Annotated[
        str, typer.Argument(metavar="RUN", parser=run_argument, help="Run folder such as runs/tiny, or its address.")
    ],
) -> None:
    """Ship to MLflow what a run recorded while MLflow was out of reach. Safe to repeat.

    Example: `maps-ray track replay runs/tiny`
    """
    from maps_ray.tracking.replay import replay as run

    with run_at(path, without="final|rollouts") as folder:
        try:
            # A run in a folder lies beside its database; one that was fetched has it where its driver was.
            summary = run(folder, make=is_address(path))
        except FileNotFoundError as error:
            raise SpecError([Problem("RUN", str(folder), str(error))]) from None
    typer.echo(summary)
    if not summary.complete:
        raise failed()


@data.command()
def inspect(
    path: Source,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
    split: Split = "train",
    transform: Transform = None,
) -> None:
    """Print what a data set holds: format, episodes, frames, cameras, fps, features, ranges, tasks, and what is odd.

    Reads every vector and text, and a few frames. Exit code 0; 2 when the data set cannot be opened.

    Example: `maps-ray data inspect jobs/assets/libero_demos`
    """
    from maps_ray.data.inspect import inspect as look
    from maps_ray.data.inspect import lines
    from maps_ray.models.hub import local_copy

    with _refused("PATH_OR_URI", path), _progress("reading vectors") as progress:
        inspected = look(local_copy(path), split, transform, progress)
    typer.echo(json.dumps(inspected.to_dict(), indent=1) if as_json else "\n".join(lines(inspected)))


@data.command()
def convert(
    path: Source,
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", parser=output, help="Folder to write; one that was begun is finished."),
    ],
    split: Split = "train",
    transform: Transform = None,
    action: Annotated[str | None, typer.Option(help="Feature with the actions, if it has no usual name.")] = None,
    state: Annotated[str | None, typer.Option(help="Feature with the proprioception, likewise.")] = None,
    fps: Annotated[int | None, typer.Option(min=1, help="Control steps per second where the data do not say.")] = None,
    drop_noops: Annotated[
        bool, typer.Option("--drop-noops", help="Leave out actions that do nothing, as LIBERO's regenerated sets do.")
    ] = False,
) -> None:
    """Convert a data set of any format to a LeRobotDataset v3. Interrupted, the same command goes on.

    Example: `maps-ray data convert datasets/libero_spatial_no_noops --out datasets/spatial_v3 --fps 20`
    """
    from maps_ray.data.convert import convert as run
    from maps_ray.models.hub import local_copy

    with _refused("PATH_OR_URI", path), _progress("converting episodes") as progress:
        made = run(
            local_copy(path),
            out,
            split=split,
            transform=transform,
            action=action,
            state=state,
            fps=fps,
            drop_noops=drop_noops,
            progress=progress,
        )
    left = f"; {made.left_out} episodes without a sentence were left out" if made.left_out else ""
    typer.echo(f"{out}: {made.episodes} episodes{left}")


def main() -> None:
    """Entry point. Exit code 2 for a fault of the user's input, 1 for a run that failed: a message, no traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Sentences of tasks are in any alphabet, and a job's locale may know ASCII alone.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _require_home()
        _require_folder()
        _hide_token()
        app()
    except SpecError as error:
        sys.exit(failed("\n".join(map(str, error.problems)), REFUSED).exit_code)
    except TrainingError as error:
        sys.exit(failed(str(error), FAILED).exit_code)
    except OSError as error:
        # Of a file: a disk that is full or read-only, a folder that was taken away. Any other is a fault of this code.
        if error.filename is None:
            raise
        sys.exit(failed(f"{error.filename}: {error.strerror}", FAILED).exit_code)


def _hide_token() -> None:
    """Other users see the arguments of a process: one that was started with the server's token starts itself again,
    with the token in its environment."""
    arguments = sys.argv[1:]
    place = next((at for at, given in enumerate(arguments) if given.partition("=")[0] == "--token"), None)
    if arguments[:1] != ["serve"] or place is None:
        return
    _, equals, token = arguments[place].partition("=")
    after = place + 1 if equals else place + 2
    if not equals:
        token = "".join(arguments[place + 1 : after])
    # With the interpreter's own options, and with the `-m` or the script that it was started with.
    left = [*sys.orig_argv[1 : -len(arguments)], *arguments[:place], *arguments[after:]]
    os.execve(sys.executable, [sys.executable, *left], {**os.environ, "MAPS_RAY_TOKEN": token})


def _require_home() -> None:
    """A user without an entry in passwd, as containers have them, has a home only by HOME, and no name.

    Raises:
        SpecError: no home folder is known; Ray, torch and the caches want one.
    """
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        # `getpass.getuser`, which torch's caches are named by, asks here before it asks passwd.
        os.environ.setdefault("USER", f"uid{os.getuid()}")
        if not os.environ.get("HOME") and "--help" not in sys.argv:
            message = "user has no home folder: set HOME to one that can be written, such as HOME=/tmp"
            raise SpecError([Problem("HOME", os.environ.get("HOME"), f"this {message}")]) from None


def _require_folder() -> None:
    """
    Raises:
        SpecError: the working directory was removed; paths would be relative to nothing.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        raise SpecError([Problem("", None, "the working directory was removed: cd to one that is there")]) from None


@contextmanager
def _refused(field: str, value: str) -> Iterator[None]:
    """Turns faults of the data into those of the command line: a message and exit code 2."""
    from maps_ray.data.dataset_error import DatasetError
    from maps_ray.models.hub import HubError
    from maps_ray.spec import Problem, SpecError

    try:
        yield
    except (DatasetError, HubError) as error:
        raise SpecError([Problem(field, value, str(error))]) from None


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal's error output, nothing where there is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    main()
