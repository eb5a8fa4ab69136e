"""What the evidence measures of one finished run, as one JSON file: success, forgetting, drift, offline error.

A file holds every episode, so that the report needs the files alone: they are small, and the weights need not be kept.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from maps_ray.evaluation.rollouts import RolloutRequest, evaluate
from maps_ray.evaluation.simulators.metaworld_small import CHANGES, PREFIX, change_of, tasks_of
from maps_ray.files import write_json
from maps_ray.models import describe
from maps_ray.models.openvla_oft.checkpoint import load_policy
from maps_ray.proximity.stack import assign
from maps_ray.training.offline import error_on

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from tiny_base.batches import Vocabulary
from tiny_base.objective import evaluate as grounding
from tiny_base.pretrain import held_out_batches
from tiny_base.scenes import read_scenes

SUITES = (PREFIX, *(f"{PREFIX}_{change}" for change in CHANGES))
EPISODES = {suite: 10 if suite == PREFIX else 5 for suite in SUITES}
"""Of each task of a suite, as registered."""
SETTINGS = {"gripper": "none", "cameras": ["image"], "camera_size": 64}


@dataclass(frozen=True)
class Made:
    """What `prepare` made."""

    folder: Path

    @property
    def base(self) -> Path:
        """Checkpoint folder of the pretrained base."""
        return self.folder / "base"

    @property
    def scenes(self) -> Path:
        """Labelled pictures; the last of each shard are held out."""
        return self.folder / "scenes"

    @property
    def demos(self) -> Path:
        """Demonstrations to train on, with their held-out episodes."""
        return self.folder / "demos"

    def offline(self, suite: str) -> Path:
        """Demonstrations of a suite that nothing trains on."""
        return self.folder / "offline" / suite


def measure(
    checkpoint: Path,
    run: Path,
    made: Made,
    first_state: int,
    about: dict[str, Any],
    result: Path,
    episodes: Mapping[str, int],
    stop: Callable[[], bool] | None = None,
) -> None:
    """Writes `result`; finished episodes are kept beside the checkpoint, so that the same call goes on.

    Args:
        checkpoint: folder with the weights, such as `final` of the run.
        run: folder of the run, whose spec and statistics say how actions are read.
        made: the experiment's inputs.
        first_state: first initial state of the episodes.
        about: what is known of the run, copied into the result.
        result: file to write.
        episodes: suite -> episodes of each of its tasks.
        stop: asked during rollouts whether to end.

    Raises:
        maps_ray.evaluation.rollouts.plan.Stopped: as `stop` asked for.
    """
    success: dict[str, list[tuple[int, int, bool]]] = {}
    for number in sorted(set(episodes.values())):
        suites = tuple(suite for suite in SUITES if episodes[suite] == number)
        request = RolloutRequest(suites, episodes=number, first_state=first_state, settings=SETTINGS)
        out = run / "evidence" / f"{checkpoint.name}-{number}"
        done = evaluate(checkpoint, request, out, workers=2, stop=stop)
        for suite in suites:
            success[suite] = [
                (found.episode.task, found.episode.initial_state, bool(found.success))
                for found in done.suite(suite).results
            ]
    # `error_on` reads the `final` of a run; a merge has none.
    errors = (
        {suite: error_on(run, made.offline(suite))["action_l1"] for suite in SUITES}
        if checkpoint == run / "final"
        else {}
    )
    content = {
        **about,
        "success": {suite: success[suite] for suite in SUITES},
        "grounding": knowledge(checkpoint, made),
        "drift": drift(checkpoint, made.base),
        "offline": errors,
    }
    result.parent.mkdir(parents=True, exist_ok=True)
    write_json(result, content)


def count_as_failed(
    result: Path, about: Mapping[str, Any], reason: str, first_state: int, episodes: Mapping[str, int]
) -> None:
    """Writes the result of a run without weights: every episode failed, as registered, and nothing else is known."""
    success = {
        suite: [
            (task, first_state + state, False)
            for task in range(len(tasks_of(change_of(suite) or "none")))
            for state in range(number)
        ]
        for suite, number in episodes.items()
    }
    result.parent.mkdir(parents=True, exist_ok=True)
    write_json(result, {**about, "failed": reason, "success": success})


def knowledge(checkpoint: Path, made: Made) -> dict[str, float]:
    """How well weights do what the base was pretrained on, on held-out scenes: cross-entropy of the answers, patches
    named rightly, places pointed at rightly."""
    scenes = read_scenes(made.scenes)
    vocabulary = Vocabulary(Tokenizer.from_file(str(made.base / "tokenizer.json")), scenes.names)
    policy = load_policy(checkpoint).eval()
    found = grounding(policy, held_out_batches(scenes, vocabulary, policy), vocabulary)
    return {"answer_loss": found.answer_loss, "naming": found.naming, "pointing": found.pointing}


def drift(checkpoint: Path, base: Path) -> dict[str, float]:
    """Module -> distance from the base over the base's norm, of its pretrained weights."""
    after, before = load_policy(checkpoint).state_dict(), load_policy(base).state_dict()
    info = describe(checkpoint, name="openvla_oft")
    squares: dict[str, np.ndarray] = {}
    for name, layer in assign(info.stack, info.parameters).items():
        if layer.pretrained:
            moved, start = after[name].double() - before[name].double(), before[name].double()
            part = torch.stack([(moved**2).sum(), (start**2).sum()]).numpy()
            squares[layer.modules[-1]] = squares.get(layer.modules[-1], np.zeros(2)) + part
    return {module: float(np.sqrt(moved / start)) for module, (moved, start) in squares.items()}


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All results of a folder, in the order of their names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def episodes_of(result: dict[str, Any], suites: Sequence[str] = SUITES) -> Iterator[tuple[str, int, int, bool]]:
    """(suite, task, initial state, success) of each episode of one result."""
    for suite in suites:
        for task, state, success in result["success"][suite]:
            yield suite, task, state, success
