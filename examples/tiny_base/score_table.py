"""Scores before and after pretraining, as a Markdown table."""

from __future__ import annotations

from typing import Any

_WHAT = {
    "where": "Where is the .. (and the ..)? (1-3 places in the picture)",
    "where_second": "Where is the .. in the wrist picture?",
    "offset": "How far is the .. from the gripper? (x, y, z)",
    "carry": "What action should the robot take to put the .. on the ..? (two offsets)",
    "reach_for": "What action should the robot take to pick up the ..? (offset)",
    "at": "What is at (x, y)?",
    "exists": "Is there a ..?",
    "side": "Is the .. left of the ..?",
    "nearest": "What is nearest to the ..?",
    "count": "How many .. are there?",
}


def table(summary: dict[str, Any]) -> str:
    """A Markdown table of what `pretrain` returns."""
    before, after = summary["before"], summary["after"]
    rows = [
        "| on held-out pictures | questions | always the same answer | before | after |",
        "|---|---:|---:|---:|---:|",
        f"| mean cross-entropy of the answer slots | | | {before['answer_loss']:.3f} | {after['answer_loss']:.3f} |",
        f"| patches named rightly, of those that show something | | | {before['naming']:.1%} | {after['naming']:.1%} |",
        f"| questions for a place: the patch that most says yes shows it | | | {before['pointing']:.1%} "
        f"| {after['pointing']:.1%} |",
    ]
    for kind, what in _WHAT.items():
        if kind not in after["questions"]:
            continue
        old, new = before["questions"][kind], after["questions"][kind]
        scores = " | ".join(_score(kind, score) for score in (summary["constant"][kind], old, new))
        rows.append(f"| {what} | {new['questions']} | {scores} |")
    return "\n".join(rows)


def _score(kind: str, score: dict[str, Any]) -> str:
    right = f"{score['accuracy']:.1%}"
    if score["error"] is None:
        return right
    unit = f"{score['error']:.3f} sides" if kind.startswith("where") else f"{100 * score['error']:.1f} cm"
    return f"{unit}, {right} within {'0.1' if kind.startswith('where') else '10 cm'}"
