"""`maps-ray serve`: its arguments. Ray and the policy are imported when it runs."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import typer

from maps_ray.exit_codes import failed
from maps_ray.models import CheckpointError, checkpoint_folder
from maps_ray.ray_connection import ConnectionFailed
from maps_ray.run_copies import run_argument, run_at
from maps_ray.spec import Problem, SpecError


def serve(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            parser=run_argument,
            help="Checkpoint or finished run: folder, s3:// address, or hf://OWNER/NAME.",
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option()] = 8777,
    token: Annotated[
        str | None,
        typer.Option(envvar="MAPS_RAY_TOKEN", show_default=False, help="Clients must send it as bearer token."),
    ] = None,
    max_body_mib: Annotated[float, typer.Option(help="A longer request is refused.")] = 32,
    replicas: Annotated[int, typer.Option()] = 1,
    cpus: Annotated[float, typer.Option(help="For each replica.")] = 1,
    gpus: Annotated[float, typer.Option(help="For each replica.")] = 0,
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="Of the weights.")] = "bfloat16",
    device_map: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda:0|JSON", help="Where the weights lie; JSON: module -> device.")
    ] = "auto",
    batch: Annotated[int, typer.Option(help="Most observations in one forward pass.")] = 8,
    execute_steps: Annotated[
        int | None,
        typer.Option(show_default=False, help="One action a message; a new chunk is computed every so many."),
    ] = None,
    ensemble: Annotated[
        float | None,
        typer.Option(show_default=False, help="Average the chunks that cover a step, weights exp(-this * age)."),
    ] = None,
    max_step: Annotated[
        str | None,
        typer.Option(metavar="M|M,M,...", show_default=False, help="Refuse larger moves, or values by dimension."),
    ] = None,
    workspace: Annotated[
        str | None,
        typer.Option(metavar="X0,X1,Y0,Y1,Z0,Z1", show_default=False, help="Refuse moves out of this box, in m."),
    ] = None,
    metres_per_unit: Annotated[float, typer.Option(help="How far an action of 1.0 moves the hand.")] = 1.0,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="What the checkpoint does not say; may be given several times."
        ),
    ] = None,
) -> None:
    """Answer robots: `POST /act` as OpenVLA-OFT's deployment does, and websockets as openpi's policy server does.

    `/health` and `/metrics` (Prometheus) need no token. Limits, queue and a robot's client: docs/robots.md.
    `--set` takes num_images, use_proprio, chunk, action_dim, proprio_dim, head, film, attention_mask, released_faults,
    and dataset, normalization, images. On another address than this machine's own a token is required: give it in the
    environment variable MAPS_RAY_TOKEN, for other users of a machine see arguments.

    Example: `maps-ray serve runs/tiny --port 8777`
    """
    from maps_ray.spec import apply_overrides

    try:
        from maps_ray.serving.actions import Limits
        from maps_ray.serving.options import ServeOptions
        from maps_ray.serving.server import ServingError, serve_forever, start
    except ImportError as error:
        raise SpecError([Problem("serve", str(error.name), "install it: pip install 'maps_ray[serve]'")]) from None
    if not math.isfinite(max_body_mib):
        raise SpecError([Problem("--max-body-mib", max_body_mib, "must be a number")])
    limits = Limits(_numbers("--max-step", max_step), _numbers("--workspace", workspace), metres_per_unit)
    options = ServeOptions(
        host, port, token, int(max_body_mib * 2**20), replicas, cpus, gpus, dtype, device_map, batch, execute_steps,
        ensemble, limits,
    )  # fmt: skip
    try:
        with run_at(checkpoint, field="CHECKPOINT") as folder:
            try:
                url = start(checkpoint_folder(folder), options, apply_overrides({}, settings or []))
            except CheckpointError as error:
                raise SpecError([Problem("CHECKPOINT", str(folder), str(error))]) from None
            everyone = "" if token else ", to every user of this machine: set MAPS_RAY_TOKEN to ask for a token"
            typer.echo(f"{url} and ws://{options.address} answer{everyone}")
            # In the block, with which a copy from an object store goes: a replica that is started again reads it again.
            serve_forever(url)
    except (ServingError, ConnectionFailed) as error:
        raise failed(str(error)) from None


def _numbers(option: str, value: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in value.split(",")) if value else ()
    except ValueError:
        raise SpecError([Problem(option, value, "must be numbers, like 0.05 or 0.2,0.7,-0.4,0.4,0,0.6")]) from None
