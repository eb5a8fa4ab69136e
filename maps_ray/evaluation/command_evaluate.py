"""`maps-ray evaluate`: its arguments. What it does is in `rollouts.command`, imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypedDict, cast

import typer

from maps_ray.run_copies import fetched_argument
from maps_ray.spec.paths import output


class _Serving(TypedDict, total=False):
    dtype: str
    rows: int | None
    threads: int


def evaluate(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_CHECKPOINT",
            parser=fetched_argument,
            help="Folder of a finished run, or a checkpoint; s3://, gs:// and hf:// too.",
        ),
    ],
    suites: Annotated[
        list[str],
        typer.Option("--suite", "--suites", metavar="A[,B]", help="Suites of tasks; may be given several times."),
    ],
    episodes: Annotated[int, typer.Option(min=1, help="Of each task: so many of its initial states.")] = 20,
    first_state: Annotated[int, typer.Option(min=0, help="Initial state of the first episode.")] = 0,
    tasks: Annotated[str, typer.Option(metavar="all|0,3", help="Indices of tasks in each suite.")] = "all",
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="OTHER",
            parser=fetched_argument,
            help="Another run or checkpoint, compared on the same initial states.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", parser=output, show_default=False, help="Folder; else in the run's, or in runs/rollouts."
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, show_default=False, help="Simulators; else as many as cores and memory allow."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of policies that draw noise.")] = 0,
    max_steps: Annotated[
        int | None, typer.Option(min=1, show_default=False, help="In an episode; else the suite's published limit.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster; else Ray starts on this machine.")] = None,
    tracking_uri: Annotated[
        str | None, typer.Option(show_default=False, help="MLflow; else the training run's store, or one beside DIR.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="What the checkpoint does not say; may be given several times."
        ),
    ] = None,
    device_map: Annotated[
        str,
        typer.Option(metavar="auto|cpu|cuda:0|JSON", help="Where the policy's weights lie; JSON: module -> device."),
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One object instead of tables.")] = False,
) -> None:
    """Roll a policy out in simulators: success rates with intervals, sub-goals, videos, MLflow.

    `--episodes` counts for each task, so libero_object with 20 has 200 episodes. After Ctrl-C, or when the machine was
    lost, the same command goes on; more suites or episodes may be asked for later.

    `--set` takes dataset, normalization, images, gripper, cameras, camera_size, and the policy's sizes num_images,
    use_proprio, chunk, action_dim, proprio_dim, head, film; also dtype, rows (observations in one forward pass) and
    threads.

    Exit code 2 for bad input, 1 when episodes could not be completed, 130 after Ctrl-C.

    Examples: `maps-ray evaluate runs/tiny --suite libero_object --episodes 20`,
    `maps-ray evaluate runs/tiny --suites libero_object,libero_object_swap --against runs/plain`
    """
    from maps_ray.evaluation.rollouts.command import Options, run, split_names, split_numbers
    from maps_ray.evaluation.rollouts.plan import RolloutRequest
    from maps_ray.spec import Problem, SpecError, apply_overrides, take_credentials
    from maps_ray.spec.credentials import refuse_credentials

    tracking_uri = tracking_uri and take_credentials(tracking_uri)
    for option, text in (("--tracking-uri", tracking_uri), ("--address", address)):
        try:
            refuse_credentials(text)
        except ValueError as error:
            raise SpecError([Problem(option, text, str(error))]) from None
    given = apply_overrides({}, settings or [])
    own = cast(_Serving, {name: given.pop(name) for name in ("dtype", "rows", "threads") if name in given})
    request = RolloutRequest(
        suites=split_names(suites),
        episodes=episodes,
        first_state=first_state,
        tasks=split_numbers(tasks),
        seed=seed,
        max_steps=max_steps,
        settings=given,
        device_map=device_map,
        **own,
    )
    run(Options(checkpoint, against, out, workers, address, tracking_uri, as_json), request)
