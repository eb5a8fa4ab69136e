"""`libero_object` as the authors of MAPS evaluate it, reconstructed: on the living-room table, with random placement.

Their evaluation uses the LIBERO of another project (Inspire). Its task files were not at hand; what is known of them is
that they differ from the original ones in the edits below, and that the objects lie where the reset puts them.
"""

from __future__ import annotations

import re

SUITE = "libero_object_inspire"
SOURCE = "libero_object"
"""The suite whose task files are edited."""
DRAWS = 50
"""Seeds of a reset that count as initial states; the authors take the first ten."""

_SUPPORT = "living_room_table"
_SHIFTED = ("butter", "chocolate")
_SHIFT = (-0.2, 0.2)


def inspire_task(text: str) -> str:
    """The BDDL text of an original `libero_object` task, moved from the floor to the living-room table.

    Problem, support of the regions, fixture and initial relations change; goals, objects and sentences stay. The
    regions of objects with butter or chocolate in their name move by (-0.2, 0.2) m in x and y.
    """
    text = text.replace("LIBERO_Floor_Manipulation", "LIBERO_Living_Room_Tabletop_Manipulation")
    text = re.sub(r"\bfloor\b", _SUPPORT, text)
    text = re.sub(r"\(On (\w+) floor_", rf"(On \1 {_SUPPORT}_", text)
    for thing, region in re.findall(rf"\(On (\w+) {_SUPPORT}_(\w+)\)", text):
        if any(word in thing for word in _SHIFTED):
            text = re.sub(rf"(\({region}\s.*?\(:ranges \(\s*\()([^)]*)", _moved, text, count=1, flags=re.S)
    return text


def _moved(match: re.Match[str]) -> str:
    x0, y0, x1, y1 = (float(number) for number in match[2].split())
    dx, dy = _SHIFT
    return match[1] + " ".join(f"{value:.6g}" for value in (x0 + dx, y0 + dy, x1 + dx, y1 + dy))
