"""`maps-ray check`: its arguments and what it shows. What it does is in `preflight` and `cluster_check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maps_ray.spec import Problem, RunSpec, SpecError, apply_overrides, load_spec
from maps_ray.spec.paths import home

if TYPE_CHECKING:
    from maps_ray.training.cluster_check import ClusterCheck, Node


def check(
    spec: Annotated[
        Path | None, typer.Argument(metavar="[SPEC]", parser=home, help="Run spec; may be left out with --cluster.")
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
