"""What one rank holds of a run at one moment: slices of weights and moments, and the states of its generators.

`Snapshot` copies it out of the engine, `State.write` puts it into a checkpoint's files, `load_state` brings an engine,
on whatever number of workers and under whatever ZeRO stage, back to it. Files name tensors and ranges, not ranks.
"""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from maps_ray.training.ranks import RanksError, gloo_group, on_all_ranks
from maps_ray.training.run_faults import CheckpointError
from maps_ray.training.shelf import FolderShelf, Opened, Shelf

if TYPE_CHECKING:
    from maps_ray.proximity.zero import ShardedAdamSPD
    from maps_ray.proximity.zero.deepspeed_engine import Engine
    from maps_ray.proximity.zero.partitions import Span

_MOMENTS = ("exp_avg", "exp_avg_sq")
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


class NumpyKey(TypedDict):
    """Of the Mersenne Twister."""

    key: list[int]
    pos: int


class NumpyState(TypedDict):
    """As `numpy.random.get_state(legacy=False)` gives it, its key as a list."""

    bit_generator: str
    state: NumpyKey
    has_gauss: int
    gauss: float


class GeneratorStates(TypedDict):
    """States of the generators as plain data; torch's in base64."""

    python: tuple[int, list[int], float | None]
    """As `random.getstate` gives it; a list where it was read from a file."""
    numpy: NumpyState
    torch: str
    cuda: str | None


class SliceFacts(TypedDict):
    """A range of one flattened parameter."""

    name: str
    start: int
    numel: int


class RankFacts(TypedDict, total=False):
    """What `rank-NNNNN.json` says beside the tensors. Those of earlier versions lack `radii`."""

    slices: list[SliceFacts]
    adam_steps: float
    radii: dict[str, list[float]]
    """Of each whole tensor that has a learned one, on every rank alike."""
    rng: GeneratorStates


@dataclass(frozen=True)
class State:
    """What one rank holds of a run at one moment, in host memory."""

    tensors: dict[str, Tensor]
    """`weight/<name>`, `exp_avg/<name>` and so on: this rank's slice of each tensor, flat."""
    facts: RankFacts
    """Where the slices lie in their tensors, Adam's step count, learned radii, states of the generators."""

    def write(self, folder: Path, rank: int) -> list[Path]:
        """Writes this rank's files into `folder`; returns them.

        Raises:
            OSError: the disk is full or cannot be written.
        """
        weights, facts = folder / f"rank-{rank:05d}.safetensors", folder / f"rank-{rank:05d}.json"
        _write_safetensors(self.tensors, weights)
        facts.write_text(json.dumps(self.facts))
        return [weights, facts]


