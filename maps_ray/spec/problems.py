"""What is wrong with a spec: every problem found, each with its field, its value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from maps_ray.spec.credentials import redact, redacted


@dataclass(frozen=True)
class Problem:
    """One fault of a spec. As text it shows no credentials."""

    field: str
    """Dotted path, for instance `training.learning_rate`; empty for the file as a whole."""
    value: object
    message: str
    """What is wrong and what is allowed."""

    def __str__(self) -> str:
        shown = redact(repr(redacted(self.value)))
        if len(shown) > 200:
            shown = shown[:197] + "..."
        message = redact(self.message)
        return f"{self.field} = {shown}: {message}" if self.field else message


class SpecError(ValueError):
    """A spec that cannot run; `problems` lists every fault found. The command line exits with 2."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint naming the valid name nearest to `name`, and all of them: `did you mean 'siglip'? allowed: ...`."""
    names = list(valid)
    # Of names that differ in case alone, the first.
    lowered = {other.lower(): other for other in reversed(names)}
    matches = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.5)
    hint = f"did you mean {lowered[matches[0]]!r}? " if matches else ""
    return f"{hint}allowed: {', '.join(names)}"
