"""From a spec to what the optimizer does with each tensor beside its strength: rates, late starts, L2-SP. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from maps_ray.proximity.schedule import ScheduleError, module_tensors, schedule, tensor_strengths
from maps_ray.proximity.stack import StackLayer
from maps_ray.spec import ProximitySpec, RunSpec, TrainingSpec


@dataclass(frozen=True)
class TensorRules:
    """By parameter name; what is not named has the plain value."""

    strengths: dict[str, float]
    """lambda of every trained tensor; where radii are learned, those above 0 have one."""
    rates: dict[str, float]
    """Factor of the learning rate, where it is not 1."""
    begins: dict[str, int]
    """Steps during which the tensor stays as it is, where there are any."""
    l2_sp: dict[str, float]
    """Coefficient of L2-SP."""


def tensor_rules(
    stack: Sequence[StackLayer],
    owners: Mapping[str, StackLayer],
    dimensions: Mapping[str, int],
    spec: RunSpec,
    published: Callable[[str], str],
) -> TensorRules:
    """The rules of each trained tensor as a spec wants them.

    Args:
        stack: layers in forward order.
        owners: parameter name -> its layer, for every parameter.
        dimensions: parameter name -> number of dimensions, for every trained tensor, in the order of the model.
        spec: of the run.
        published: parameter name -> name in the published layout.

    Raises:
        ScheduleError: as `tensor_strengths`, or `training.learning_rates` or `training.freeze_until` names what the
            model lacks or a tensor twice.
    """

    def scheduled(proximity: ProximitySpec) -> dict[str, float]:
        return tensor_strengths(stack, owners, dimensions, proximity, published)

    chosen = spec.proximity
    strengths = scheduled(chosen)
    penalty = chosen.l2_sp
    if isinstance(penalty, float | int):
        l2_sp = dict.fromkeys(dimensions, float(penalty))
    else:
        # A strength given by hand is lambda of a module, and no coefficient of L2-SP.
        update: dict[str, object] = {"shape": penalty.shape, "lambda_max": penalty.strength, "strengths": {}}
        l2_sp = scheduled(chosen.model_copy(update=update))
    training = spec.training
    rates = {name: rate for name, rate in _rates(stack, owners, chosen, training).items() if name in dimensions}
    begins: dict[str, int] = {}
    if training.freeze_until is not None:
        first = module_tensors(stack, owners, training.freeze_until.modules, "training.freeze_until", new=True)
        if not any(name in first for name in dimensions):
            named = ", ".join(training.freeze_until.modules)
            raise ScheduleError(f"nothing of {named} is trained: name other modules", "training.freeze_until")
        begins = {name: training.freeze_until.step for name in dimensions if name not in first}
    return TensorRules(strengths, rates, begins, {name: value for name, value in l2_sp.items() if value})


def _rates(
    stack: Sequence[StackLayer], owners: Mapping[str, StackLayer], proximity: ProximitySpec, training: TrainingSpec
) -> dict[str, float]:
    rates: dict[str, float] = {}
    if training.layer_decay < 1:
        # The place of a layer in line: a schedule that falls from 1 at the first layer to 0 at the last.
        falling = schedule(stack, proximity.order, "linear", 1.0, "layer")
        layers = sum(layer.pretrained for layer in stack)
        # Rounded: the share is a float, the place that it was made from a whole number.
        behind = {
            layer.name: round(falling[layer.name] * (layers - 1)) + 1 if layer.pretrained else 0 for layer in stack
        }
        rates = {name: training.layer_decay ** behind[layer.name] for name, layer in owners.items()}
    given = module_tensors(stack, owners, training.learning_rates, "training.learning_rates", new=True)
    rates |= {name: training.learning_rates[module] / training.learning_rate for name, module in given.items()}
    return {name: rate for name, rate in rates.items() if rate != 1}
