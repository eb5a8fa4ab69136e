"""What each process of the tests of the loop does: runs without Ray, several in one pair of processes."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import maps_ray.training.checkpoint
from maps_ray.proximity.zero.layout import spans
from maps_ray.spec import RunSpec
from maps_ray.training.errors import TrainingError
from maps_ray.training.loop import Run
from maps_ray.training.mailbox import Line

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


def final_bytes(spec: RunSpec) -> dict[str, bytes]:
    final = spec.run_dir / "final"
    return {str(path.relative_to(final)): path.read_bytes() for path in final.rglob("*.safetensors")}


def again(spec: RunSpec, step: int) -> dict[str, Any]:
    """A run, and the same run from its checkpoint of `step`: outcomes, final files, elements read per rank."""
    first = run(spec)
    expected = final_bytes(spec)
    keep_checkpoint(spec, step)
    with _counted_reads() as read:
        second = run(spec)
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, sum(read))
    return {"first": first, "second": second, "expected": expected, "found": final_bytes(spec), "read": counts}


@contextmanager
def _counted_reads() -> Iterator[list[int]]:
    """How many numbers each read of a checkpoint gives."""
    counts: list[int] = []
    read = maps_ray.training.checkpoint._Saved.read

    def counted(self: Any, kind: str, name: str, start: int, numel: int) -> torch.Tensor:
        counts.append(numel)
        return read(self, kind, name, start, numel)

    maps_ray.training.checkpoint._Saved.read = counted  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        maps_ray.training.checkpoint._Saved.read = read  # type: ignore[method-assign]


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
            shutil.rmtree(self._checkpoints)
            self._checkpoints.write_text("no folder")
        super()._save()


def all_of_it(specs: dict[str, RunSpec]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, spec in specs.items():
        if name.startswith("again"):
            result[name] = again(spec, 4)
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
