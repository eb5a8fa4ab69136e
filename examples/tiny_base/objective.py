"""What pretraining minimises and how well a policy answers: cross-entropy in parallel answer slots and on patches."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from maps_ray.models.openvla_oft.model import OpenVLAOFT
from maps_ray.models.openvla_oft.tiny import ACTION_BINS, TOKENIZER_SIZE
from tiny_base.batches import Batch, Vocabulary
from tiny_base.questions import REACH

PATCH_WEIGHT = 0.7
ASKED_WEIGHT = 1.0
PLACES_WEIGHT = 0.5
# Patches say after this many layers whether they are asked for: the layers above can then read it at the slots.
_ASKED_LAYERS = 3
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
    """Weighted mean cross-entropy of yes or no for each patch: does it show what is asked for? Read from the image
    tokens half way through the language model."""
    places: Tensor
    """Mean cross-entropy of each patch's own place: its column half way through the language model, its row at the end.
    Without it image tokens keep little of where they are, and the slots find nothing to read."""


class MiddleStates(threading.local):
    """The states half way through a policy's language model, of each thread's last forward pass."""

    states: Tensor

    @classmethod
    @contextmanager
    def of(cls, policy: OpenVLAOFT) -> Iterator[MiddleStates]:
        """Watches the policy while the context lasts."""
        middle = cls()

        def keep(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            middle.states = output

        hook = policy.language_model.model.layers[_ASKED_LAYERS - 1].register_forward_hook(keep)
        try:
            yield middle
        finally:
            hook.remove()


class Evaluation(NamedTuple):
    """How well a policy knows what it was pretrained on."""

    answer_loss: float
    """Mean cross-entropy of the answer slots, over questions."""
    naming: float
    """Part of the patches that show something which are named rightly: the whole name is likelier than any other."""
    pointing: float
    """Part of the questions for places where the patch that most says yes shows what is asked for."""
    scores: dict[str, Score]
    """Kind of question -> its score."""


@dataclass(frozen=True)
class Score:
    """How well one kind of question is answered."""

    questions: int
    error: float | None
    """Mean distance to the right place: in picture sides, or in m for offsets. None for words."""
    accuracy: float
    """Part answered rightly: every word; or every place within a tenth of the picture, or 10 cm."""


def losses(policy: OpenVLAOFT, batch: Batch, vocabulary: Vocabulary, middle: MiddleStates) -> Losses:
    """The objective of one batch.

    Args:
        policy: its towers, projector and language model are used, none of its heads.
        batch: from `make_batch`.
        vocabulary: the one that made the batch.
        middle: of this policy.
    """
    projected = _encode(policy, batch)
    count = projected.shape[1]
    each = len(batch.input_ids) // len(projected)
    patches = _patch_loss(policy.language_logits(projected), batch.patch_names, vocabulary.distributions)
    hidden = _hidden(policy, batch, projected)
    answers = _answer_loss(policy.language_logits(_before_slots(hidden, batch)), batch.input_ids[batch.slots])
    half_way = policy.language_model.model.norm(middle.states[:, 1 : 1 + count])
    asked = _asked_loss(policy, half_way, batch.asked, vocabulary)
    columns, rows = _own_places(policy, count)
    states = torch.cat([half_way[::each], hidden[::each, 1 : 1 + count]])
    targets = torch.cat([columns.repeat(len(projected)), rows.repeat(len(projected))])
    places = _answer_loss(policy.language_logits(states).flatten(0, 1), targets)
    total = answers + PATCH_WEIGHT * patches + ASKED_WEIGHT * asked + PLACES_WEIGHT * places
    return Losses(total, answers, patches, asked, places)


def alignment_losses(policy: OpenVLAOFT, batch: Batch, vocabulary: Vocabulary) -> Losses:
    """The patches' part alone, which needs no pass through the language model; the others are NaN."""
    logits = policy.language_logits(_encode(policy, batch))
    patches = _patch_loss(logits, batch.patch_names, vocabulary.distributions)
    missing = torch.tensor(float("nan"))
    return Losses(patches, missing, patches, missing, missing)


