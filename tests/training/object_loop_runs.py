"""What each process of the tests on an object store does: runs without Ray, several in one pair of processes."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from loop_runs import QuietRun, run

from maps_ray.run_storage import RunStorage
from maps_ray.spec import RunSpec
from maps_ray.training.shelf import ObjectShelf


def weights(spec: RunSpec) -> dict[str, bytes]:
    storage = RunStorage(spec.run_place)
    return {name: storage.read(f"final/{name}") for name in storage.files("final") if name.endswith(".safetensors")}


def on_first(action: Any) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        action()
    dist.barrier()


class RemovedUnderway(QuietRun):
    """The part of the second rank goes while the run is being restored, after the first rank has looked at all."""

    def _set_up(self) -> Any:
        found = super()._set_up()
        look = self.shelf.complete

        def complete() -> list[str]:
            names = look()
            damage(self.spec, names[0], cut=True)
            return names

        self.shelf.complete = complete  # type: ignore[method-assign]
        return found


def damage(spec: RunSpec, name: str, cut: bool) -> None:
    """Makes the tensors of the second rank unreadable: shorter, or as long as they were."""
    storage = RunStorage(spec.run_place).inside("checkpoints")
    (file,) = [f for f in storage.files(name) if f.startswith("rank-00001.safetensors")]
    size = storage.files(name)[file]
    storage.write(f"{name}/{file}", b"\xff" * (size // 2 if cut else size))


def all_of_it(specs: dict[str, RunSpec]) -> dict[str, Any]:
    spec = specs["run"]
    result: dict[str, Any] = {"first": run(spec), "weights": weights(spec)}
    shelf = ObjectShelf(RunStorage(spec.run_place), spec.run_dir)
    result["checkpoints"] = shelf.complete()
    storage = RunStorage(spec.run_place)
    storage_of = storage.inside("checkpoints")

    def back() -> None:
        storage.remove_folder("final")
        storage_of.remove_folder("step-00000008")

    on_first(back)
    result["second"] = run(spec)
    result["again"] = weights(spec)
    # A part that is shorter than the manifest says: the checkpoint before it is used, by all.
    on_first(lambda: damage(spec, "step-00000008", cut=True))
    result["cut"] = run(spec)
    result["after the cut"] = weights(spec)
    # What one rank alone finds ends all of them alike, with its words.
    for name, kind in (("unreadable", QuietRun), ("cut underway", RemovedUnderway)):
        if kind is QuietRun:
            on_first(lambda: damage(spec, "step-00000008", cut=False))
        outcomes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, run(spec, kind))
        result[name] = outcomes
    return result
