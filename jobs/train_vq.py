"""Trains the VQ action tokenizer that a MiniVLA-VQ checkpoint needs, on the train split of a run spec.

python jobs/train_vq.py jobs/paper/libero_minivla_vq.yaml --out checkpoints/minivla/vq
"""

from pathlib import Path
from typing import Annotated

import typer

from maps_ray.data import DatasetError
from maps_ray.models import CheckpointError
from maps_ray.models.minivla.vq_training import VQTraining
from maps_ray.spec import SpecError, load_spec
from maps_ray.training.action_tokenizer import train_action_tokenizer


def main(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="Run spec; its `data` is what the tokenizer sees.")],
    out: Annotated[Path, typer.Option(help="New folder: `vq` in the checkpoint folder of the base model.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Override a field of the spec; repeatable.")
    ] = None,
    groups: Annotated[int, typer.Option(min=1, help="Codebooks, and so tokens of a chunk.")] = 7,
    codes: Annotated[int, typer.Option(min=2, max=256, help="Codes of each codebook.")] = 256,
    latent: Annotated[int, typer.Option(min=1, help="Width of the latent.")] = 512,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 5000,
    batch_size: Annotated[int, typer.Option(min=1, help="Chunks of a step.")] = 512,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    try:
        report = train_action_tokenizer(
            load_spec(spec, overrides or ()).data,
            out,
            groups=groups,
            codes=codes,
            latent=latent,
            training=VQTraining(steps=steps, batch_size=batch_size, seed=seed),
            report=lambda step, error: print(f"step {step}: mean absolute error {error:.4f}", flush=True),
        )
    except (SpecError, DatasetError, CheckpointError) as error:
        raise SystemExit(str(error)) from None
    for split, error in report.errors.items():
        print(f"{split}: {report.chunks[split]} chunks, mean absolute error {error:.4f} in normalised actions")
    print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
