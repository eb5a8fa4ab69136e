"""Questions about a labelled picture, in OpenVLA's prompt format, with answers as words and quantised numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tiny_base.scenes import GRIPPER, Thing

Random = np.random.Generator
Pieces = tuple["str | float", ...]

REACH = 0.5
"""Metres that an offset's number 1 stands for."""
NAME_SLOTS = 4
"""Answer slots of a name; what is left over is filled with stop tokens."""

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_CARRY = (
    "pick up the {} and place it in the {}",
    "pick up the {} and place it on the {}",
    "put the {} on the {}",
    "put the {} in the {}",
    "put the {} on top of the {}",
    "place the {} next to the {}",
    "push the {} to the front of the {}",
    "move the {} to the {}",
)
_REACH_FOR = ("pick up the {}", "grasp the {}", "reach for the {}", "push the {}", "lift the {}", "open the {}")
_SIDES = (("left of", 0, -1), ("right of", 0, 1), ("behind", 1, -1), ("in front of", 1, 1))


@dataclass(frozen=True)
class Question:
    """One question and its answer. Numbers lie in [-1, 1] and become action tokens."""

    kind: str
    prompt: Pieces
    answer: Pieces
    """A number, or a word (or several, see `NAME_SLOTS`) for each slot."""
    asked: tuple[str, ...] = ()
    """Names of the things whose places are asked for."""
    picture: int = 0
    """Which picture they are looked for in."""


class NotAskable(Exception):
    """The picture does not show what a kind of question needs."""


@dataclass(frozen=True)
class View:
    """What can be asked about one input: its pictures after cropping."""

    things: tuple[Thing, ...]
    """Of the first picture."""
    second: tuple[Thing, ...] = ()
    """Of the second picture, where there is one."""


def kinds() -> list[str]:
    """Every kind of question."""
    return list(_KINDS)


def ask(view: View, names: Sequence[str], random: Random) -> Question:
    """Draws a question. There is always one: whether something is there can be asked of any picture.

    Args:
        view: what the pictures show.
        names: every name that occurs anywhere, to ask for what is not there.
        random: source of chance.
    """
    chances = np.array([chance for _, chance in _KINDS.values()])
    for kind in random.choice(list(_KINDS), size=8, p=chances / chances.sum()):
        try:
            return _KINDS[str(kind)][0](view, names, random)
        except NotAskable:
            continue
    return _exists(view, names, random)


def templates() -> Iterator[str]:
    """Every word that prompts and answers are made of, but for the names."""
    yield from (*_CARRY, *_REACH_FOR, *(side for side, _, _ in _SIDES), *_NUMBERS, "yes", "no", "nothing", GRIPPER)
    yield "In: where is the and the in the wrist picture? Out: how far is the from the gripper?"
    yield "what action should the robot take to? what is at? is there a? how many are there? what is nearest to the?"


def image_number(fraction: float) -> float:
    """Place along an image's side, 0..1, as a number in [-1, 1]."""
    return 2 * fraction - 1


def offset_numbers(offset: Sequence[float]) -> tuple[float, ...]:
    """Offset in m as numbers in [-1, 1]; what is further than `REACH` is clipped."""
    return tuple(float(np.clip(value / REACH, -1, 1)) for value in offset)


def _unique(things: Sequence[Thing]) -> list[Thing]:
    names = [thing.name for thing in things]
    return [thing for thing in things if names.count(thing.name) == 1]


def _draw(things: Sequence[Thing], count: int, random: Random) -> list[Thing]:
    if len(things) < count:
        raise NotAskable
    return [things[index] for index in random.permutation(len(things))[:count]]


def _objects(view: View) -> list[Thing]:
    return [thing for thing in _unique(view.things) if thing.name != GRIPPER]


def _list(things: Sequence[Thing]) -> str:
    return " and ".join(f"the {thing.name}" for thing in things)


def _names(things: Sequence[Thing]) -> tuple[str, ...]:
    return tuple(thing.name for thing in things)


def _question(text: str) -> Pieces:
    return (f"In: {text}?\nOut: ",)


def _centres(things: Sequence[Thing]) -> Pieces:
    return tuple(image_number(value) for thing in things for value in thing.centre)


