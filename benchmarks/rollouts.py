"""Episodes per minute of `evaluate`, against a loop in one process that renders every step.

    python benchmarks/rollouts.py              # 2 tasks of libero_object, 3 episodes each, 1, 2 and 4 simulators
    python benchmarks/rollouts.py --episodes 5 --steps 160 --workers 2

All run the same episodes with the same checkpoint, one after the other, and print one JSON object. The policy is the
bundled tiny one with an untrained head unless `--checkpoint` names another, so that no episode ends before its limit
and both do the same work. The clock starts when processes run and weights are loaded: at the loop's first reset, and
when `evaluate` knows the suite, before its second worker and the policy server have started. Loading tasks counts on
both sides. Needs the extra `libero`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SUITE = "libero_object"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="or a finished run; the tiny policy, untrained, by default")
    parser.add_argument("--tasks", default="0,3", help="indices in the suite")
    parser.add_argument("--episodes", type=int, default=3, help="of each task")
    parser.add_argument("--steps", type=int, default=96, help="limit of an episode")
    parser.add_argument("--workers", default="1,2,4", help="simulators at a time, one measurement each")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    tasks = tuple(int(task) for task in options.tasks.split(","))
    with tempfile.TemporaryDirectory(prefix="rollouts-") as name:
        folder = Path(name)
        checkpoint = options.checkpoint or untrained(folder)
        loop = one_process(checkpoint, tasks, options.episodes, options.steps)
        found: dict[str, dict[str, float]] = {"one_process": loop}
        for workers in map(int, options.workers.split(",")):
            out = folder / f"out-{workers}"
            ours = evaluated(checkpoint, tasks, options.episodes, options.steps, workers, out)
            if ours["steps"] != loop["steps"]:
                sys.exit(f"{workers} workers ran {ours['steps']} steps, the loop {loop['steps']}")
            ours["ratio"] = round(ours["episodes_per_minute"] / loop["episodes_per_minute"], 2)
            found[f"{workers}_workers"] = ours
    print(json.dumps(found, indent=1))


def untrained(folder: Path) -> Path:
    """The bundled tiny policy with a new head, as a checkpoint with the statistics of the bundled demonstrations."""
    import torch

    from maps_ray.data import Demonstrations
    from maps_ray.models import load_policy, save_policy
    from maps_ray.spec import DataSpec

    base, demonstrations = ROOT / "jobs" / "assets" / "tiny_base", ROOT / "jobs" / "assets" / "libero_demos"
    sizes: dict[str, Any] = {"num_images": 2, "use_proprio": True, "chunk": 8}
    weights = load_policy(base, dtype=torch.float32, **sizes).state_dict()
    loaded = Demonstrations(DataSpec(path=demonstrations), use_proprio=True)
    save_policy(
        weights,
        base,
        folder / "untrained",
        dtype=torch.float32,
        statistics={name: one.to_dict() for name, one in loaded.statistics.items()},
        trained_for={**sizes, "images": "plain", "camera_size": 128},
    )
    return folder / "untrained"


def one_process(checkpoint: Path, tasks: tuple[int, ...], episodes: int, steps: int) -> dict[str, float]:
    """Simulator and policy in this process; every action is followed by a picture of each camera."""
    import torch

    from maps_ray.evaluation.rollouts import RolloutRequest
    from maps_ray.evaluation.rollouts.checkpoint import read_facts
    from maps_ray.evaluation.rollouts.plan import Episode
    from maps_ray.evaluation.rollouts.protocol import play
    from maps_ray.evaluation.simulators import Observation, open_simulator
    from maps_ray.models import load_policy

    torch.set_num_threads(1)
    facts = read_facts(checkpoint, RolloutRequest((SUITE,)))
    policy: Any = load_policy(facts.folder, **facts.sizes)
    simulator = open_simulator(SUITE, image_size=facts.camera_size, cameras=facts.cameras)

    def act(seen: Observation, _: int) -> Any:
        return policy.predict([seen.images[name] for name in facts.cameras], seen.sentence, seen.proprio)

    began, applied, count = time.perf_counter(), 0, 0
    for task in tasks:
        for state in range(episodes):
            rollout = play(
                simulator,
                Episode(SUITE, task, state),
                act,
                max_steps=steps,
                gripper=facts.gripper,
                render_each_step=True,
            )
            try:
                while True:
                    next(rollout)
            except StopIteration as end:
                applied += end.value.steps
                count += 1
    seconds = time.perf_counter() - began
    simulator.close()
    return numbers(count, applied, seconds)


def evaluated(
    checkpoint: Path, tasks: tuple[int, ...], episodes: int, steps: int, workers: int, out: Path
) -> dict[str, float]:
    """By `evaluate`, in processes of their own."""
    from maps_ray.evaluation.rollouts import Progress, RolloutRequest, evaluate

    began: list[float] = []

    def note(progress: Progress) -> None:
        if progress.done == 0:
            began.append(time.perf_counter())

    request = RolloutRequest((SUITE,), episodes=episodes, tasks=tasks, max_steps=steps)
    asked = time.perf_counter()
    evaluation = evaluate(checkpoint, request, out, workers=workers, on_progress=note)
    ended = time.perf_counter()
    results = evaluation.results
    found = numbers(len(results), sum(result.steps for result in results), ended - began[0])
    return {**found, "seconds_with_start": round(ended - asked, 1)}


def numbers(episodes: int, steps: int, seconds: float) -> dict[str, float]:
    return {
        "episodes": episodes,
        "steps": steps,
        "seconds": round(seconds, 1),
        "episodes_per_minute": round(60 * episodes / seconds, 2),
    }


if __name__ == "__main__":
    main()
