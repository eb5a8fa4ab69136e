"""What the policy server answers depends on the observation alone; checkpoints say what they need."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_policies import write_policy

from maps_ray.evaluation.rollouts import RolloutRequest
from maps_ray.evaluation.rollouts.checkpoint import fingerprint, read_facts
from maps_ray.evaluation.rollouts.policy_server import PolicyServer
from maps_ray.models import load_policy
from maps_ray.spec import SpecError

SENTENCE = "pick up the red bowl"


def server(checkpoint: Path, rows: int | None = None, **settings: Any) -> PolicyServer:
    request = RolloutRequest(("reach",), rows=rows, settings=settings)
    return PolicyServer(read_facts(checkpoint, request), rows, threads=1)


def observation(seed: int) -> tuple[list[np.ndarray], str, np.ndarray]:
    random = np.random.default_rng(seed)
    images = list(random.integers(0, 256, (2, 28, 28, 3), np.uint8))
    return images, SENTENCE, random.normal(size=8).astype(np.float32)


def ask(served: PolicyServer, numbers: list[int], seeds: list[int] | None = None) -> list[np.ndarray]:
    async def all_at_once() -> list[np.ndarray]:
        requests = zip(numbers, seeds or numbers, strict=True)
        return await asyncio.gather(*(served.act(*observation(number), seed) for number, seed in requests))

    return asyncio.run(all_at_once())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_policy(tmp_path_factory.mktemp("policy") / "base")


@pytest.mark.parametrize("head", ["l1", "diffusion"])
def test_an_answer_has_the_same_bits_whoever_else_asks(tmp_path: Path, head: str) -> None:
    served = server(write_policy(tmp_path / "base", head=head), rows=4)
    assert served.rows == 4
    alone = ask(served, [0])[0]
    assert alone.shape == (4, 7)
    for numbers in ([0, 1], [2, 0], [1, 2, 0], [3, 0, 4], [5, 6, 7, 0]):
        np.testing.assert_array_equal(ask(served, numbers)[numbers.index(0)], alone)
    others = ask(served, [1])[0]
    assert not np.array_equal(others, alone)


def test_a_forward_pass_serves_all_who_wait(checkpoint: Path) -> None:
    served = server(checkpoint, rows=4)
    quick = served.forward

    def slow(*arguments: Any) -> np.ndarray:
        # As long as a large policy takes: meanwhile the others come in.
        time.sleep(0.1)
        return quick(*arguments)

    served.forward = slow
    before = served.facts()
    ask(served, list(range(40)))
    after = served.facts()
    assert after["answers"] - before["answers"] == 40
    assert after["forwards"] - before["forwards"] <= 20


def test_batches_agree_with_predict(checkpoint: Path) -> None:
    policy = load_policy(checkpoint)
    for number, actions in enumerate(ask(server(checkpoint, rows=4), [0, 1, 2])):
        np.testing.assert_allclose(actions, policy.predict(*observation(number)), atol=1e-5)


def test_noise_comes_from_the_seed(tmp_path: Path) -> None:
    served = server(write_policy(tmp_path / "base", head="diffusion"), rows=2)
    first, again, other = (ask(served, [0], [seed])[0] for seed in (7, 7, 8))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_rows_that_are_not_alike_are_computed_one_by_one(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As where the last elements of an array are left over by vector instructions.
    forward = PolicyServer.forward

    def uneven(self: PolicyServer, samples: Any, seeds: Any, length: int) -> Any:
        actions = forward(self, samples, seeds, length).copy()
        if self.rows > 1 and len(samples) > 1:
            actions[-1] = np.nextafter(actions[-1], 1)
        return actions

    monkeypatch.setattr(PolicyServer, "forward", uneven)
    assert server(checkpoint, rows=4).rows == 1


def test_sequences_with_film_are_not_padded(tmp_path: Path) -> None:
    plain, film = (server(write_policy(tmp_path / str(film), film=film)) for film in (False, True))
    for served in (plain, film):
        sample = served._policy.codec.encode(*observation(0))
        length = served.padded_length(sample)
        if served is film:
            assert length == len(sample["input_ids"])
        else:
            assert length >= len(sample["input_ids"]) and (length + served._extra_tokens) % 32 == 0


def test_what_a_checkpoint_says_and_what_it_does_not(checkpoint: Path, tmp_path: Path) -> None:
    request = RolloutRequest(("reach",))
    said = read_facts(checkpoint, request)
    assert (said.cameras, said.camera_size, said.gripper) == (("image", "wrist_image"), 28, "libero")
    assert (said.action_dim, said.proprio_dim, said.dtype) == (7, 8, "float32")
    # A checkpoint as published says nothing: the published evaluation is assumed.
    config = checkpoint / "config.json"
    text = config.read_text()
    raw = json.loads(text)
    policy = raw.pop("policy")
    try:
        config.write_text(json.dumps(raw))
        sizes = {name: policy[name] for name in ("num_images", "use_proprio", "chunk")}
        published = read_facts(checkpoint, RolloutRequest(("reach",), settings=sizes))
        assert (published.cameras, published.camera_size) == (("image", "wrist_image"), 256)
        assert published.gripper == "libero"
        assert published.fingerprint != said.fingerprint
    finally:
        config.write_text(text)
    assert read_facts(checkpoint, request).fingerprint == said.fingerprint == fingerprint(checkpoint)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"camera": "image"}, "did you mean 'cameras'"),
        ({"cameras": ["image"]}, r"the policy reads 2 image\(s\)"),
        ({"gripper": "robotiq"}, "must be one of libero, widowx, none"),
        ({"camera_size": "big"}, "side of the images"),
        ({"num_images": 3}, "the checkpoint was trained with 2"),
        ({"dataset": "bridge"}, "choose one of demos"),
        ({"dataset": ["demos"]}, r"no data set \['demos'\]; choose one of demos"),
        ({"normalization": "q99"}, "normalization = 'q99': must be one of q01_q99, min_max"),
        ({"images": "blurred"}, "images = 'blurred': must be one of plain, crop, openvla"),
    ],
)
def test_settings_that_do_not_fit(checkpoint: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        read_facts(checkpoint, RolloutRequest(("reach",), settings=settings))


def test_checkpoints_that_cannot_be_evaluated(checkpoint: Path, tmp_path: Path) -> None:
    request = RolloutRequest(("reach",))
    with pytest.raises(SpecError, match="no checkpoint folder"):
        read_facts(tmp_path / "nothing", request)
    with pytest.raises(SpecError, match=r"has no weights in .*: train it first"):
        read_facts(checkpoint, RolloutRequest(("reach",), settings={"film": True}))
    (tmp_path / "bare").mkdir()
    for path in checkpoint.iterdir():
        if path.name != "dataset_statistics.json" and path.is_file():
            (tmp_path / "bare" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(SpecError, match=r"no dataset_statistics\.json"):
        read_facts(tmp_path / "bare", request)


def test_the_fingerprint_sees_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    before = fingerprint(checkpoint)
    path = checkpoint / "model.safetensors"
    stored = path.read_bytes()
    try:
        path.write_bytes(stored[:-2] + bytes([stored[-2] ^ 1]) + stored[-1:])
        assert fingerprint(checkpoint) != before
    finally:
        path.write_bytes(stored)


def test_half_precision_is_what_a_bf16_checkpoint_runs_in(checkpoint: Path) -> None:
    assert read_facts(checkpoint, RolloutRequest(("reach",), dtype="bfloat16")).dtype == "bfloat16"
    served = PolicyServer(read_facts(checkpoint, RolloutRequest(("reach",), dtype="bfloat16")), 1, 1)
    assert next(served._policy.parameters()).dtype == torch.bfloat16
