"""What pretraining minimises and how well a policy answers: cross-entropy in parallel answer slots and on patches."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from maps_ray.models.openvla_oft.model import OpenVLAOFT
from maps_ray.models.openvla_oft.tiny import ACTION_BINS, TOKENIZER_SIZE
from maps_ray.training.grounding.batches import Batch, Vocabulary
from maps_ray.training.grounding.questions import REACH

PATCH_WEIGHT = 0.7
ASKED_WEIGHT = 1.0
_FIRST_ACTION = TOKENIZER_SIZE - ACTION_BINS
# Neighbouring bins are nearly right: a number's target is a normal distribution of this width over the bins.
_BIN_DEVIATION = 6.0
# Most patches show nothing with a name; without this they would drown the others.
_NOTHING_WEIGHT = 0.2
_NEAR = 0.1
_IMAGE_KINDS = ("where", "where_second")


class Losses(NamedTuple):
    """Scalars."""

    total: Tensor
    answers: Tensor
    """Mean cross-entropy over all answer slots."""
    patches: Tensor
    """Weighted mean cross-entropy of the patches' names, read from the image tokens."""
    asked: Tensor
    """Weighted mean cross-entropy of yes or no for each patch: does it show what is asked for? Read from the language
    model's states at the image tokens."""


@dataclass(frozen=True)
class Score:
    """How well one kind of question is answered."""

    questions: int
    error: float | None
    """Mean distance to the right place: in picture sides, or in m for offsets. None for words."""
    accuracy: float
    """Part answered rightly: every word; or every place within a tenth of the picture, or 10 cm."""


def losses(policy: OpenVLAOFT, batch: Batch, vocabulary: Vocabulary) -> Losses:
    """The objective of one batch.

    Args:
        policy: its towers, projector and language model are used, none of its heads.
        batch: from `make_batch`.
        vocabulary: the one that made the batch.
    """
    projected = _encode(policy, batch)
    patches = _patch_loss(policy.language_logits(projected), batch.patch_names, vocabulary.distributions)
    slots, image = _hidden(policy, batch, projected)
    answers = _answer_loss(policy.language_logits(slots), batch.input_ids[batch.slots])
    asked = _asked_loss(policy, image, batch.asked, vocabulary)
    return Losses(answers + PATCH_WEIGHT * patches + ASKED_WEIGHT * asked, answers, patches, asked)


def alignment_losses(policy: OpenVLAOFT, batch: Batch, vocabulary: Vocabulary) -> Losses:
    """The patches' part alone, which needs no pass through the language model; the others are NaN."""
    logits = policy.language_logits(_encode(policy, batch))
    patches = _patch_loss(logits, batch.patch_names, vocabulary.distributions)
    missing = torch.tensor(float("nan"))
    return Losses(patches, missing, patches, missing)


@torch.no_grad()
def evaluate(
    policy: OpenVLAOFT, batches: Iterable[Batch], vocabulary: Vocabulary
) -> tuple[float, float, dict[str, Score]]:
    """Mean answer loss, accuracy of the patches' names where there is one, and the scores of all kinds of questions."""
    total, right, named, count = 0.0, 0, 0, 0
    found: dict[str, list[tuple[float | None, bool]]] = defaultdict(list)
    for batch in batches:
        projected = _encode(policy, batch)
        logits = policy.language_logits(_hidden(policy, batch, projected)[0])
        targets = batch.input_ids[batch.slots]
        total += float(_answer_loss(logits, targets)) * len(batch.questions)
        count += len(batch.questions)
        # A patch is named rightly when the whole name is likelier than any other.
        log_words = functional.log_softmax(policy.language_logits(projected).float(), dim=-1)[..., :TOKENIZER_SIZE]
        likely = (log_words @ vocabulary.distributions.T).argmax(dim=-1)
        shown = batch.patch_names > 0
        right += int((likely == batch.patch_names)[shown].sum())
        named += int(shown.sum())
        sizes = batch.slots.sum(dim=1).tolist()
        split = zip(batch.questions, logits.split(sizes), targets.split(sizes), strict=True)
        for question, given, target in split:
            found[question.kind].append(_mark(question.kind, given, target))
    scores = {}
    for kind, marks in sorted(found.items()):
        errors = [error for error, _ in marks if error is not None]
        accuracy = float(np.mean([correct for _, correct in marks]))
        scores[kind] = Score(len(marks), float(np.mean(errors)) if errors else None, accuracy)
    return total / count, right / max(named, 1), scores


