"""Success rates: a policy in simulators, on Ray."""

from maps_ray.evaluation.rollouts.environment import Simulators
from maps_ray.evaluation.rollouts.plan import RolloutError, RolloutRequest, Stopped
from maps_ray.evaluation.rollouts.pool import Limits
from maps_ray.evaluation.rollouts.run import Progress, Resources, evaluate
from maps_ray.evaluation.rollouts.summary import Evaluation

__all__ = [
    "Evaluation",
    "Limits",
    "Progress",
    "Resources",
    "RolloutError",
    "RolloutRequest",
    "Simulators",
    "Stopped",
    "evaluate",
]
