"""Pretrains the tiny base model on rendered scenes.

python jobs/render_scenes.py --out scenes --count 8400
python jobs/pretrain_tiny.py --scenes scenes --out my_tiny_base --steps 2000
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from maps_ray.models.checkpoint_faults import CheckpointError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from tiny_base.pretrain import Options, pretrain
from tiny_base.scenes import SceneError
from tiny_base.score_table import table

EXAMPLES = """
Examples:

    python jobs/pretrain_tiny.py --scenes scenes --out my_tiny_base --steps 2000

Run the same command again after an interruption: it goes on from the last checkpoint in the work folder.
"""


def main(
    scenes: Annotated[Path, typer.Option(help="Folder with shards of scenes, from jobs/render_scenes.py.")],
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
    work: Annotated[Path, typer.Option(help="Folder for log and checkpoint.")] = Path("runs/pretrain_tiny"),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 2000,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures in a step.")] = 16,
    alignment_steps: Annotated[
        int, typer.Option(min=0, help="Of the steps, the first ones that name patches only.")
    ] = 600,
    questions: Annotated[int, typer.Option(min=1, help="Questions for each picture.")] = 2,
    learning_rate: Annotated[float, typer.Option(min=0)] = 1e-3,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    try:
        summary = pretrain(
            Options(
                scenes=scenes,
                work=work,
                out=out,
                steps=steps,
                alignment_steps=alignment_steps,
                batch_size=batch_size,
                questions=questions,
                learning_rate=learning_rate,
                threads=threads,
                seed=seed,
            )
        )
    except (SceneError, CheckpointError) as error:
        raise SystemExit(str(error)) from None
    print(table(summary))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(help=__doc__.splitlines()[0], epilog=EXAMPLES)(main)
    app()