class Snapshot:
    """Host buffers that a rank's state is copied into, made once and used again; pinned where a GPU fills them.

    They take as much host memory as the rank's part of a checkpoint: 12 bytes for each parameter that it owns, 16 where
    an average of the weights is kept.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, str], Tensor] = {}

    def take(self, engine: Engine) -> State:
        """A copy of the state as it is now, good until the next `take`. No process waits for another."""
        optimizer = engine.optimizer.optimizer
        flats: list[Tensor] = []
        tensors: dict[str, Tensor] = {}
        slices: list[SliceFacts] = []
        adam_steps = 0.0
        for span in _spans(engine):
            if not span.numel:
                continue
            # By identity: `in` would compare tensors number by number.
            place = next((place for place, flat in enumerate(flats) if flat is span.flat), len(flats))
            if place == len(flats):
                flats.append(span.flat)
                for kind, flat in _held(optimizer, span.flat).items():
                    self._copy(place, kind, flat)
                adam_steps = float(optimizer.state.get(span.flat, {}).get("step", 0))
            slices.append({"name": span.name, "start": span.start, "numel": span.numel})
            for kind in _held(optimizer, span.flat):
                tensors[f"{kind}/{span.name}"] = self._buffers[place, kind].narrow(0, span.offset, span.numel)
        if torch.cuda.is_initialized():
            # Copies to pinned memory return before they are made, and the next step changes what they read.
            torch.cuda.current_stream().synchronize()
        facts = RankFacts(slices=slices, adam_steps=adam_steps, radii=optimizer.binding.radii(), rng=rng_state())
        return State(tensors, facts)

    def _copy(self, place: int, kind: str, source: Tensor) -> None:
        buffer = self._buffers.get((place, kind))
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            self._buffers[place, kind] = buffer
        buffer.copy_(source, non_blocking=source.is_cuda)


def load_state(
    engine: Engine,
    checkpoint: Path | tuple[Shelf, str],
    saved_world_size: int,
    rank: int,
    world_size: int,
    idle: Collection[str] = (),
    files: Collection[str] | None = None,
) -> None:
    """Brings a bound engine to the state of a checkpoint; every rank calls it.

    Each rank reads what it owns; the model's whole weights, under ZeRO-1 and -2, come from the ranks that have read
    them. On the saved number of workers the generators go on where they were; on another number they stay as they are.

    Args:
        engine: with the run's binding.
        checkpoint: folder of a complete checkpoint, or its shelf and its name.
        saved_world_size: number of workers that wrote it.
        rank: of this worker.
        world_size: number of workers now.
        idle: parameters that get no gradient and are not trained, but may have been when the checkpoint was made.
        files: its files, as its manifest names them; none reads the manifest.

    Raises:
        CheckpointError: on every rank alike, when a file cannot be read, or the slices are not those of this model.
    """

    shelf, name = (FolderShelf(checkpoint.parent), checkpoint.name) if isinstance(checkpoint, Path) else checkpoint

    def read() -> None:
        known = shelf.manifest(name)["files"] if files is None else files
        with ExitStack() as stack:
            saved = _Saved(stack.enter_context(shelf.open(name)), known, saved_world_size, stack)
            _fill_masters(engine, saved, idle)
        engine.optimizer.optimizer.binding.load_radii(saved.facts[0].get("radii", {}))
        if saved_world_size == world_size:
            set_rng_state(saved.facts[rank]["rng"])

    def check() -> None:
        faults = [fault for span in _spans(engine) if span.numel and (fault := span.fault())]
        if faults:
            raise ValueError(f"it was not taken over: {'; '.join(faults[:10])}")

    try:
        on_all_ranks(read)
        # Not within an action: it is collective, and a rank that raised there would leave others in their broadcast.
        _fill_weights(engine, rank)
        on_all_ranks(check)
    except RanksError as error:
        raise CheckpointError(f"cannot read checkpoint {shelf.place(name)}: {error}") from None


def full_weights(engine: Engine, rank: int) -> dict[str, Tensor]:
    """The model's parameters, whole and on the CPU, on rank 0; empty elsewhere. Every rank calls it."""
    import deepspeed

    # Stages 1 and 2 share out optimizer state and gradients alone (arXiv 1910.02054, 5): rank 0 has whole weights.
    if engine.zero_optimization_stage() < 3:
        return {name: tensor.detach().cpu() for name, tensor in engine.module.state_dict().items()} if rank == 0 else {}
    weights = {}
    # One whole parameter at a time: all of them at once are what stage 3 is there to avoid.
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if rank == 0:
                # On a CPU `cpu` copies nothing, and what it gives is partitioned again behind the context.
                weights[name] = parameter.detach().cpu().clone()
    return weights


