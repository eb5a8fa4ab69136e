"""CALVIN's published chains (arXiv:2112.03227): 1000 starts with five instructions each, made anew from their seeds.

As `calvin_agent.evaluation.multistep_sequences.get_sequences` makes them: every start of the scene gets its share of
chains, drawn with the number of the start as seed, and all are shuffled with seed 0. No simulator is needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np

State = Mapping[str, object]
LENGTH = 5

_COLOURS = ("red", "blue", "pink")
_SLIDER = ("slider_right", "slider_left")
_STARTS: Mapping[str, tuple[object, ...]] = {
    "led": (0, 1),
    "lightbulb": (0, 1),
    "slider": ("right", "left"),
    "drawer": ("closed", "open"),
    **{f"{colour}_block": ("table", *_SLIDER) for colour in _COLOURS},
    "grasped": (0,),
}


def _rules() -> Iterator[tuple[str, int, list[tuple[State, State]]]]:
    """Name of an instruction, its category, and what must hold before it with what it changes, in CALVIN's order."""
    free = {"grasped": 0}
    for what in ("rotate", "push"):
        for colour, side in itertools.product(_COLOURS, ("right", "left")):
            block = {f"{colour}_block": "table"}
            yield f"{what}_{colour}_block_{side}", 1, [({**block, **free}, block)]
    for number, (thing, moves) in enumerate((("slider", ("right", "left")), ("drawer", ("closed", "open"))), 2):
        for name, before, after in zip(
            ("move_slider_left", "move_slider_right") if thing == "slider" else ("open_drawer", "close_drawer"),
            moves,
            reversed(moves),
            strict=True,
        ):
            yield name, number, [({thing: before, **free}, {thing: after})]
    for name in (f"{colour}_block" for colour in _COLOURS):
        held: State = {name: "grasped", "grasped": 1}
        yield f"lift_{name}_table", 4, [({name: "table", **free}, held)]
        # Behind the slider lies what is on the side that it does not cover.
        sides = (("slider_left", "right"), ("slider_right", "left"))
        yield f"lift_{name}_slider", 5, [({name: at, "slider": slider, **free}, held) for at, slider in sides]
        yield f"lift_{name}_drawer", 6, [({name: "drawer", "drawer": "open", **free}, held)]
    held_blocks = [(f"{colour}_block", {f"{colour}_block": "grasped", "grasped": 1}) for colour in _COLOURS]
    yield (
        "place_in_slider",
        7,
        [
            ({**held, "slider": side}, {block: f"slider_{side}", **free})
            for block, held in held_blocks
            for side in ("right", "left")
        ],
    )
    yield "place_in_drawer", 7, [({**held, "drawer": "open"}, {block: "drawer", **free}) for block, held in held_blocks]
    pairs = [(f"{one}_block", f"{two}_block") for one, two in itertools.permutations(_COLOURS, 2)]
    stacked = [{top: "stacked_top", bottom: "stacked_bottom"} for top, bottom in pairs]
    yield (
        "stack_block",
        10,
        [
            ({top: "grasped", bottom: "table", "grasped": 1}, {**after, **free})
            for (top, bottom), after in zip(pairs, stacked, strict=True)
        ],
    )
    yield (
        "unstack_block",
        11,
        [({**before, **free}, dict.fromkeys(pair, "table")) for pair, before in zip(pairs, stacked, strict=True)],
    )
    for light in ("lightbulb", "led"):
        yield f"turn_on_{light}", 8, [({light: 0, **free}, {light: 1})]
        yield f"turn_off_{light}", 8, [({light: 1, **free}, {light: 0})]
    yield (
        "push_into_drawer",
        9,
        [
            (
                {f"{c}_block": "table" if c == colour else _SLIDER for c in _COLOURS} | {"drawer": "open", **free},
                {f"{colour}_block": "drawer", **free},
            )
            for colour in _COLOURS
        ],
    )


RULES = {name: (category, cases) for name, category, cases in _rules()}


class Chains:
    """The published chains, each made when it is asked for: about 4000 draws give one that can be carried out.

    Args:
        count: 1000 are published; others are what upstream gives for that number.
    """

    def __init__(self, count: int = 1000) -> None:
        self._starts = [
            dict(zip(_STARTS, values, strict=True))
            for values in itertools.product(*_STARTS.values())
            if values.count("table") in (1, 2) and all(values.count(side) < 2 for side in _SLIDER)
        ]
        shares = [len(share) for share in np.array_split(np.arange(count), len(self._starts))]
        self._places = [(start, number) for start, share in enumerate(shares) for number in range(share)]
        # Not a `Generator`: upstream draws from numpy's legacy stream, which NEP 19 keeps as it is.
        np.random.RandomState(0).shuffle(self._places)
        self._drawn: dict[int, list[tuple[str, ...]]] = {}
        self._drawers = [_draw(start, np.random.RandomState(seed)) for seed, start in enumerate(self._starts)]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[State, tuple[str, ...]]:
        """Start of the scene, and the names of five instructions."""
        start, number = self._places[index]
        drawn = self._drawn.setdefault(start, [])
        while len(drawn) <= number:
            drawn.append(next(self._drawers[start]))
        return dict(self._starts[start]), drawn[number]


def follows(start: State, chain: tuple[str, ...]) -> bool:
    """Whether each instruction can be carried out in one way after those before it, and no two are of one category."""
    state = start
    for name in chain:
        after = [effect for before, effect in RULES[name][1] if _holds(state, before)]
        if len(after) != 1:
            return False
        state = {**state, **after[0]}
    return len({RULES[name][0] for name in chain}) == len(chain)


def _draw(start: State, random: np.random.RandomState) -> Iterator[tuple[str, ...]]:
    names = list(RULES)
    while True:
        chain = tuple(names[index] for index in random.choice(len(names), LENGTH, replace=False))
        if follows(start, chain):
            yield chain


def _holds(state: State, condition: State) -> bool:
    return all(
        state[name] in wanted if isinstance(wanted, tuple) else state[name] == wanted
        for name, wanted in condition.items()
    )
