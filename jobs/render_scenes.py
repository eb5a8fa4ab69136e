"""Renders labelled pictures of random scenes of LIBERO, or of Metaworld's small world.

python jobs/render_scenes.py --out scenes --count 8400 --workers 2
"""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from maps_ray.evaluation.simulators import SimulatorMissing

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from tiny_base.scene_shards import World, write_scenes

EXAMPLES = """
Examples:

    python jobs/render_scenes.py --out scenes --count 8400 --workers 2

    python jobs/render_scenes.py --world metaworld_small --image-size 64 --out scenes --count 12000

Run the same command again after an interruption: shards that are there are kept.
"""


def main(
    out: Annotated[Path, typer.Option(help="Folder for the shards, created when missing.")],
    count: Annotated[int, typer.Option(min=1, help="Pictures in all.")] = 8400,
    workers: Annotated[int, typer.Option(min=1, help="Processes, about 1.8 GB each.")] = 2,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    image_size: Annotated[int, typer.Option(min=32, help="Side of the pictures in pixels.")] = 128,
    world: Annotated[World, typer.Option(help="libero, or metaworld_small.")] = "libero",
) -> None:
    try:
        with Progress() as progress:
            bar = progress.add_task("pictures", total=count)
            for done in write_scenes(out, count, workers=workers, seed=seed, image_size=image_size, world=world):
                progress.update(bar, completed=done)
    except SimulatorMissing as missing:
        raise SystemExit(str(missing)) from None


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(help=__doc__.splitlines()[0], epilog=EXAMPLES)(main)
    app()
