"""What one rank holds of a run, to files and back: slices of masters and moments, and random number generators.

The files name tensors, not ranks: a slice is a range of one flattened parameter. So a checkpoint can be read by any
number of workers and under any ZeRO stage, and nothing in it is a pickle. Anchors are not stored; `bind` has cut them
from the base weights before `load_state`.
"""

from __future__ import annotations

import base64
import json
import random
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from maps_ray.proximity.zero.layout import spans
from maps_ray.training.errors import CheckpointError

_MOMENTS = ("exp_avg", "exp_avg_sq")


def write_state(engine: Any, folder: Path, rank: int) -> list[Path]:
    """Writes this rank's slices and generator states into `folder`; returns the files.

    Raises:
        OSError, SafetensorError: the disk is full or cannot be written.
    """
    optimizer = engine.optimizer.optimizer
    tensors: dict[str, Tensor] = {}
    slices = []
    adam_steps = 0.0
    for span in spans(engine):
        if not span.numel:
            continue
        slices.append({"name": span.name, "start": span.start, "numel": span.numel})
        moments = optimizer.state.get(span.flat, {})
        adam_steps = float(moments.get("step", 0))
        flats = {"weight": span.flat.detach(), **{name: moments[name] for name in _MOMENTS if name in moments}}
        for kind, flat in flats.items():
            tensors[f"{kind}/{span.name}"] = flat.narrow(0, span.offset, span.numel).cpu()
    weights, facts = folder / f"rank-{rank:05d}.safetensors", folder / f"rank-{rank:05d}.json"
    save_file(tensors, weights)
    facts.write_text(json.dumps({"slices": slices, "adam_steps": adam_steps, "rng": rng_state()}))
    return [weights, facts]


def load_state(engine: Any, folder: Path, saved_world_size: int, rank: int, world_size: int) -> None:
    """Brings a bound engine to the state of a checkpoint; every rank calls it.

    On the saved number of workers the generators go on where they were; on another number they stay as they are.

    Raises:
        CheckpointError: a file cannot be read, or the slices are not those of this model.
    """
    try:
        with ExitStack() as stack:
            saved = _Saved(folder, saved_world_size, stack)
            _fill_masters(engine, saved)
            _fill_weights(engine, saved)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"cannot read checkpoint {folder}: {error}") from error
    faults = [fault for span in spans(engine) if span.numel and (fault := span.fault())]
    if faults:
        raise CheckpointError(f"checkpoint {folder} was not taken over: {'; '.join(faults[:10])}")
    if saved_world_size == world_size:
        set_rng_state(saved.facts[rank]["rng"])


def full_weights(engine: Any, rank: int) -> dict[str, Tensor]:
    """The model's parameters, whole and on the CPU, on rank 0; empty elsewhere. Every rank calls it."""
    import deepspeed

    if engine.zero_optimization_stage() < 3:
        return {name: tensor.detach().cpu() for name, tensor in engine.module.state_dict().items()} if rank == 0 else {}
    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if rank == 0:
                weights[name] = parameter.detach().cpu().clone()
    return weights


def seed_everything(seed: int, rank: int, step: int) -> None:
    """Seeds python, numpy and torch for one rank from one step on."""
    value = int(np.random.SeedSequence([seed, rank, step]).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def rng_state() -> dict[str, Any]:
    """The states of python's, numpy's and torch's generators as plain data."""
    version, numbers, gauss = random.getstate()
    generator: Any = np.random.get_state(legacy=False)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": {**generator, "state": {**generator["state"], "key": generator["state"]["key"].tolist()}},
        "torch": _encode(torch.get_rng_state()),
        "cuda": _encode(torch.cuda.get_rng_state()) if torch.cuda.is_initialized() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Sets what `rng_state` gave."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    inner = state["numpy"]["state"]
    np.random.set_state({**state["numpy"], "state": {**inner, "key": np.array(inner["key"], np.uint32)}})
    torch.set_rng_state(_decode(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(state["cuda"]))


class _Saved:
    """All ranks' slices of a checkpoint, addressed by tensor."""

    def __init__(self, folder: Path, world_size: int, stack: ExitStack) -> None:
        self.facts: list[dict[str, Any]] = []
        self._slices: dict[str, list[tuple[int, int, Any]]] = {}
        for rank in range(world_size):
            self.facts.append(json.loads((folder / f"rank-{rank:05d}.json").read_text()))
            file = stack.enter_context(safe_open(folder / f"rank-{rank:05d}.safetensors", framework="pt"))
            for part in self.facts[-1]["slices"]:
                self._slices.setdefault(part["name"], []).append((part["start"], part["numel"], file))
        self.adam_steps = max(float(facts["adam_steps"]) for facts in self.facts)
        self.names = set(self._slices)

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements start .. start + numel - 1 of a flattened tensor, fp32."""
        values = torch.empty(numel)
        filled = 0
        for first, count, file in self._slices[name]:
            begin, end = max(start, first), min(start + numel, first + count)
            if begin < end:
                part = file.get_slice(f"{kind}/{name}")[begin - first : end - first]
                values[begin - start : end - start] = part
                filled += end - begin
        if filled != numel:
            raise ValueError(f"{kind} of {name} has {filled} of {numel} elements")
        return values


def _fill_masters(engine: Any, saved: _Saved) -> None:
    optimizer = engine.optimizer.optimizer
    found = spans(engine)
    names = {span.name for span in found}
    if names != saved.names:
        differing = sorted(names ^ saved.names)
        raise ValueError(f"it holds other tensors than this model trains, such as {', '.join(differing[:10])}")
    for span in found:
        moments = optimizer.state[span.flat]
        if saved.adam_steps and not moments:
            fused = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
            moments["step"] = torch.tensor(saved.adam_steps, device=span.flat.device if fused else "cpu")
            moments.update((name, torch.zeros_like(span.flat)) for name in _MOMENTS)
        if span.numel:
            flats = {"weight": span.flat.detach(), **{name: moments[name] for name in _MOMENTS if name in moments}}
            for kind, flat in flats.items():
                flat.narrow(0, span.offset, span.numel).copy_(saved.read(kind, span.name, span.start, span.numel))


@torch.no_grad()
def _fill_weights(engine: Any, saved: _Saved) -> None:
    """Gives the model the masters' values in its own dtype: under stage 3 its shards, else the whole tensors."""
    if engine.zero_optimization_stage() == 3:
        for span in spans(engine):
            span.weight.copy_(saved.read("weight", span.name, span.start, span.numel))
        return
    for name, parameter in engine.module.named_parameters():
        if name in saved.names:
            parameter.copy_(saved.read("weight", name, 0, parameter.numel()).view_as(parameter))


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
