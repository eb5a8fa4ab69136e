"""What Ray Train leaves on a cluster when its controller is lost in its first moments: nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from ray_nodes import ray_nodes

# A controller that is gone before it has told the actor beside it to begin.
_LOST = """
import time
import ray
from ray._private.state import actors
from ray.util.placement_group import placement_group, placement_group_table
from maps_ray.training.placement import Cleaner

ray.init(logging_level="error")

@ray.remote(num_cpus=0)
class Controller:
    def name(self):
        return ray.get_runtime_context().get_actor_id()

    def reserve(self):
        # What Ray Train would tell the other actor of only once the workers have started.
        ray.get(placement_group([{"CPU": 1}]).ready())

def reserved():
    return [group["state"] for group in placement_group_table().values()]

def alive():
    return {actor["ActorClassName"] for actor in actors().values() if actor["State"] != "DEAD"}

controller = Controller.remote()
name = ray.get(controller.name.remote())
options = {"controller_actor_id": name, "check_interval_s": 0.2, "get_actor_timeout_s": 10, "stop_timeout": 20}
cleaner = ray.remote(num_cpus=0)(Cleaner).options(lifetime="detached").remote(**options)
ray.get([cleaner.__ray_ready__.remote(), controller.reserve.remote()])
own = placement_group([{"CPU": 1}])
ray.get(own.ready())
time.sleep(2)
print(sorted(alive()), sorted(reserved()))
ray.kill(controller)
deadline = time.monotonic() + 60
while alive() and time.monotonic() < deadline:
    time.sleep(0.5)
print(sorted(alive()), sorted(reserved()))
"""


def test_ray_train_is_given_an_actor_that_begins_by_itself(tmp_path: Path) -> None:
    from ray.train import RunConfig
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    from maps_ray.training.placement import CleanerCallback, Trainer

    trainer = Trainer(lambda: None, run_config=RunConfig(name="a", storage_path=str(tmp_path)))
    callbacks = [c for c in trainer._create_default_callbacks() if isinstance(c, PlacementGroupCleanerCallback)]
    assert [type(callback) for callback in callbacks] == [CleanerCallback]


@pytest.mark.slow
def test_a_lost_controller_leaves_no_actor_and_no_placement_group() -> None:
    # Without a dashboard, and with a later cluster on this machine, which knows nothing of the controller.
    with ray_nodes(RAY_AUTH_MODE="disabled") as nodes, ray_nodes(RAY_AUTH_MODE="disabled") as others:
        head = nodes.start("head", "--num-cpus", "2")
        others.start("head", "--num-cpus", "1", "--include-dashboard", "true", "--dashboard-port", "0")
        done = nodes.driver(head, sys.executable, "-c", _LOST)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [
        *("['Cleaner', 'Controller'] ['CREATED', 'CREATED']", "[] ['CREATED', 'REMOVED']")
    ], done.stdout
