"""How much of the time that a sweep holds its workers goes into training steps?

    python benchmarks/sweep_overhead.py                          # 12 trials of about 60 s, a worker each, 2 at once
    python benchmarks/sweep_overhead.py --trials 4 --seconds 20

A small random policy on synthetic demonstrations: what is measured is what a sweep adds, not the model. A first trial
finds out how many steps fill the time. Workers count as held from the moment they are asked for until the last trial
has ended, idle or not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
SENTENCES = ("pick up the red bowl", "pick up the blue cup", "open the drawer")
CALIBRATION_STEPS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=60, help="of steps in each trial")
    parser.add_argument("--workers", type=int, default=1, help="of each trial")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="sweep-") as name:
        folder = Path(name)
        os.environ["MAPS_RAY_CACHE"] = str(folder / "frames")
        make_inputs(folder)
        # As many trials at once as later: beside one another their steps take longer.
        lanes = max(1, len(os.sched_getaffinity(0)) // options.workers)
        step = sum(seconds_in_steps(run(folder, "calibration", lanes, CALIBRATION_STEPS, options.workers))) / (
            lanes * CALIBRATION_STEPS
        )
        steps = max(2, round(options.seconds / step))
        swept = run(folder, "measured", options.trials, steps, options.workers)
        print(json.dumps(account(swept, steps, options.workers), indent=1))


def make_inputs(folder: Path) -> None:
    """A policy of 4 + 4 vision blocks and 4 language layers of width 64, and 9 episodes of 12 steps."""
    import numpy as np
    import torch

    from maps_ray.data import LeRobotWriter
    from maps_ray.models import create_policy, save_policy
    from maps_ray.models.openvla_oft.tiny import build_tokenizer, tiny_config, tiny_preprocessor_config

    base = folder / "config"
    base.mkdir()
    config = tiny_config()
    (base / "config.json").write_text(json.dumps(config))
    (base / "preprocessor_config.json").write_text(json.dumps(tiny_preprocessor_config()))
    build_tokenizer(SENTENCES).save(str(base / "tokenizer.json"))
    weights = create_policy(config, dtype=torch.bfloat16, seed=1).state_dict()
    without_head = {name: tensor for name, tensor in weights.items() if not name.startswith("action_head")}
    save_policy(without_head, base, folder / "base", dtype=torch.bfloat16)
    random = np.random.default_rng(0)
    cameras = {"image": (32, 32), "wrist_image": (32, 32)}
    names = [f"d{i}" for i in range(8)]
    with LeRobotWriter(folder / "demos", cameras=cameras, state_names=names, action_names=names[:7]) as writer:
        for task in SENTENCES:
            for _ in range(3):
                images = {camera: random.integers(0, 256, (12, 32, 32, 3), np.uint8) for camera in cameras}
                actions = random.uniform(-1, 1, (12, 7))
                actions[:, 6] = np.sign(actions[:, 6])
                writer.add_episode(task, images, random.normal(size=(12, 8)), actions)


def run(folder: Path, name: str, trials: int, steps: int, workers: int) -> Path:
    """One sweep; returns its folder."""
    from maps_ray.spec.sweep_spec import load_sweep
    from maps_ray.sweeps.driver import run_sweep
    from maps_ray.sweeps.plan import make_plan

    splits = {"train": {"exclude_tasks": ["open*"]}, "ood": {"tasks": ["open*"]}}
    base = {
        "name": name,
        "model": {"checkpoint": "base"},
        "data": {"path": "demos", "splits": splits},
        "training": {"max_steps": steps, "batch_size": 2, "precision": "fp32", "checkpoint_every": steps},
        "evaluation": {"batch_size": 8, "max_samples": 16},
        "cluster": {"workers": workers, "storage": str(folder / "runs")},
    }
    sweep = {
        "name": name,
        "base": f"{name}-base.yaml",
        "space": [str(ROOT / "tune_spaces" / f"{space}.yaml") for space in ("orders", "strengths")],
        "searcher": "random",
        "known_strengths": [],
        "num_samples": trials,
    }
    for file, content in ((f"{name}-base.yaml", base), (f"{name}.yaml", sweep)):
        (folder / file).write_text(yaml.safe_dump(content))
    plan = make_plan(load_sweep(folder / f"{name}.yaml"))
    with quiet():
        result = run_sweep(plan, show=False)
    if result.status != "finished":
        sys.exit("interrupted: nothing to report")
    return plan.folder


def seconds_in_steps(swept: Path) -> list[float]:
    """Seconds that each trial spent in optimizer steps."""
    from maps_ray.spec import load_spec
    from maps_ray.tracking.spool import read_history
    from maps_ray.training.run_folder import global_batch_size

    found = []
    for run_dir in sorted((swept / "trials").iterdir()):
        rates = [value for _, value in read_history(run_dir).metrics["train/samples_per_second"]]
        found.append(sum(global_batch_size(load_spec(run_dir / "spec.yaml")) / rate for rate in rates))
    return found


def account(swept: Path, steps: int, workers: int) -> dict[str, float]:
    """Where the worker-seconds went; shares of what was held."""
    from maps_ray.sweeps.journal import Journal
    from maps_ray.tracking.spool import read_history

    journal = Journal(swept)
    groups = [json.loads(path.read_text()) for path in (swept / "workers").glob("*/times.json")]
    end = (swept / "journal.jsonl").stat().st_mtime
    held = sum(group.get("closed", end) - group["asked"] for group in groups)
    trials = sum(ended.seconds for ended in journal.ended.values())
    training = sum(seconds_in_steps(swept))
    saving = sum(
        value
        for ended in journal.ended
        for _, value in read_history(swept / "trials" / ended).metrics.get("train/checkpoint_seconds", [])
    )
    # The first trial of a group waits for its start.
    starting = sum(group["ready"] - group["asked"] for group in groups if "ready" in group)
    return {
        "trials": len(journal.ended),
        "steps of a trial": steps,
        "seconds of steps in a trial": round(training / len(journal.ended), 1),
        "worker-seconds held": round(held * workers, 1),
        "in training steps": round(training / held, 3),
        "starting the workers, once": round(starting / held, 3),
        "checkpoints": round(saving / held, 3),
        "model, engine, evaluation, trained weights": round((trials - training - saving - starting) / held, 3),
        "between trials, and idle at the end": round((held - trials) / held, 3),
    }


@contextmanager
def quiet() -> Iterator[None]:
    """Ray's warnings go to stderr, the result alone to stdout."""
    kept = sys.stdout
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = kept


if __name__ == "__main__":
    main()