def constant_scores(batches: Iterable[Batch]) -> dict[str, Score]:
    """The scores of always giving the same answer: the mean place, the most frequent words."""
    answers: dict[str, list[tuple[float | str, ...]]] = defaultdict(list)
    for batch in batches:
        for question in batch.questions:
            answers[question.kind].append(question.answer)
    scores = {}
    for kind, given in sorted(answers.items()):
        if isinstance(given[0][0], str):
            scores[kind] = Score(len(given), None, Counter(given).most_common(1)[0][1] / len(given))
            continue
        places = [_places(kind, np.array(answer, np.float64)) for answer in given]
        mean = np.concatenate(places).mean(axis=0)
        distances = [np.linalg.norm(place - mean, axis=1) for place in places]
        right = [bool((distance < _NEAR).all()) for distance in distances]
        scores[kind] = Score(len(given), float(np.mean([d.mean() for d in distances])), float(np.mean(right)))
    return scores


def _places(kind: str, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """Numbers -> places (n, 2) in sides of the picture, which is two units wide, or offsets (n, 3) in m."""
    return numbers.reshape(-1, 2) / 2 if kind in _IMAGE_KINDS else numbers.reshape(-1, 3) * REACH


def _encode(policy: OpenVLAOFT, batch: Batch) -> Tensor:
    """Image tokens (B, pictures * patches, hidden); the policy's own `encode_images` expects one number of images."""
    projected: Tensor = policy.projector(policy.vision_backbone(batch.pixel_values))
    return projected


def _hidden(policy: OpenVLAOFT, batch: Batch, projected: Tensor) -> tuple[Tensor, Tensor]:
    """The language model's states that predict the answer slots (slots in all, hidden), and those at the image tokens
    (B * Q, pictures * patches, hidden)."""
    patches = projected.repeat_interleave(len(batch.input_ids) // len(projected), dim=0)
    count = patches.shape[1]
    tokens = policy.embed_tokens(batch.input_ids, batch.slots)
    embeddings = torch.cat([tokens[:, :1], patches, tokens[:, 1:]], dim=1)
    mask = batch.attention_mask
    attended = torch.cat([mask[:, :1], mask.new_ones(len(mask), count), mask[:, 1:]], dim=1)
    hidden = policy.run_language(embeddings, attended)
    # As in OpenVLA-OFT a slot is predicted by the state before it.
    return hidden[:, count:-1][batch.slots[:, 1:]], hidden[:, 1 : 1 + count]


def _patch_loss(logits: Tensor, shown: Tensor, names: Tensor) -> Tensor:
    log_names = functional.log_softmax(logits.float(), dim=-1)[..., :TOKENIZER_SIZE].flatten(0, 1)
    surprise = -(log_names * names[shown.flatten()]).sum(dim=-1)
    weight = torch.where(shown.flatten() == 0, _NOTHING_WEIGHT, 1.0)
    return (surprise * weight).sum() / weight.sum()


def _asked_loss(policy: OpenVLAOFT, image: Tensor, asked: Tensor, vocabulary: Vocabulary) -> Tensor:
    head = policy.language_model.lm_head.weight
    known = asked >= 0
    surplus = image[known] @ (head[vocabulary.word("yes")] - head[vocabulary.word("no")])
    wanted = asked[known].to(surplus.dtype)
    weight = torch.where(wanted > 0, 1.0, _NOTHING_WEIGHT)
    surprise = functional.binary_cross_entropy_with_logits(surplus, wanted, reduction="none")
    return (surprise * weight).sum() / weight.sum().clamp(min=1)


def _answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    log_likelihood = functional.log_softmax(logits.float(), dim=-1)
    number = (targets >= _FIRST_ACTION) & (targets < TOKENIZER_SIZE)
    words = -log_likelihood[~number].gather(1, targets[~number][:, None]).sum()
    distance = torch.arange(_FIRST_ACTION, TOKENIZER_SIZE)[None] - targets[number][:, None]
    wanted = functional.softmax(-0.5 * (distance / _BIN_DEVIATION) ** 2, dim=-1)
    numbers = -(log_likelihood[number, _FIRST_ACTION:TOKENIZER_SIZE] * wanted).sum()
    return (words + numbers) / len(targets)


def _mark(kind: str, logits: Tensor, targets: Tensor) -> tuple[float | None, bool]:
    if targets[0] < _FIRST_ACTION:
        return None, bool((logits.argmax(dim=-1) == targets).all())
    likely = logits[:, _FIRST_ACTION:TOKENIZER_SIZE].argmax(dim=-1) + _FIRST_ACTION
    decode = Vocabulary.numbers.decode
    distances = np.linalg.norm(_places(kind, decode(likely)) - _places(kind, decode(targets)), axis=1)
    return float(distances.mean()), bool((distances < _NEAR).all())
