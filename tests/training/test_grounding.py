"""Pretraining on questions about pictures: labels move with the picture, answers are true, runs resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maps_ray.models import CheckpointError, load_policy
from maps_ray.models.openvla_oft.tiny import build_tokenizer, tiny_config
from tiny_base import pretrain as room
from tiny_base.batches import Vocabulary, crop, make_batch
from tiny_base.pretrain import Options, pretrain
from tiny_base.questions import View, ask, kinds, templates
from tiny_base.scenes import SceneError, Scenes, Thing, read_scenes
from tiny_base.score_table import table

SCENES = Path(__file__).parents[1] / "fixtures" / "scenes"

MILK = Thing("milk", (0.25, 0.5), (0.2, 0.4, 0.3, 0.6), (0.1, -0.2, -0.3))
PLATE = Thing("plate", (0.75, 0.6), (0.6, 0.55, 0.9, 0.65), (0.2, 0.3, -0.35))
GRIPPER = Thing("gripper", (0.5, 0.3), None, (0.0, 0.0, 0.0))
VIEW = View((MILK, PLATE, GRIPPER), (PLATE,))


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return read_scenes(SCENES, held_out=0.4)


@pytest.fixture(scope="module")
def vocabulary(scenes: Scenes) -> Vocabulary:
    return Vocabulary(build_tokenizer([*templates(), *scenes.names]), scenes.names)


def _asked(kind: str) -> dict[str, tuple[Any, ...]]:
    random = np.random.default_rng(0)
    questions = (ask(VIEW, ["milk", "plate", "stove"], random) for _ in range(800))
    return {str(question.prompt[0]): question.answer for question in questions if question.kind == kind}


def test_every_kind_of_question_is_asked_and_answered_truly() -> None:
    truths = {
        "where": ("Where is the milk and the gripper", (-0.5, 0.0, 0.0, -0.4)),
        "where_second": ("Where is the plate in the wrist picture", (0.5, 0.2)),
        "offset": ("How far is the milk from the gripper", (0.2, -0.4, -0.6)),
        "carry": (
            "What action should the robot take to pick up the milk and place it on the plate",
            (0.2, -0.4, -0.6, 0.2, 1.0, -0.1),
        ),
        "reach_for": ("What action should the robot take to pick up the plate", (0.4, 0.6, -0.7)),
        "exists": ("Is there a stove", ("no",)),
        "side": ("Is the milk left of the plate", ("yes",)),
        "nearest": None,
        "count": ("How many milk are there", ("one",)),
        "at": None,
    }
    assert set(truths) == set(kinds())
    for kind, truth in truths.items():
        answers = _asked(kind)
        if truth is None:
            continue
        prompt, answer = truth
        given = answers[f"In: {prompt}?\nOut: "]
        assert given == answer if isinstance(answer[0], str) else given == pytest.approx(answer)


def test_a_name_that_two_things_have_is_never_asked_for_a_place() -> None:
    random = np.random.default_rng(0)
    view = View((MILK, replace(MILK, centre=(0.8, 0.8)), PLATE, GRIPPER))
    for _ in range(300):
        question = ask(view, ["milk", "plate", "stove"], random)
        if question.kind in ("where", "offset", "carry", "reach_for", "side"):
            assert "milk" not in str(question.prompt)


def test_what_stands_at_a_place_is_answered_with_a_name_and_stop_tokens(vocabulary: Vocabulary) -> None:
    random = np.random.default_rng(0)
    question = next(q for q in (ask(VIEW, ["milk"], random) for _ in range(400)) if q.kind == "at")
    assert len(question.prompt) == 4
    ids = vocabulary.answer(question)
    assert len(ids) == 4
    assert vocabulary.tokenizer.decode(ids) == f"{question.answer[0]}</s></s></s>"


def test_cropping_moves_the_labels_with_the_picture() -> None:
    seen = crop((MILK, PLATE, GRIPPER), (0.0, 0.25, 0.5))
    assert [thing.name for thing in seen] == ["milk", "gripper"]
    assert seen[0].centre == pytest.approx((0.5, 0.5))
    assert seen[0].box == pytest.approx((0.4, 0.3, 0.6, 0.7))
    assert seen[0].offset == MILK.offset


def test_the_cropped_picture_shows_a_thing_where_its_label_says(scenes: Scenes, vocabulary: Vocabulary) -> None:
    # A picture with one bright square, labelled; the square must be found at the label after any crop.
    images = np.zeros((1, 128, 128, 3), np.uint8)
    images[0, 60:68, 90:98] = 255
    thing = Thing("milk", (94 / 128, 64 / 128), (90 / 128, 60 / 128, 98 / 128, 68 / 128), (0.0, 0.0, 0.0))
    picture = replace(scenes.pictures[0], index=0, things=(thing,), partner=None)
    one = Scenes(images, (picture,), (0,), ())
    vocabulary = Vocabulary(vocabulary.tokenizer, one.names)
    found = 0
    for seed in range(40):
        batch = make_batch(
            one, vocabulary, [0], np.random.default_rng(seed), image_size=112, patch_size=14, questions_each=8
        )
        for question in batch.questions:
            if question.kind == "where":
                rows, columns = torch.nonzero(batch.pixel_values[0, 3] > 0, as_tuple=True)
                centre = [(columns.float().mean() + 0.5) / 56 - 1, (rows.float().mean() + 0.5) / 56 - 1]
                assert torch.stack(centre).tolist() == pytest.approx(question.answer, abs=0.02)
                found += 1
    assert found > 20


def test_small_things_name_a_patch_too(scenes: Scenes, vocabulary: Vocabulary) -> None:
    tiny = Thing("milk", (0.3, 0.3), (0.29, 0.29, 0.31, 0.31), (0.0, 0.0, 0.0))
    large = Thing("basket", (0.5, 0.5), (0.1, 0.1, 0.9, 0.9), (0.0, 0.0, 0.0))
    picture = replace(scenes.pictures[0], things=(large, tiny), partner=None)
    one = Scenes(scenes.images, (picture,), (0,), ())
    vocabulary = Vocabulary(vocabulary.tokenizer, ["basket", "milk"])
    random = np.random.default_rng(0)
    batch = make_batch(one, vocabulary, [0], random, image_size=112, patch_size=14, questions_each=1, augment=False)
    names = [vocabulary.names[row] for row in batch.patch_names[0].tolist()]
    assert names[2 * 8 + 2] == "milk"
    assert names[4 * 8 + 4] == "basket"
    assert names[0] == "nothing"
    assert names.count("milk") == 1


def test_patches_say_whether_they_show_what_is_asked_for(scenes: Scenes, vocabulary: Vocabulary) -> None:
    rows = [picture.index for picture in scenes.pictures if picture.partner is not None][:1]
    batch = make_batch(
        scenes,
        vocabulary,
        rows,
        np.random.default_rng(0),
        image_size=112,
        patch_size=14,
        questions_each=60,
        second=True,
    )
    names = np.array(vocabulary.names)[batch.patch_names[0].numpy()].reshape(2, -1)
    seen = set()
    for question, asked in zip(batch.questions, batch.asked.numpy().reshape(-1, *names.shape), strict=True):
        seen.add(question.kind)
        if not question.asked:
            assert (asked == -1).all()
            continue
        picture = 1 if question.kind == "where_second" else 0
        assert set(names[picture][asked[picture] == 1]) <= set(question.asked)
        assert not np.isin(names[picture][asked[picture] == 0], question.asked).any()
        assert (asked[1 - picture] == 0).all()
    assert {"where", "where_second", "carry", "exists"} <= seen


def test_two_pictures_need_a_partner(scenes: Scenes, vocabulary: Vocabulary) -> None:
    alone = next(picture.index for picture in scenes.pictures if picture.partner is None)
    with pytest.raises(ValueError, match="no wrist view"):
        make_batch(
            scenes,
            vocabulary,
            [alone],
            np.random.default_rng(0),
            image_size=112,
            patch_size=14,
            questions_each=1,
            second=True,
        )


def test_a_wrist_view_stays_on_the_side_of_its_primary_view() -> None:
    for part in (0.1, 0.25, 0.4, 0.6):
        scenes = read_scenes(SCENES, held_out=part)
        assert sorted(scenes.train + scenes.held_out) == list(range(len(scenes.pictures)))
        for picture in scenes.pictures:
            if picture.partner is not None:
                assert (picture.index in scenes.train) == (picture.partner in scenes.train)


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(SceneError, match=r"no scenes .* jobs/render_scenes.py"):
        read_scenes(tmp_path)
    (tmp_path / "scenes-00000.npz").write_bytes(b"no archive")
    with pytest.raises(SceneError, match=r"scenes-00000.npz: not a shard"):
        read_scenes(tmp_path)


def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(
        SCENES,
        tmp_path / "work",
        tmp_path / "base",
        steps=4,
        alignment_steps=1,
        batch_size=4,
        warmup_steps=1,
        checkpoint_every=2,
        held_out=0.4,
    )
    summary = pretrain(options)
    assert summary["after"]["answer_loss"] != summary["before"]["answer_loss"]
    assert "Where is the" in table(summary)

    again = replace(options, work=tmp_path / "work2", out=tmp_path / "base2")
    make, calls = room.losses, 0

    def stop_in_the_third_step(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise KeyboardInterrupt
        return make(*arguments)

    monkeypatch.setattr(room, "losses", stop_in_the_third_step)
    with pytest.raises(KeyboardInterrupt):
        pretrain(again)
    assert not again.out.exists()
    monkeypatch.setattr(room, "losses", make)
    pretrain(again)

    logged = [json.loads(line) for line in (again.work / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "step" in line] == [1, 2, 3, 4]
    whole, resumed = load_policy(options.out), load_policy(again.out)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name
    assert whole.config.image_size == tiny_config()["vision_kwargs"]["img_size"]


def test_an_existing_base_is_refused_before_the_first_step(tmp_path: Path) -> None:
    out = tmp_path / "base"
    out.mkdir()
    (out / "config.json").write_text("{}")
    options = Options(SCENES, tmp_path / "work", out, steps=1, held_out=0.4)
    with pytest.raises(CheckpointError, match="exists"):
        pretrain(options)
    assert not (tmp_path / "work").exists()
