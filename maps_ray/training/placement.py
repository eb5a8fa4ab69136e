"""Ray Train's trainer, of whose groups nothing is left on a cluster, whatever is killed when.

Ray Train leaves it to a detached actor to remove a group's placement group when the controller is lost. The controller
makes that actor, tells it to begin, and tells it of a placement group once the workers have started. One that is lost
before that leaves an actor that waits for ever, or a placement group that the next controller waits for as long as the
driver lives: Ray itself removes it with the whole job. Here the actor begins by itself, removes all that the controller
had reserved, and needs no dashboard.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import placement_group_callback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import placement_group_cleaner
from ray.train.v2._internal.execution.controller.placement_group_cleaner import PlacementGroupCleaner
from ray.util.placement_group import remove_placement_group

from maps_ray.ray_internals import actor_lives, placement_groups_of

if TYPE_CHECKING:
    from ray.train.v2._internal.execution.callback import RayTrainCallback
    from ray.train.v2._internal.execution.context import TrainRunContext
    from ray.util.placement_group import PlacementGroup

_log = logging.getLogger(__name__)


class Cleaner(PlacementGroupCleaner):
    """The actor, which watches the controller from its first moment."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        # It would ask the dashboard: there may be none, and where several clusters share a machine it takes the latest
        # one's, for which this controller is dead.
        placement_group_cleaner.is_actor_alive = actor_lives
        self.start_monitoring()

    def _cleanup_placement_group(self, placement_group: PlacementGroup | None) -> None:
        try:
            for reserved in placement_groups_of(self._controller_actor_id):
                remove_placement_group(reserved)
        except Exception as error:
            # What is raised here would keep the actor from ending.
            _log.warning("a placement group of a lost controller may be left: %s", error)


class CleanerCallback(PlacementGroupCleanerCallback):
    """What makes the actor, in the controller's process."""

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        # It takes the class from its own module.
        placement_group_callback.PlacementGroupCleaner = Cleaner
        super().after_controller_start(train_run_context)


class Trainer(TorchTrainer):
    """With that actor in place of Ray Train's."""

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        callbacks = super()._create_default_callbacks()
        return [CleanerCallback() if isinstance(c, PlacementGroupCleanerCallback) else c for c in callbacks]
