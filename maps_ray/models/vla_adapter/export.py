"""A checkpoint as VLA-Adapter's published evaluation loads it.

That is OpenVLA's layout: `config.json`, `model.safetensors` with the action queries, `action_head--N_checkpoint.pt` and
`proprio_projector--N_checkpoint.pt` with the prefix `module.`, statistics and tokenizer.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from maps_ray.files import write_json
from maps_ray.models.checkpoint_faults import CheckpointError
from maps_ray.models.files.folders import main_dtype, published_config
from maps_ray.models.files.weights import cast, new_folder, trained_modules, write_modules
from maps_ray.models.vla_adapter.checkpoint import COMPANIONS, open_folder
from maps_ray.models.vla_adapter.config import full_config
from maps_ray.models.vla_adapter.folder import check_backbone, find_weights, read_checkpoint_config
from maps_ray.models.vla_adapter.tensors import QUERIES, module_shapes


def export_checkpoint(
    folder: Path, out: Path, *, dtype: torch.dtype | None = None, adapter: str | Path | None = None
) -> Path:
    """Writes a checkpoint folder in the published layout.

    Args:
        folder: of the checkpoint.
        out: new folder. It appears only when it is complete.
        dtype: of all weights; none keeps what is stored, bit by bit.
        adapter: must be none: training has merged a VLA-Adapter's adapters.

    Returns:
        `out`.

    Raises:
        CheckpointError: `folder` is no complete checkpoint, or `out` exists and is not empty.
        OSError: nothing could be written; `out` does not exist then.
    """
    if adapter is not None:
        raise CheckpointError(f"{adapter}: a VLA-Adapter's adapters are merged when training ends: leave it out")
    folder, raw, config = read_checkpoint_config(folder)
    weights = find_weights(folder, raw)
    check_backbone(folder, config, weights)
    if weights.queries is None:
        raise CheckpointError(f"{folder} has no action queries: there is nothing to evaluate; fine-tune it first")
    trained = trained_modules(folder, module_shapes(config))
    base = open_folder(folder, weights)
    with new_folder(out) as made:
        for name in COMPANIONS:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, made / name)
        # The published code registers its model under OpenVLA's type.
        written = {**full_config(raw, config), "model_type": "openvla"}
        stored = str(dtype).removeprefix("torch.") if dtype is not None else main_dtype(weights.infos, raw)
        write_json(made / "config.json", published_config(written, stored))
        write_modules(made, trained, module_shapes(config), dtype)
        tensors = {key: cast(base.read(weights.stored[key]), dtype).contiguous() for key in (*weights.infos, QUERIES)}
        save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    return out
