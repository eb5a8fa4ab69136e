"""Submits a spec to a Ray cluster under its own name, with what tells attempts apart later.

The job's metadata carries the name and the git commit, in `ray job list` and on the dashboard. A name that was
submitted before gets the next number (`tiny-sweep-a2`) and goes on where it was: the entry points continue what was
begun.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

from maps_ray.spec import apply_overrides, read_yaml
from maps_ray.spec.credentials import has_credentials, redact

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = """
Examples:

    python jobs/submit.py sweep jobs/sweep_orders.yaml --address http://127.0.0.1:8265

    python jobs/submit.py train jobs/tiny.yaml --set training.max_steps=100

What follows the spec goes to the command. With RAY_AUTH_MODE=token set RAY_AUTH_TOKEN_PATH too.
"""


class Kind(StrEnum):
    train = "train"
    sweep = "sweep"


def main(
    context: typer.Context,
    kind: Annotated[Kind, typer.Argument(help="What the spec describes.")],
    spec: Annotated[Path, typer.Argument(help="A file of this repository; the cluster gets a copy.")],
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Of the dashboard.")
    ] = "http://127.0.0.1:8265",
) -> None:
    for argument in context.args:
        if has_credentials(argument):
            _refuse(f"{redact(argument)}: the cluster keeps the command of a job: give credentials to its processes")
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        name = name_of(spec, context.args)
        inside = spec.resolve().relative_to(ROOT)
    except (KeyError, ValueError) as error:
        _refuse(f"SPEC = {spec}: must be a readable spec with a name, in {ROOT} ({error})")
    try:
        client = JobSubmissionClient(address)
        attempts = [job for job in client.list_jobs() if (job.metadata or {}).get("name") == name]
    except (AuthenticationError, ConnectionError, RuntimeError) as error:
        _refuse(f"--address = {address}: no Ray dashboard answers there, or not without its token ({error})")
    running = [job.submission_id for job in attempts if not job.status.is_terminal()]
    if running:
        _refuse(f"{name} runs already as {running[0]}: stop it with `ray job stop --address {address} {running[0]}`")
    submission = client.submit_job(
        entrypoint=shlex.join(["python", f"jobs/{kind}.py", str(inside), *context.args]),
        submission_id=f"{name}-a{len(attempts) + 1}",
        metadata={"name": name, "kind": kind.value, "git_commit": _commit()},
        runtime_env={"working_dir": str(ROOT)},
    )
    typer.echo(f"{submission} is submitted; its output: ray job logs --address {address} --follow {submission}")


def name_of(spec: Path, arguments: Sequence[str]) -> str:
    """The name in a spec, or the one that the command's `--set name=...` gives it.

    Raises:
        SpecError: it cannot be read.
        KeyError: it has no name of its own.
    """
    overrides = [text.removeprefix("--set=") for text in arguments if text.startswith("--set=")]
    overrides += [after for option, after in pairwise(arguments) if option == "--set"]
    # Of the name alone: variables in paths are the cluster's.
    named = [text for text in overrides if text.partition("=")[0].strip() == "name"]
    return str(apply_overrides(read_yaml(spec), named)["name"])


def _commit() -> str:
    """The commit of the working tree, with `+changes` where files differ from it; `unknown` outside git."""
    found = subprocess.run(
        ["git", "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "unknown"


def _refuse(message: str) -> None:
    typer.secho(message, fg="red", err=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(help=__doc__, epilog=EXAMPLES, context_settings=settings)(main)
    app()
