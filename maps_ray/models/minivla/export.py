"""A checkpoint as the published evaluation of MiniVLA loads it: the folder of a training run.

That is `config.json` (whose `vla` names the base model and the action tokenizer), `dataset_statistics.json` and
`checkpoints/latest-checkpoint.pt`; for MiniVLA-VQ also the VQ tokenizer, for MiniVLA-OFT the `.pt` files of its
modules, as OpenVLA-OFT writes them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maps_ray.files import write_json
from maps_ray.models.checkpoint_faults import CheckpointError
from maps_ray.models.files.folders import check_weights, main_dtype, published_config
from maps_ray.models.files.formats import read_json
from maps_ray.models.files.weights import cast, new_folder, trained_modules, write_modules
from maps_ray.models.minivla.checkpoint import COMPANIONS, open_weights
from maps_ray.models.minivla.config import Kind, full_config, published_base
from maps_ray.models.minivla.folder import VQ_FOLDER, check_vq, find_weights, read_checkpoint_config
from maps_ray.models.minivla.tensors import EMBEDDING, MODULES, TIED_HEAD, model_shapes, module_shapes
from maps_ray.models.minivla.vq import load_vq, save_vq

# The published evaluation takes codes for bins where this name is missing.
_VQ_TOKENIZER = "libero_vq_extra_action_tokenizer"


def export_checkpoint(
    folder: Path, out: Path, *, dtype: torch.dtype | None = None, adapter: str | Path | None = None
) -> Path:
    """Writes a checkpoint folder in the published layout.

    Args:
        folder: of the checkpoint.
        out: new folder. It appears only when it is complete.
        dtype: of all weights; none keeps what is stored, bit by bit.
        adapter: must be none: training has merged a MiniVLA's adapters.

    Returns:
        `out`.

    Raises:
        CheckpointError: `folder` is no complete checkpoint, or `out` exists and is not empty.
        OSError: nothing could be written; `out` does not exist then.
    """
    if adapter is not None:
        raise CheckpointError(f"{adapter}: a MiniVLA's adapters are merged when training ends: leave it out")
    folder, raw, config = read_checkpoint_config(folder, None)
    check_vq(folder, config)
    weights = find_weights(folder)
    check_weights(folder, model_shapes(config), weights.infos)
    trained = trained_modules(folder, module_shapes(config))
    base = open_weights(folder, weights)
    with new_folder(out) as made:
        for name in COMPANIONS:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, made / name)
        statistics = read_json(folder / "dataset_statistics.json")
        write_json(made / "dataset_statistics.json", _statistics(statistics, raw.get("policy") or {}))
        written = _published_config(raw, config.kind)
        stored = str(dtype).removeprefix("torch.") if dtype is not None else main_dtype(weights.infos, raw)
        write_json(made / "config.json", published_config(written, stored))
        if config.kind == "vq":
            save_vq(load_vq(folder / VQ_FOLDER), made / VQ_FOLDER)
        write_modules(made, trained, module_shapes(config), dtype)
        parts: dict[str, dict[str, Tensor]] = {module: {} for module in MODULES}
        for key in weights.infos:
            module, _, name = key.partition("|")
            parts[module][name] = cast(base.read(key), dtype)
        # The published loader is strict (`PrismaticVLM.from_pretrained`). `torch.save` stores what two keys share once.
        (module, _, name), (_, _, embedding) = TIED_HEAD.partition("|"), EMBEDDING.partition("|")
        parts[module][name] = parts[module][embedding]
        (made / "checkpoints").mkdir()
        torch.save({"model": parts}, made / "checkpoints" / "latest-checkpoint.pt")
    return out


def _published_config(raw: Mapping[str, Any], kind: Kind) -> dict[str, object]:
    """`config.json` with what the published loader looks for: `vla.base_vlm` and `vla.action_tokenizer`."""
    vla = dict(raw.get("vla") or {})
    base = published_base(raw)
    if base is not None:
        vla.setdefault("base_vlm", base)
    if kind == "vq" and "vq_extra" not in str(vla.get("action_tokenizer")):
        vla["action_tokenizer"] = _VQ_TOKENIZER
    return full_config(raw, kind) | {"vla": vla}


def _statistics(statistics: Mapping[str, Any], trained_for: Mapping[str, object]) -> dict[str, object]:
    """Statistics from which the published evaluation, which only knows q01 and q99, brings back the same actions."""
    if trained_for.get("normalization") != "min_max":
        return dict(statistics)
    written: dict[str, object] = {}
    for dataset, entry in statistics.items():
        written[dataset] = {
            name: {**vector, "q01": vector["min"], "q99": vector["max"]} if name in ("action", "proprio") else vector
            for name, vector in entry.items()
        }
    return written
