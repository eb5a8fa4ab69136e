"""`maps-ray plan`: its arguments. What it does is in `planning`, imported when it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from maps_ray.devices import SIZES, device_named
from maps_ray.spec import Problem, SpecError, load_spec


def plan(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="Run spec, a YAML file; what it names may be missing.")],
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
        typer.Option(metavar="RUN", help="A run of the same policy, whose pace is taken.", show_default=False),
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
