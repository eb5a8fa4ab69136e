"""What each process of the tests of the loop does: runs without Ray, several in one pair of processes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import maps_ray.training.state
from maps_ray.proximity.zero.partitions import spans
from maps_ray.spec import RunSpec
from maps_ray.training.checkpoint import newest_checkpoint
from maps_ray.training.loop import Run
from maps_ray.training.mailbox import Line
from maps_ray.training.run_faults import TrainingError

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


class QuietRun(Run):
    """Nobody listens to it."""

    def __init__(self, spec: RunSpec) -> None:
        super().__init__(spec, torch.device("cpu"), Line(None))


def run(spec: RunSpec, kind: Callable[[RunSpec], Run] = QuietRun) -> dict[str, Any]:
    """A run to its end: its outcome, or what ended it."""
    made = kind(spec)
    try:
        return made.run()
    except TrainingError as error:
        return {"status": "failed", "message": str(error)}
    finally:
        made.bound.engine.destroy()


def keep_checkpoint(spec: RunSpec, step: int) -> None:
    """Takes a run back to one of its checkpoints."""
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(spec.run_dir / "final", ignore_errors=True)
        for folder in (spec.run_dir / "checkpoints").iterdir():
            if folder.name != f"step-{step:08d}":
                shutil.rmtree(folder)
    dist.barrier()


def add_idle(spec: RunSpec, names: frozenset[str], weights: dict[str, torch.Tensor]) -> int:
    """Turns a run's newest checkpoint into one from before its idle parameters were left out; how many bytes more."""
    folder = newest_checkpoint(spec.run_dir / "checkpoints")
    assert folder is not None and names
    dist.barrier()
    path, facts = folder / "rank-00000.safetensors", folder / "rank-00000.json"
    before = path.stat().st_size
    if dist.get_rank() == 0:
        tensors, held = load_file(path), json.loads(facts.read_text())
        for name in sorted(names):
            flat = weights[name].detach().float().reshape(-1)
            held["slices"].append({"name": name, "start": 0, "numel": flat.numel()})
            tensors |= {f"weight/{name}": flat.clone()}
            tensors |= {f"{kind}/{name}": torch.zeros_like(flat) for kind in ("exp_avg", "exp_avg_sq")}
        save_file(tensors, path)
        facts.write_text(json.dumps(held))
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"] |= {file.name: file.stat().st_size for file in (path, facts)}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    dist.barrier()
    return path.stat().st_size - before


def final_bytes(spec: RunSpec) -> dict[str, bytes]:
    final = spec.run_dir / "final"
    return {str(path.relative_to(final)): path.read_bytes() for path in final.rglob("*.safetensors")}


def again(spec: RunSpec, step: int, old: bool) -> dict[str, Any]:
    """A run, and the same run from its checkpoint of `step`: outcomes, final files, elements read per rank.

    If `old`, the checkpoint is as an earlier version made it, with moments of parameters that get no gradient.
    """
    policies: list[Any] = []

    class Kept(QuietRun):
        def _save(self) -> None:
            policies[:] = [self.bound.idle, dict(self.bound.engine.module.named_parameters())]
            super()._save()

    first = run(spec, Kept)
    expected = final_bytes(spec)
    keep_checkpoint(spec, step)
    added = add_idle(spec, *policies) if old else 0
    with _counted_reads() as read:
        second = run(spec)
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, sum(read))
    return {
        "first": first,
        "second": second,
        "expected": expected,
        "found": final_bytes(spec),
        "read": counts,
        "added": added,
    }


@contextmanager
def _counted_reads() -> Iterator[list[int]]:
    """How many numbers each read of a checkpoint gives."""
    counts: list[int] = []
    read = maps_ray.training.state._Saved.read

    def counted(self: Any, kind: str, name: str, start: int, numel: int) -> torch.Tensor:
        counts.append(numel)
        return read(self, kind, name, start, numel)

    maps_ray.training.state._Saved.read = counted  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        maps_ray.training.state._Saved.read = read  # type: ignore[method-assign]


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: a value that becomes a number, or a tensor that leaves a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_local_scalar_dense" in str(func) or "nonzero" in str(func) or "equal.default" in str(func):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


class WaitsOfSteps(QuietRun):
    """Counts the waits of each step, those of reading tensors as lists among them."""

    waits: ClassVar[list[list[str]]] = []

    def _step(self, stream: Any) -> None:
        counter, lists = Waits(), torch.Tensor.tolist

        def tolist(tensor: torch.Tensor) -> Any:
            counter.found.append("tolist")
            return lists(tensor)

        torch.Tensor.tolist = tolist  # type: ignore[method-assign]
        try:
            with counter:
                super()._step(stream)
        finally:
            torch.Tensor.tolist = lists  # type: ignore[method-assign]
        self.waits.append(counter.found)


class SpoiledLoss(QuietRun):
    """The loss of step 4 is infinite on the last rank; afterwards no step has moved the weights."""

    moved: ClassVar[list[bool]] = []

    def _step(self, stream: Any) -> None:
        before = [span.flat.detach().clone() for span in spans(self.bound.engine)]
        forward = self.bound.engine.module.forward
        if self.step == 3 and self.rank == self.world_size - 1:

            def spoiled(*args: Any, **kwargs: Any) -> Any:
                output = forward(*args, **kwargs)
                return output._replace(loss=output.loss * float("inf"))

            self.bound.engine.module.forward = spoiled
        try:
            super()._step(stream)
        finally:
            self.bound.engine.module.forward = forward
            after = [span.flat.detach() for span in spans(self.bound.engine)]
            self.moved.append(any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)))


class BrokenStorage(QuietRun):
    """The folder of checkpoints turns into a file before step 4 is saved."""

    def _save(self) -> None:
        if self.step == 4 and self.rank == 0:
            checkpoints = self.spec.run_dir / "checkpoints"
            shutil.rmtree(checkpoints)
            checkpoints.write_text("no folder")
        super()._save()


def all_of_it(specs: dict[str, RunSpec]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, spec in specs.items():
        if name.startswith("again"):
            result[name] = again(spec, 4, old=name == "again 2")
        elif name == "waits":
            WaitsOfSteps.waits = []
            run(spec, WaitsOfSteps)
            result[name] = WaitsOfSteps.waits
        elif name.startswith("spoiled"):
            SpoiledLoss.moved = []
            result[name] = {**run(spec, SpoiledLoss), "moved": SpoiledLoss.moved}
        elif name == "storage":
            result[name] = run(spec, BrokenStorage)
    return result
