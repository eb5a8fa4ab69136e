"""Full memory ends a run at once, with what was asked and what to change; no restart repeats it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
from run_specs import MakeSpec

from maps_ray.training.fit import final_fault
from maps_ray.training.run_faults import FinalError, TrainingError, is_out_of_memory, out_of_memory
from maps_ray.training.train import train

SAID = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"


def full_on_rank_1() -> Callable[[dict[str, Any]], None]:
    """As `train_worker`, but the third step of rank 1 finds no memory; a closure travels to workers by value."""

    def train(config: dict[str, Any]) -> None:
        import torch

        from maps_ray.training.engine import prepare_process

        prepare_process(config["gpu"])
        import torch.distributed as dist

        from maps_ray.training.loop import Run
        from maps_ray.training.worker import train_worker

        step = Run._step

        def full(self: Any, stream: Any) -> None:
            if self.step == 2 and dist.get_rank() == 1:
                try:
                    torch.empty(2**60, dtype=torch.uint8)
                except RuntimeError as error:
                    raise torch.OutOfMemoryError(str(error)) from None
            step(self, stream)

        Run._step = full  # type: ignore[method-assign]
        train_worker(config)

    return train


def test_what_was_asked_and_what_asks_for_less(make_spec: MakeSpec) -> None:
    spec = make_spec(training={"batch_size": 8, "gradient_accumulation": 2, "zero_stage": 2})
    message = out_of_memory(spec, 1, 12, RuntimeError(SAID), "a rank needs 81 GiB")
    assert message.startswith("rank 1 ran out of memory after step 12, with training.batch_size = 8, zero_stage = 2")
    for part in (
        "Tried to allocate 2.00 GiB",
        "79.10 GiB. The planner says: a rank needs 81 GiB. What asks for less: ",
        "training.batch_size = 4 with training.gradient_accumulation = 4",
        "training.activation_checkpointing = true",
        "training.zero_stage = 3",
        "training.deepspeed.offload_optimizer",
        "model.lora",
    ):
        assert part in message
    assert "\n" not in message


def test_what_counts_as_full_memory() -> None:
    import torch

    assert is_out_of_memory(torch.OutOfMemoryError(SAID)) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
    assert not is_out_of_memory(RuntimeError("shapes differ")) and final_fault(RuntimeError("lost")) is None


def test_a_fault_that_a_restart_would_repeat_is_told_from_a_loss() -> None:
    from ray.train.v2.api.exceptions import WorkerGroupError

    said = "rank 1 ran out of memory after step 2"
    # One worker met it, the other was lost with it; as it arrives from another process.
    error = WorkerGroupError("it failed", {0: RuntimeError("connection closed"), 1: FinalError(said)})
    assert final_fault(pickle.loads(pickle.dumps(error))) == said
    assert final_fault(WorkerGroupError("it failed", {0: RuntimeError("connection closed")})) is None


@pytest.mark.slow
def test_full_memory_of_one_rank_ends_the_run_at_once(
    ray_session: None, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maps_ray.training.worker.train_worker", full_on_rank_1())
    said = (
        r"has ended: rank 1 ran out of memory after step 2, .*you tried to allocate 1152921504606846976 bytes.*"
        r"The planner says: a rank needs [\d.e-]+ GiB at its worst moment \(\w.*\)\. What asks for less: "
    )
    with pytest.raises(TrainingError, match=said) as caught:
        train(make_spec(training={"checkpoint_every": 2}), progress=False)
    assert "restart" not in str(caught.value) and "continue with --resume" in str(caught.value)
