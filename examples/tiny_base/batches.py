"""From pictures and questions to tensors: cropping, colours, tokens, answer slots, names of patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from maps_ray.models.openvla_oft.tiny import ACTION_BINS, IMAGE_STATISTICS, TOKENIZER_SIZE
from maps_ray.models.openvla_oft.tokens import ActionTokenizer
from tiny_base.questions import NAME_SLOTS, Question, Random, View, ask
from tiny_base.scenes import Picture, Scenes, Thing

STOP = 2
_SMALLEST_CROP = 0.8
_COLOUR = 0.2

Window = tuple[float, float, float]
"""Part of a picture that is kept: left, top and side, as fractions."""
WHOLE: Window = (0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Batch:
    """B inputs of one or two pictures with Q questions each."""

    pixel_values: Tensor
    """(B, 6 * pictures, H, W) float, normalised for both towers."""
    input_ids: Tensor
    """(B * Q, L) int64: BOS, prompt, answer slots, stop token, padding; the questions of one input are neighbours."""
    attention_mask: Tensor
    """(B * Q, L) bool."""
    slots: Tensor
    """(B * Q, L) bool: where the answers stand."""
    patch_names: Tensor
    """(B, pictures * patches) int64: row of `Vocabulary.names` that a patch shows, 0 for none."""
    asked: Tensor
    """(B * Q, pictures * patches) int64: 1 where a patch shows what the question asks for, 0 where not, -1 everywhere
    when it asks for no place."""
    questions: tuple[Question, ...]
    """B * Q."""


class Vocabulary:
    """Words and numbers as token ids."""

    numbers = ActionTokenizer(TOKENIZER_SIZE, ACTION_BINS)
    """Numbers in [-1, 1] are action tokens, by OpenVLA's rule (arXiv 2406.09246, section 3.2)."""

    def __init__(self, tokenizer: Tokenizer, names: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.names = ["nothing", *names, "gripper"]
        """What a patch may show; the first stands for none of the others."""
        self._encode = lru_cache(maxsize=100_000)(lambda text: tokenizer.encode(text, add_special_tokens=False).ids)
        self.distributions = torch.zeros(len(self.names), TOKENIZER_SIZE)
        """(names, vocabulary) float: for each name its tokens with equal weights."""
        for row, name in enumerate(self.names):
            ids = torch.tensor(self._encode(name))
            self.distributions[row].index_add_(0, ids, torch.full((len(ids),), 1 / len(ids)))

    def word(self, text: str) -> int:
        """The id of a word that is one token."""
        (token,) = self._encode(text)
        return token

    def prompt(self, question: Question) -> list[int]:
        """BOS and the prompt."""
        ids = [1]
        for piece in question.prompt:
            ids += self._encode(piece) if isinstance(piece, str) else [int(self.numbers.encode(piece))]
        return ids

    def answer(self, question: Question) -> list[int]:
        """One id for each answer slot."""
        ids: list[int] = []
        for piece in question.answer:
            if not isinstance(piece, str):
                ids.append(int(self.numbers.encode(piece)))
            elif piece in self.names:
                ids += (self._encode(piece) + [STOP] * NAME_SLOTS)[:NAME_SLOTS]
            else:
                ids += self._encode(piece)
        return ids


def make_batch(
    scenes: Scenes,
    vocabulary: Vocabulary,
    rows: Sequence[int],
    random: Random,
    *,
    image_size: int,
    patch_size: int,
    questions_each: int,
    second: bool = False,
    augment: bool = True,
) -> Batch:
    """Draws crops, colours and questions for some pictures.

    Args:
        scenes: where the pictures are.
        vocabulary: for the tokens.
        rows: pictures; with `second` each must have a partner.
        random: source of chance; the same state gives the same batch.
        image_size: side of the model's input in pixels.
        patch_size: side of a patch in pixels.
        questions_each: questions for each input.
        second: add each picture's wrist view as a second image.
        augment: crop and change colours; else whole pictures as they are.
    """
    views: list[View] = []
    shown: list[int] = []
    windows: list[Window] = []
    names: list[Tensor] = []
    for row in rows:
        picture = scenes.pictures[row]
        pictures = [picture, scenes.pictures[_partner(picture)]] if second else [picture]
        kept = []
        for one in pictures:
            window = _draw_window(random) if augment else WHOLE
            things = crop(one.things, window)
            kept.append(things)
            windows.append(window)
            shown.append(one.index)
            names.append(_name_patches(things, vocabulary, image_size // patch_size))
        views.append(View(*kept))
    images = torch.from_numpy(scenes.images[shown]).permute(0, 3, 1, 2).float() / 255
    images = _cut(images, windows, image_size) if augment else _resize(images, image_size)
    if augment:
        images = _recolour(images, random)
    questions = [ask(view, scenes.names, random) for view in views for _ in range(questions_each)]
    input_ids, attention_mask, slots = _tokens(questions, vocabulary)
    patch_names = torch.stack(names).reshape(len(rows), -1)
    patches = patch_names.repeat_interleave(questions_each, dim=0)
    return Batch(
        pixel_values=normalise(images).reshape(len(rows), -1, image_size, image_size),
        input_ids=input_ids,
        attention_mask=attention_mask,
        slots=slots,
        patch_names=patch_names,
        asked=torch.stack(
            [_asked(*pair, vocabulary, names[0].numel()) for pair in zip(questions, patches, strict=True)]
        ),
        questions=tuple(questions),
    )


def crop(things: Sequence[Thing], window: Window) -> tuple[Thing, ...]:
    """The things whose centre stays in the window, in its coordinates; boxes are cut at its border."""
    left, top, side = window
    kept = []
    for thing in things:
        centre = ((thing.centre[0] - left) / side, (thing.centre[1] - top) / side)
        if not all(0 <= value <= 1 for value in centre):
            continue
        box = None
        if thing.box is not None:
            x0, y0, x1, y1 = np.clip((np.array(thing.box) - (left, top, left, top)) / side, 0, 1).tolist()
            box = (x0, y0, x1, y1)
        kept.append(replace(thing, centre=centre, box=box))
    return tuple(kept)


def normalise(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] -> (N, 6, H, W), for DINOv2 and for SigLIP."""
    towers = [
        (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(deviation).view(3, 1, 1)
        for mean, deviation in IMAGE_STATISTICS
    ]
    return torch.cat(towers, dim=1)


def _partner(picture: Picture) -> int:
    if picture.partner is None:
        raise ValueError(f"picture {picture.index} has no wrist view")
    return picture.partner


def _draw_window(random: Random) -> Window:
    side = random.uniform(_SMALLEST_CROP, 1)
    return random.uniform(0, 1 - side), random.uniform(0, 1 - side), side


def _resize(images: Tensor, size: int) -> Tensor:
    resized = functional.interpolate(images, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(0, 1)


def _cut(images: Tensor, windows: Sequence[Window], size: int) -> Tensor:
    left, top, side = torch.tensor(windows).unbind(dim=1)
    # Corners of the sampled square in grid_sample's coordinates, -1 to 1 over the picture.
    zero = torch.zeros_like(side)
    rows = [torch.stack([side, zero, 2 * left + side - 1], 1), torch.stack([zero, side, 2 * top + side - 1], 1)]
    grid = functional.affine_grid(torch.stack(rows, 1).float(), [len(images), 3, size, size], align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _recolour(images: Tensor, random: Random) -> Tensor:
    """Random brightness, contrast and saturation, each on its own for every image."""
    brightness, contrast, saturation = (
        torch.from_numpy(random.uniform(1 - _COLOUR, 1 + _COLOUR, size=(3, len(images), 1, 1, 1))).float().unbind(0)
    )
    images = images * brightness
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = mean + (images - mean) * contrast
    grey = images.mean(dim=1, keepdim=True)
    return (grey + (images - grey) * saturation).clamp(0, 1)


def _name_patches(things: Sequence[Thing], vocabulary: Vocabulary, across: int) -> Tensor:
    """(across ** 2,) int64: for each patch the thing that fills most of it, or of which most lies in it."""
    edges = np.arange(across + 1) / across
    best = np.full((across, across), 0.5)
    names = np.zeros((across, across), dtype=np.int64)
    for thing in things:
        x0, y0, x1, y1 = thing.box or (*thing.centre, *thing.centre)
        half = 0.25 / across if thing.box is None else 0.0
        x0, y0, x1, y1 = x0 - half, y0 - half, x1 + half, y1 + half
        width = np.clip(np.minimum(edges[1:], x1) - np.maximum(edges[:-1], x0), 0, None)
        height = np.clip(np.minimum(edges[1:], y1) - np.maximum(edges[:-1], y0), 0, None)
        smaller = min((x1 - x0) * (y1 - y0), 1 / across**2)
        share = np.outer(height, width) / max(smaller, 1e-9)
        column, row = (min(int(value * across), across - 1) for value in thing.centre)
        share[row, column] = max(share[row, column], 0.51)
        # A small thing before a large one: it stands on it or in front of it.
        share = np.where(share > 0.5, share + 1 / (1 + 100 * (x1 - x0) * (y1 - y0)), 0)
        names[share > best] = vocabulary.names.index(thing.name)
        best = np.maximum(best, share)
    return torch.from_numpy(names.reshape(-1))


def _asked(question: Question, patch_names: Tensor, vocabulary: Vocabulary, patches: int) -> Tensor:
    """(pictures * patches,) int64, see `Batch.asked`."""
    if not question.asked:
        return torch.full_like(patch_names, -1)
    rows = torch.tensor([vocabulary.names.index(name) for name in question.asked])
    picture = torch.arange(len(patch_names)) // patches
    return (torch.isin(patch_names, rows) & (picture == question.picture)).long()


def _tokens(questions: Sequence[Question], vocabulary: Vocabulary) -> tuple[Tensor, Tensor, Tensor]:
    prompts = [vocabulary.prompt(question) for question in questions]
    answers = [vocabulary.answer(question) for question in questions]
    length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)) + 1
    input_ids = torch.full((len(questions), length), TOKENIZER_SIZE)
    slots = torch.zeros(len(questions), length, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = [*prompt, *answer, STOP]
        input_ids[row, : len(ids)] = torch.tensor(ids)
        slots[row, len(prompt) : len(prompt) + len(answer)] = True
    return input_ids, input_ids != TOKENIZER_SIZE, slots
