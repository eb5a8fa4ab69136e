"""Sections of a run spec on evaluation: action error and rollouts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from maps_ray.spec.section import (
    Count,
    NonNegative,
    NonNegativeInt,
    Section,
    Seed,
    each_once,
)


class ShareSpec(Section):
    """What Ray reserves for one actor; what is left out is not reserved."""

    cpus: NonNegative = 0
    """CPU cores, or a part of one."""
    gpus: NonNegative = 0
    """GPUs, or a part of one: two actors with 0.5 share a GPU."""
    memory_gib: NonNegative = 0
    """Of the node's memory."""


class RolloutResourcesSpec(Section):
    """What rollouts ask Ray for. Those that training waits for need nothing: they use what its workers leave idle."""

    policy: ShareSpec = ShareSpec()
    """Of the server that answers all simulators."""
    simulator: ShareSpec = ShareSpec()
    """Of each simulator."""
    placement: Literal["trainer", "free"] = "free"
    """`trainer`: on the node of the first worker, whose disk has the weights. `free`: wherever Ray finds room."""


class RolloutSpec(Section):
    """Success rates of the policy in simulators, as `maps-ray evaluate` measures them, logged as
    `rollout/<suite>/success`."""

    suites: Annotated[list[str], Field(min_length=1)]
    """Suites of tasks: `libero_object`, and what perturbs it, such as `libero_object_swap`. docs/simulators.md has
    all."""
    episodes: Count = 10
    """For each task of each suite, from its first initial states on."""
    every: NonNegativeInt = 0
    """Optimizer steps between rollouts, a multiple of `evaluation.every`; 0 rolls out once, after the last step."""
    tasks: Annotated[list[NonNegativeInt], Field(min_length=1)] | None = None
    """Places of tasks in their suite, from 0; none takes all."""
    seed: Seed = 0
    """Of what a simulator or a policy draws."""
    max_steps: Count | None = None
    """Actions after which an episode has failed; none takes each suite's published limit."""
    workers: Count | None = None
    """Simulators side by side; none takes as many as fit the machine."""
    when: Literal["blocking", "asynchronous", "after_training"] = "blocking"
    """`blocking`: training stands still meanwhile. `asynchronous`: it goes on, and the rollouts take resources of their
    own. `after_training`: the weights of each such step are kept until the last one is done. In all three the results
    stand at the step of the weights, and the run ends when it has them."""
    resources: RolloutResourcesSpec = RolloutResourcesSpec()
    """What is asked for policy server and simulators; with `asynchronous` at least one of them must ask for something.
    """

    @field_validator("suites")
    @classmethod
    def _suites_once(cls, suites: list[str]) -> list[str]:
        return each_once(suites, "suite")

    @field_validator("tasks")
    @classmethod
    def _tasks_once(cls, tasks: list[int] | None) -> list[int] | None:
        return tasks and each_once(tasks, "task")

    @model_validator(mode="after")
    def _asynchronous_asks(self) -> RolloutSpec:
        asked = self.resources
        if self.when == "asynchronous" and not (asked.policy.cpus or asked.policy.gpus):
            raise ValueError(
                "when = 'asynchronous': rollouts beside training need room of their own: give resources.policy.gpus or "
                "resources.policy.cpus, and resources.simulator.cpus"
            )
        return self


class EvaluationSpec(Section):
    """Offline evaluation: action error on the splits that training does not see. And rollouts, where asked for."""

    every: NonNegativeInt = 0
    """Optimizer steps between evaluations; 0 evaluates once, after the last step."""
    batch_size: Count = 16
    """Samples per worker and forward pass."""
    max_samples: Count = 512
    """Per split, evenly spaced over it."""
    averaged: bool = False
    """Evaluate, roll out and export the average of the weights, which `training.ema` keeps, in place of the weights."""
    rollouts: RolloutSpec | None = None
    """Success rates in simulators too; none runs no simulator."""