def _where(view: View, names: Sequence[str], random: Random) -> Question:
    unique = _unique(view.things)
    chosen = _draw(unique, min(len(unique), int(random.integers(1, 4))), random)
    if not chosen:
        raise NotAskable
    return Question("where", _question(f"Where is {_list(chosen)}"), _centres(chosen), _names(chosen))


def _where_second(view: View, names: Sequence[str], random: Random) -> Question:
    chosen = _draw(_unique(view.second), 1, random)
    prompt = _question(f"Where is {_list(chosen)} in the wrist picture")
    return Question("where_second", prompt, _centres(chosen), _names(chosen), picture=1)


def _offset(view: View, names: Sequence[str], random: Random) -> Question:
    chosen = _draw(_objects(view), 1, random)
    prompt = _question(f"How far is {_list(chosen)} from the gripper")
    return Question("offset", prompt, offset_numbers(chosen[0].offset), _names(chosen))


def _carry(view: View, names: Sequence[str], random: Random) -> Question:
    what, to = _draw(_objects(view), 2, random)
    task = str(random.choice(_CARRY)).format(what.name, to.name)
    way = [there - here for there, here in zip(to.offset, what.offset, strict=True)]
    prompt = _question(f"What action should the robot take to {task}")
    return Question("carry", prompt, (*offset_numbers(what.offset), *offset_numbers(way)), _names([what, to]))


def _reach_for(view: View, names: Sequence[str], random: Random) -> Question:
    (what,) = _draw(_objects(view), 1, random)
    task = str(random.choice(_REACH_FOR)).format(what.name)
    prompt = _question(f"What action should the robot take to {task}")
    return Question("reach_for", prompt, offset_numbers(what.offset), _names([what]))


def _at(view: View, names: Sequence[str], random: Random) -> Question:
    (what,) = _draw([thing for thing in view.things if thing.box], 1, random)
    return Question("at", ("In: What is at", *_centres([what]), "?\nOut: "), (what.name,))


def _exists(view: View, names: Sequence[str], random: Random) -> Question:
    seen = sorted({thing.name for thing in view.things} - {GRIPPER})
    unseen = [name for name in names if name not in seen]
    there = bool(seen) and (not unseen or random.random() < 0.5)
    name = str(random.choice(seen if there else unseen))
    return Question("exists", _question(f"Is there a {name}"), ("yes" if there else "no",))


def _side(view: View, names: Sequence[str], random: Random) -> Question:
    one, other = _draw(_unique(view.things), 2, random)
    side, axis, sign = _SIDES[random.integers(len(_SIDES))]
    holds = sign * (one.centre[axis] - other.centre[axis]) > 0
    prompt = _question(f"Is the {one.name} {side} the {other.name}")
    return Question("side", prompt, ("yes" if holds else "no",), _names([one, other]))


def _nearest(view: View, names: Sequence[str], random: Random) -> Question:
    objects = _objects(view)
    (what,) = _draw(_unique(view.things), 1, random)
    others = [thing for thing in objects if thing is not what]
    if len(others) < 2:
        raise NotAskable
    nearest = min(others, key=lambda thing: np.linalg.norm(np.subtract(thing.offset, what.offset)))
    return Question("nearest", _question(f"What is nearest to the {what.name}"), (nearest.name,))


def _count(view: View, names: Sequence[str], random: Random) -> Question:
    seen = [thing.name for thing in view.things if thing.name != GRIPPER]
    repeated = sorted({name for name in seen if seen.count(name) > 1})
    pool = repeated if repeated and random.random() < 0.5 else sorted(set(seen))
    name = str(random.choice(pool)) if pool and random.random() < 0.8 else str(random.choice(list(names)))
    return Question("count", _question(f"How many {name} are there"), (_NUMBERS[min(seen.count(name), 10)],))


_KINDS: dict[str, tuple[Callable[[View, Sequence[str], Random], Question], float]] = {
    "where": (_where, 0.30),
    "where_second": (_where_second, 0.10),
    "offset": (_offset, 0.12),
    "carry": (_carry, 0.14),
    "reach_for": (_reach_for, 0.10),
    "at": (_at, 0.06),
    "exists": (_exists, 0.06),
    "side": (_side, 0.05),
    "nearest": (_nearest, 0.03),
    "count": (_count, 0.04),
}
"""Kind of question -> how it is made, and how often it is tried."""
