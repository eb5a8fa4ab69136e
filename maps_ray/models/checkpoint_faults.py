"""What is wrong with a checkpoint folder."""

from __future__ import annotations

from collections.abc import Mapping

Shape = tuple[int, ...]

_LIKELY_CAUSES = (
    (
        ("lora_A", "lora_B", "base_layer"),
        "a LoRA checkpoint that was not merged: merge the adapter into the base first",
    ),
    (("vision_backbone.vision_backbone.", ".scale.weight"), "a vision backbone with FiLM, saved on its own"),
    (("noise_predictor.",), "a diffusion head: load it with head='diffusion'"),
    (("module.",), "weights saved from inside a DistributedDataParallel wrapper: strip the prefix `module.`"),
    (("_orig_mod.",), "weights saved from a compiled module: strip the prefix `_orig_mod.`"),
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: the file or key, what was expected, what was found, what to do."""


def shape_faults(expected: Mapping[str, Shape], stored: Mapping[str, Shape]) -> list[str]:
    """One line for each missing, unexpected or differently shaped tensor; then a likely cause, where one shows."""
    missing = [key for key in expected if key not in stored]
    extra = [key for key in stored if key not in expected]
    faults = [
        f"{key}: expected {list(expected[key])}, found {list(stored[key])}"
        for key in expected
        if key in stored and tuple(expected[key]) != tuple(stored[key])
    ]
    faults += [f"{key}: expected {list(expected[key])}, found nothing" for key in missing]
    faults += [f"{key}: expected nothing, found {list(stored[key])}" for key in extra]
    if extra:
        causes = [cause for marks, cause in _LIKELY_CAUSES if any(mark in key for key in extra for mark in marks)]
        faults += [f"likely cause: {cause}" for cause in causes[:1]]
    return faults


def refuse_shape_faults(where: str, faults: list[str]) -> None:
    """Raises `CheckpointError` with the first ten of `faults` and the likely cause, if there are any."""
    if not faults:
        return
    causes = [fault for fault in faults if fault.startswith("likely cause")]
    tensors = [fault for fault in faults if fault not in causes]
    more = [f"... and {len(tensors) - 10} more"] if len(tensors) > 10 else []
    lines = [f"{where}: {len(tensors)} tensors do not fit the model", *tensors[:10], *more, *causes]
    raise CheckpointError("\n  ".join(lines))
