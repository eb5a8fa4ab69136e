"""Whether LIBERO's soft reset gives what its hard one gives: states and pictures, over 20 resets.

    python benchmarks/resets.py                         # libero_object, task 0, initial states 0 to 19

robosuite's hard reset builds the scene anew (`hard_reset=True`, LIBERO's default); the soft one, which the simulators
here use, keeps the compiled scene and sets its state. Each runs the same initial states, with actions in between so
that something is left to forget. Prints one JSON object. Needs the extra `libero`.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="libero_object")
    parser.add_argument("--task", type=int, default=0)
    parser.add_argument("--resets", type=int, default=20)
    parser.add_argument("--size", type=int, default=128)
    options = parser.parse_args()
    soft, hard = (run(options, hard=hard) for hard in (False, True))
    states = [np.abs(one - other).max() for one, other in zip(soft["states"], hard["states"], strict=True)]
    frames = zip(soft["pictures"], hard["pictures"], strict=True)
    pictures = [np.abs(one.astype(np.int16) - other).max() for one, other in frames]
    print(
        json.dumps(
            {
                "resets": options.resets,
                "states_equal": sum(bool(difference == 0) for difference in states),
                "largest_state_difference": float(max(states)),
                "pictures_equal": sum(bool(difference == 0) for difference in pictures),
                "largest_picture_difference": int(max(pictures)),
                "soft_reset_s": round(float(np.median(soft["seconds"])), 3),
                "hard_reset_s": round(float(np.median(hard["seconds"])), 3),
            },
            indent=1,
        )
    )


class NoStages:
    """In the place of the tracker of sub-goals."""

    def start(self) -> None:
        pass

    def update(self) -> None:
        pass


def run(options: argparse.Namespace, *, hard: bool) -> dict[str, list[Any]]:
    """States, pictures of both cameras and processor seconds of each reset."""
    from maps_ray.evaluation.simulators.libero import LiberoSimulator

    simulator = LiberoSimulator(options.suite, image_size=options.size)
    simulator.load(options.task)
    simulator.env.hard_reset = hard
    simulator._stages = NoStages()  # the real one looks at the scene that a hard reset throws away
    found: dict[str, list[Any]] = {"states": [], "pictures": [], "seconds": []}
    motions = np.random.default_rng(0)
    for number in range(options.resets):
        began = time.process_time()
        simulator.reset(options.task, number)
        found["seconds"].append(time.process_time() - began)
        data = simulator.env.sim.data
        found["states"].append(np.concatenate([data.qpos, data.qvel]))
        found["pictures"].append(np.concatenate(list(simulator.observe().images.values())))
        simulator.step(motions.uniform(-1, 1, (5, 7)))
    simulator.close()
    return found


if __name__ == "__main__":
    main()