@torch.no_grad()
def evaluate(policy: OpenVLAOFT, batches: Iterable[Batch], vocabulary: Vocabulary) -> Evaluation:
    """Scores a policy on batches made by `vocabulary`."""
    losses: list[float] = []
    named: list[bool] = []
    pointed: list[bool] = []
    marks: dict[str, list[tuple[float | None, bool]]] = defaultdict(list)
    with MiddleStates.of(policy) as middle:
        for batch in batches:
            projected = _encode(policy, batch)
            hidden = _hidden(policy, batch, projected)
            half_way = policy.language_model.model.norm(middle.states[:, 1 : 1 + projected.shape[1]])
            yes = _yes_surplus(policy, half_way, vocabulary).argmax(dim=1, keepdim=True)
            pointed += (batch.asked.gather(1, yes) == 1)[(batch.asked == 1).any(dim=1)].flatten().tolist()
            log_words = functional.log_softmax(policy.language_logits(projected).float(), dim=-1)[..., :TOKENIZER_SIZE]
            likely = (log_words @ vocabulary.distributions.T).argmax(dim=-1)
            named += (likely == batch.patch_names)[batch.patch_names > 0].tolist()
            logits = policy.language_logits(_before_slots(hidden, batch))
            targets = batch.input_ids[batch.slots]
            losses += [float(_answer_loss(logits, targets))] * len(batch.questions)
            sizes = batch.slots.sum(dim=1).tolist()
            for question, given, target in zip(batch.questions, logits.split(sizes), targets.split(sizes), strict=True):
                marks[question.kind].append(_mark(question.kind, given, target))
    scores = {}
    for kind, found in sorted(marks.items()):
        errors = [error for error, _ in found if error is not None]
        accuracy = float(np.mean([correct for _, correct in found]))
        scores[kind] = Score(len(found), float(np.mean(errors)) if errors else None, accuracy)
    return Evaluation(float(np.mean(losses)), float(np.mean(named)), float(np.mean(pointed)), scores)


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


def _hidden(policy: OpenVLAOFT, batch: Batch, projected: Tensor) -> Tensor:
    """The language model's last states (B * Q, L + pictures * patches, hidden)."""
    patches = projected.repeat_interleave(len(batch.input_ids) // len(projected), dim=0)
    tokens = policy.embed_tokens(batch.input_ids, batch.slots)
    embeddings = torch.cat([tokens[:, :1], patches, tokens[:, 1:]], dim=1)
    mask = batch.attention_mask
    attended = torch.cat([mask[:, :1], mask.new_ones(patches.shape[:2]), mask[:, 1:]], dim=1)
    return policy.run_language(embeddings, attended)


def _before_slots(hidden: Tensor, batch: Batch) -> Tensor:
    """The states that predict the answer slots (slots in all, hidden): as in OpenVLA-OFT each is the one before it."""
    count = hidden.shape[1] - batch.slots.shape[1]
    return hidden[:, count:-1][batch.slots[:, 1:]]


def _own_places(policy: OpenVLAOFT, count: int) -> tuple[Tensor, Tensor]:
    """Action tokens of the columns and of the rows of `count` patches, int64."""
    across = policy.config.image_size // policy.config.dinov2.patch_size
    centres = torch.from_numpy(Vocabulary.numbers.encode(2 * (np.arange(across) + 0.5) / across - 1))
    pictures = count // across**2
    return centres.repeat(across * pictures), centres.repeat_interleave(across).repeat(pictures)


def _patch_loss(logits: Tensor, shown: Tensor, names: Tensor) -> Tensor:
    log_names = functional.log_softmax(logits.float(), dim=-1)[..., :TOKENIZER_SIZE].flatten(0, 1)
    surprise = -(log_names * names[shown.flatten()]).sum(dim=-1)
    weight = torch.where(shown.flatten() == 0, _NOTHING_WEIGHT, 1.0)
    return (surprise * weight).sum() / weight.sum()


def _yes_surplus(policy: OpenVLAOFT, states: Tensor, vocabulary: Vocabulary) -> Tensor:
    """How much likelier than no the states (..., hidden) hold yes, in logits."""
    head = policy.language_model.lm_head.weight
    return states @ (head[vocabulary.word("yes")] - head[vocabulary.word("no")])


def _asked_loss(policy: OpenVLAOFT, half_way: Tensor, asked: Tensor, vocabulary: Vocabulary) -> Tensor:
    known = asked >= 0
    surplus = _yes_surplus(policy, half_way[known], vocabulary)
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
