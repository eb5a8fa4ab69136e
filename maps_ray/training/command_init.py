"""`maps-ray init`: writes a run spec from a checkpoint and a data set, asking for what the command line leaves out."""

from __future__ import annotations

import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from maps_ray.spec import Problem, ProximitySpec, SpecError, load_spec, to_yaml
from maps_ray.spec.paths import escape, home, output

_WRIST = re.compile("wrist|hand|gripper", re.IGNORECASE)
# As many as `data.cameras` takes.
_MOST_CAMERAS = 3
# Wider than what other commands write: a line of a path or a list that a person will edit stays one.
_yaml = partial(to_yaml, width=120)


def init(
    out: Annotated[
        Path, typer.Argument(metavar="SPEC", parser=output, help="Run spec to write, such as my_robot.yaml.")
    ],
    checkpoint: Annotated[
        str | None, typer.Option(metavar="DIR", help="The pretrained policy: a folder, or hf://OWNER/NAME.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="PATH_OR_URI", help="Demonstrations, as `maps-ray data inspect` reads them.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the run; else the name of the file.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 10_000,
    workers: Annotated[int, typer.Option(min=1, help="Processes, one for each GPU.")] = 1,
) -> None:
    """Write a run spec: the data set is looked at, cameras, proprioception, gripper and splits are filled in.

    What is not given is asked for. The spec is checked at the end as `maps-ray check` does it.

    Example: `maps-ray init my_robot.yaml --checkpoint jobs/assets/tiny_base --data jobs/assets/libero_demos`
    """
    if out.exists():
        raise SpecError([Problem("SPEC", str(out), "exists; name another file, or remove it first")])
    checkpoint = _place(
        "--checkpoint", checkpoint or _asked("--checkpoint", "Folder of the pretrained policy, or hf://OWNER/NAME")
    )
    data = _place("--data", data or _asked("--data", "Folder or address of the demonstrations"))
    text = _spec(out, checkpoint, data, name or out.stem, steps, workers)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Checked under another name: a fault leaves no spec behind that looks finished.
    trial = out.with_name(f".{out.name}.new")
    try:
        trial.write_text(text, encoding="utf-8")
        notes = _gripper(trial)
        trial.replace(out)
    finally:
        trial.unlink(missing_ok=True)
    for note in notes:
        typer.echo(note)
    typer.echo(f"{out} can run. Next: maps-ray strengths {out}; maps-ray plan {out}; maps-ray train {out}")


def _asked(option: str, question: str) -> str:
    if not sys.stdin.isatty():
        raise SpecError(
            [Problem(option, None, f"required where nobody can be asked: {question[0].lower()}{question[1:]}")]
        )
    answer: str = typer.prompt(question)
    return answer


def _place(option: str, text: str) -> str:
    """A path with `~` replaced, which shells leave alone in `--data=~/demos`; an address as it is."""
    path = text.removeprefix("file://")
    try:
        return path if "://" in path else str(home(path))
    except ValueError as error:
        raise SpecError([Problem(option, text, str(error))]) from None


def _spec(out: Path, checkpoint: str, data: str, name: str, steps: int, workers: int) -> str:
    from maps_ray.data import DatasetError, open_dataset
    from maps_ray.data.formats import KINDS
    from maps_ray.models import CheckpointError, describe
    from maps_ray.models.hub import HubError, local_copy

    try:
        info = describe(checkpoint)
    except CheckpointError as error:
        raise SpecError([Problem("--checkpoint", checkpoint, str(error))]) from None
    try:
        dataset = open_dataset(local_copy(data))
        # Views from outside first, as the published policies were given them.
        cameras = sorted(dataset.cameras, key=lambda camera: bool(_WRIST.search(camera)))[:_MOST_CAMERAS]
        if not cameras:
            raise DatasetError("it has no cameras: a VLA needs images")
        # The shortest name that still means the camera.
        cameras = [dataset.short_name(camera) for camera in cameras]
        use_proprio = dataset.has("state")
        sizes = {kind: dataset.width(kind) for kind in KINDS[: 1 + use_proprio]}
        episodes: dict[str, int] = {}
        for episode in dataset.episodes:
            episodes[episode.task] = episodes.get(episode.task, 0) + 1
        steps_in_all = sum(episode.length for episode in dataset.episodes)
    except (DatasetError, HubError) as error:
        raise SpecError([Problem("--data", data, str(error))]) from None
    keep = min(episodes.values()) > 1
    splits = {"train": {"episodes": ":-1"}, "held_out": {"episodes": "-1:"}} if keep else {"train": {}}
    every = max(1, steps // 10)
    sections = [
        f"# {len(dataset.episodes)} episodes, {steps_in_all} steps, {len(episodes)} tasks; "
        + ", ".join(f"{kind} of {width} dimensions" for kind, width in sizes.items()),
        f"#   maps-ray check {out.name}",
        f"#   maps-ray train {out.name}",
        to_yaml({"name": name}),
        to_yaml(
            {"model": {"name": info.name, "checkpoint": _seen_from(out, checkpoint), "use_proprio": bool(use_proprio)}}
        ),
        to_yaml({"data": {"path": _seen_from(out, data), "cameras": cameras, "chunk": 8, "splits": splits}}),
        "# An `ood` split holds tasks that training never shows: without one nothing tells how well it generalises.",
        "",
        "# Held near the pretrained weights from the first module to the last; maps-ray sweep finds what suits.",
        to_yaml(
            {
                "proximity": {
                    "order": ProximitySpec().order,
                    "shape": "linear",
                    "lambda_max": 1.0,
                }
            }
        ),
        to_yaml(
            {
                "training": {
                    "max_steps": steps,
                    "warmup_steps": min(500, steps // 20),
                    "checkpoint_every": every,
                    "precision": "bf16" if info.dtype == "bfloat16" else "fp32",
                }
            }
        ),
        *([to_yaml({"evaluation": {"every": every}})] if keep else []),
        to_yaml({"cluster": {"workers": workers}}),
    ]
    return "\n".join(sections)


def _gripper(spec: Path) -> list[str]:
    """Checks a spec; where the gripper is not LIBERO's, the spec says so and is checked again."""
    from maps_ray.data.checks import conversions
    from maps_ray.training.preflight import check

    try:
        check(load_spec(spec))
    except SpecError as error:
        if not any(problem.field.endswith("gripper") for problem in error.problems):
            raise
        said = spec.read_text(encoding="utf-8").replace("  chunk: 8\n", "  chunk: 8\n  gripper: none\n")
        spec.write_text(said, encoding="utf-8")
        check(load_spec(spec))
    written = load_spec(spec)
    return conversions(written.data, use_proprio=written.model.use_proprio)


def _seen_from(out: Path, location: str) -> str:
    """Paths in a spec are relative to it; addresses stay."""
    if "://" in location:
        return location
    path, folder = Path(location).resolve(), out.resolve().parent
    return escape(os.path.relpath(path, folder) if path.is_relative_to(folder.parent) else str(path))
