"""Lets timm and transformers be imported where torchvision was built for another torch.

Both import torchvision. Its wheels on PyPI are linked against the CUDA build of torch; beside a CPU-only torch their
compiled library cannot be loaded, and the Python package then fails at import because the operators it annotates are
not declared. Neither the vision transformers nor Llama call one of them, so declaring their signatures is enough.
"""

from __future__ import annotations

from importlib import import_module

import torch

# Kept, because a `Library` takes its declarations back when it is collected.
_DECLARED: list[torch.library.Library] = []


def ensure_torchvision() -> None:
    """Imports torchvision; where its compiled operators cannot be loaded, declares them without implementation."""
    if _DECLARED:
        return
    try:
        import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        # Those whose fake implementations `torchvision/_meta_registrations.py` registers outright; the others it leaves
        # aside where they are not declared.
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)
        import_module("torchvision")
