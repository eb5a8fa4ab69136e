"""Faults that end a run and that a restart would only repeat."""

from __future__ import annotations

from maps_ray.spec import RunSpec


class TrainingError(RuntimeError):
    """A run that cannot go on; raised on every rank alike. The message says why, what is safe, and what to try."""


class CheckpointError(TrainingError):
    """A checkpoint that cannot be written or read."""


class OvertakenError(TrainingError):
    """Another driver has taken the run over."""


class FinalError(RuntimeError):
    """A fault of one rank alone that a restart would only repeat: the group is ended and not started again.

    The other ranks may wait in a collective for this one, so it leaves with an error, which makes Ray end them all.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was full, of a GPU or, whose allocator raises a plain RuntimeError, of the machine."""
    # By name, so that the driver needs no torch.
    plain = "can't allocate memory" in str(error) or "not enough memory" in str(error)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or plain


def planned_memory(spec: RunSpec, world_size: int, cpu: bool) -> str:
    """What the planner says that a rank of a run of this many workers needs, on GPUs or on the CPU."""
    # Not above: the planner imports the engine, which imports this file.
    from maps_ray.training.planning.plan import rank_needs

    try:
        return rank_needs(spec, world_size, cpu=cpu)
    except Exception as fault:  # memory is full: whatever stands in the way, the run ends with what is known
        return f"nothing ({type(fault).__name__})"


def out_of_memory(spec: RunSpec, rank: int, step: int, error: BaseException, planned: str) -> str:
    """What was asked of memory, what the planner says of it, and which fields ask for less.

    Args:
        spec: of the run.
        rank: whose memory was full.
        step: optimizer steps done.
        error: what the allocator said.
        planned: as `planned_memory` gives it.
    """
    training = spec.training
    remedies = []
    if training.batch_size > 1:
        remedies.append(
            f"training.batch_size = {training.batch_size // 2} with training.gradient_accumulation = "
            f"{training.gradient_accumulation * 2}, nearly the same step"
        )
    if not training.activation_checkpointing:
        remedies.append("training.activation_checkpointing = true")
    if training.zero_stage < 3 and spec.cluster.most_workers > 1:
        remedies.append(f"training.zero_stage = {training.zero_stage + 1}")
    if training.deepspeed.offload_optimizer is None:
        remedies.append("training.deepspeed.offload_optimizer = {device: cpu}")
    if spec.model.lora is None:
        remedies.append("model.lora")
    remedies.append(f"cluster.workers above {spec.cluster.most_workers}")
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"rank {rank} ran out of memory after step {step}, with training.batch_size = {training.batch_size}, "
        f"zero_stage = {training.zero_stage}, precision = {training.precision}: {said.rstrip('.')}. "
        f"The planner says: {planned}. What asks for less: "
        f"{'; '.join(remedies)}"
    )
