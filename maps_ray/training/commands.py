"""`maps-ray check` and `maps-ray plan`: whether a run can be, and what it needs, before it is started.

Their arguments, and what `check` shows. What they do is in `preflight`, `cluster_check` and `planning`, imported when
it runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maps_ray.devices import SIZES, device_named
from maps_ray.run_copies import fetched_argument, records_argument
from maps_ray.spec import Problem, RunSpec, SpecError, apply_overrides, load_spec

if TYPE_CHECKING:
    from maps_ray.training.cluster_check import ClusterCheck, Node


def check(
    spec: Annotated[
        Path | None,
        typer.Argument(metavar="[SPEC]", parser=fetched_argument, help="Run spec; may be left out with --cluster."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Override a field; may be given several times."),
    ] = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Look at every node of the cluster that it names, or that is there.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --cluster: one object instead of a table.")] = False,
) -> None:
    """Check a run spec without starting anything: fields, checkpoint, data, schedule, resources.

    With `--cluster` a task on every node looks instead at what runs there: versions, storage, disk, memory, GPUs, clock
    and MLflow. That takes seconds and reserves nothing.

    Exit code 0 when it can run, 2 when not, with every fault on a line of its own.

    Examples: `maps-ray check jobs/tiny.yaml --set training.learning_rate=1e-4`,
    `maps-ray check --cluster --set cluster.address=10.0.0.1:6379 --set cluster.storage=/runs`
    """
    if cluster:
        _check_cluster(spec, overrides or [], as_json)
        return
    if spec is None:
        raise SpecError([Problem("SPEC", None, "give a run spec, or --cluster")])
    if as_json:
        raise SpecError([Problem("--json", True, "goes with --cluster")])
    from maps_ray.data.checks import conversions

    checked = checked_spec(spec, overrides)
    for line in conversions(checked.data, use_proprio=checked.model.use_proprio):
        typer.echo(line)
    typer.echo(f"{spec}: {checked.name} can run")


def checked_spec(path: Path, overrides: list[str] | None, patient: bool = True) -> RunSpec:
    """The spec of a file, checked in full; see `preflight.check`."""
    from maps_ray.training.preflight import check as check_run

    spec = load_spec(path, overrides or ())
    check_run(spec, patient=patient)
    return spec


def _check_cluster(path: Path | None, overrides: list[str], as_json: bool) -> None:
    from maps_ray.training.cluster_check import check_cluster, default_sections

    if path is None:
        cluster, tracking = default_sections(apply_overrides({}, overrides))
    else:
        spec = load_spec(path, overrides)
        cluster, tracking = spec.cluster, spec.tracking
    checked = check_cluster(cluster, tracking)
    if as_json:
        typer.echo(json.dumps(checked.as_data(), indent=1))
    else:
        _show(checked)
    if checked.problems:
        raise SpecError(checked.problems)


def _show(looked: ClusterCheck) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        *("node", "CPUs", "GPUs", "ray", "torch", "code", "free memory", "free scratch", "clock", "storage", "MLflow"),
        title=f"{len(looked.nodes)} node{'' if len(looked.nodes) == 1 else 's'}, looked at in {looked.seconds:.1f} s",
    )
    for node in looked.nodes:
        table.add_row(*_row(node))
    # Where there is no terminal rich takes 80 columns, and would cut names.
    Console(width=None if Console().is_terminal else 160).print(table)
    if not looked.problems:
        typer.echo("every node can take part")


def _row(node: Node) -> list[str]:
    name = f"{node.name}{', head' if node.head else ''}"
    if node.silent:
        return [name, f"{node.resources['CPU']:g}", f"{node.resources['GPU']:g}", *["?"] * 8]
    versions, gpus = node.facts["versions"], {gpu["name"] for gpu in node.facts["gpus"]}
    seen = "ok" if not node.seen_after_s or node.seen_after_s < 1 else f"ok after {node.seen_after_s:.0f} s"
    return [
        name,
        f"{node.resources['CPU']:g}",
        " ".join([f"{node.resources['GPU']:g}", *sorted(gpus)]),
        versions["ray"] or "missing",
        versions["torch"] or "missing",
        node.facts["code"] or "missing",
        *(f"{node.facts[what]['free'] / 2**30:.1f} GiB" for what in ("memory", "scratch")),
        "?" if node.skew_s is None else f"{node.skew_s:+.2f} s",
        "fault" if node.storage else seen,
        "fault" if node.tracking else "ok",
    ]


def plan(
    spec: Annotated[
        Path,
        typer.Argument(
            metavar="SPEC", parser=fetched_argument, help="Run spec, a YAML file; what it names may be missing."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Override a field; may be given several times."),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Such as h100-80; repeatable. Else one of each usual size.", show_default=False
        ),
    ] = None,
    devices: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="GPUs; else cluster.workers.", show_default=False)
    ] = None,
    utilisation: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="Of the device's peak; else what published runs come to.", show_default=False
        ),
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            parser=records_argument,
            help="A run of the same policy, whose pace is taken.",
            show_default=False,
        ),
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of a GPU hour, for the cost.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One object instead of tables.")] = False,
) -> None:
    """Say what a run needs before it is started: memory of each rank, what fits, what to change, time and cost.

    Nothing is loaded or computed; a checkpoint or data set that is missing is guessed, and each guess is said.

    Examples: `maps-ray plan jobs/tiny.yaml`,
    `maps-ray plan jobs/paper/libero_openvla_oft.yaml --device h100-80 --devices 8 --price 2.5`
    """
    chosen, problems = [], []
    for name in device or SIZES:
        try:
            chosen.append(device_named(name))
        except ValueError as error:
            problems.append(Problem("--device", name, str(error)))
    if utilisation is not None and not 0 < utilisation <= 1:
        problems.append(Problem("--utilisation", utilisation, "must be more than 0 and at most 1"))
    if problems:
        raise SpecError(problems)
    run = load_spec(spec, overrides or ())
    from maps_ray.training.planning.plan import UTILISATION, make_plan
    from maps_ray.training.planning.show import as_data, print_plan

    made = make_plan(run, chosen, ranks=devices, utilisation=utilisation or UTILISATION, measured=measured)
    if as_json:
        typer.echo(json.dumps(as_data(made, price), indent=1))
    else:
        print_plan(made, price)