def seed_everything(seed: int, rank: int, step: int) -> None:
    """Seeds python, numpy and torch for one rank from one step on."""
    # Mixed, not added up: seed 0 on rank 1 and seed 1 on rank 0 must not draw the same.
    value = int(np.random.SeedSequence([seed, rank, step]).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def rng_state() -> GeneratorStates:
    """The states of python's, numpy's and torch's generators as plain data."""
    version, numbers, gauss = random.getstate()
    generator = np.random.get_state(legacy=False)
    return {
        "python": (version, list(numbers), gauss),
        "numpy": {
            "bit_generator": generator["bit_generator"],
            "state": {"key": generator["state"]["key"].tolist(), "pos": generator["state"]["pos"]},
            "has_gauss": generator["has_gauss"],
            "gauss": generator["gauss"],
        },
        "torch": _encode(torch.get_rng_state()),
        "cuda": _encode(torch.cuda.get_rng_state()) if torch.cuda.is_initialized() else None,
    }


def set_rng_state(state: GeneratorStates) -> None:
    """Sets what `rng_state` gave."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    inner = state["numpy"]["state"]
    np.random.set_state({**state["numpy"], "state": {**inner, "key": np.array(inner["key"], np.uint32)}})
    torch.set_rng_state(_decode(state["torch"]))
    # A run may go on without the GPU that it was begun on, and the other way round.
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(state["cuda"]))


class _Saved:
    """All ranks' slices of a checkpoint, addressed by tensor."""

    def __init__(self, path_of: Opened, files: Collection[str], world_size: int, stack: ExitStack) -> None:
        self._path_of, self._stack = path_of, stack
        self._opened: dict[int, safe_open] = {}
        self.facts: list[RankFacts] = []
        self._slices: dict[str, list[tuple[int, int, int]]] = {}
        # An object store has the name of the attempt behind each.
        self._names = [
            {
                kind: next(f for f in files if f.startswith(f"rank-{rank:05d}.{kind}"))
                for kind in ("json", "safetensors")
            }
            for rank in range(world_size)
        ]
        for rank in range(world_size):
            self.facts.append(json.loads(path_of(self._names[rank]["json"]).read_text()))
            for part in self.facts[-1]["slices"]:
                self._slices.setdefault(part["name"], []).append((part["start"], part["numel"], rank))
        # A rank that owns nothing has counted none.
        self.adam_steps = max(float(facts["adam_steps"]) for facts in self.facts)
        self.names = set(self._slices)

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements start .. start + numel - 1 of a flattened tensor, fp32."""
        values = torch.empty(numel)
        filled = 0
        for first, count, rank in self._slices[name]:
            begin, end = max(start, first), min(start + numel, first + count)
            if begin < end:
                part = self._file(rank).get_slice(f"{kind}/{name}")[begin - first : end - first]
                values[begin - start : end - start] = part
                filled += end - begin
        if filled != numel:
            raise ValueError(f"{kind} of {name} has {filled} of {numel} elements")
        return values

    def _file(self, rank: int) -> safe_open:
        """A rank's tensors, opened, and fetched, when the first of them is needed."""
        if rank not in self._opened:
            path = self._path_of(self._names[rank]["safetensors"])
            self._opened[rank] = self._stack.enter_context(safe_open(path, framework="pt"))
        return self._opened[rank]


def _fill_masters(engine: Engine, saved: _Saved, idle: Collection[str]) -> None:
    optimizer = engine.optimizer.optimizer
    pieces = _spans(engine)
    # Both ways: what is trained must have been saved, and what was saved be trained, or its moments would be lost.
    differing = {span.name for span in pieces} ^ saved.names.difference(idle)
    if differing:
        raise ValueError(f"it holds other tensors than this model trains, such as {', '.join(sorted(differing)[:10])}")
    for span in pieces:
        moments = optimizer.state[span.flat]
        if saved.adam_steps and not moments:
            # Adam makes its state in its first step, and a process that resumes has not made one yet.
            fused = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
            moments["step"] = torch.tensor(saved.adam_steps, device=span.flat.device if fused else "cpu")
            moments.update((name, torch.zeros_like(span.flat)) for name in _MOMENTS)
        if span.numel:
            for kind, flat in _held(optimizer, span.flat).items():
                flat.narrow(0, span.offset, span.numel).copy_(saved.read(kind, span.name, span.start, span.numel))


@torch.no_grad()
def _fill_weights(engine: Engine, rank: int) -> None:
    """Gives the model the masters' values in its own dtype: under stage 3 its shards, else the whole tensors."""
    own = _spans(engine)
    for span in own:
        span.weight.copy_(span.flat.detach().narrow(0, span.offset, span.numel))
    if engine.zero_optimization_stage() == 3:
        return
    parameters = dict(engine.module.named_parameters())
    owned: list[list[tuple[str, int, int]]] = [[]] * dist.get_world_size()
    mine = [(span.name, span.start, span.numel) for span in own if span.numel]
    dist.all_gather_object(owned, mine, group=gloo_group())
    for source, pieces in enumerate(owned):
        for name, start, numel in pieces:
            weight = parameters[name].detach().view(-1)[start : start + numel]
            # Broadcast one piece after the other: beside the weights no rank needs room for more than one.
            dist.broadcast(weight, source)


def _held(optimizer: ShardedAdamSPD, flat: Tensor) -> dict[str, Tensor]:
    """What a checkpoint keeps of one master partition, by kind; all have its length."""
    moments = optimizer.state.get(flat, {})
    held = {"weight": flat.detach(), **{name: moments[name] for name in _MOMENTS if name in moments}}
    assert optimizer.binding is not None
    average = optimizer.binding.averages(flat)
    return held if average is None else {**held, "average": average}


def _write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Streams flat tensors from memory into a file; the library's own writer makes a second copy of them first."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        dtype = _DTYPE_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    # The data begins at a multiple of eight, as the format asks (huggingface/safetensors, README "Format").
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            # Bytes: numpy has no bf16. Neither copy nor interpreter lock while the file is written.
            file.write(tensor.view(torch.uint8).numpy().data)


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _spans(engine: Engine) -> list[Span]:
    # Not above: the driver reads this file too, and DeepSpeed takes seconds to import.
    from maps_ray.proximity.zero.partitions import spans

    return spans(engine)
