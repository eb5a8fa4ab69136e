"""Which way an objective is better; the only place that knows it."""

from __future__ import annotations

_MAXIMISED = "/success"


def maximised(name: str) -> bool:
    """Whether more of a metric is better: success rates; all other metrics are errors."""
    return name.endswith(_MAXIMISED)


def cost(name: str, value: float) -> float:
    """A metric's value as something of which less is better."""
    return -value if maximised(name) else value


def best_word(name: str) -> str:
    """What the best value of a metric is called."""
    return "most" if maximised(name) else "least"


def aims(names: tuple[str, ...]) -> str:
    """In words: `minimising a, b, maximising c`."""
    groups = {"minimising": [n for n in names if not maximised(n)], "maximising": [n for n in names if maximised(n)]}
    return ", ".join(f"{word} {', '.join(group)}" for word, group in groups.items() if group)
