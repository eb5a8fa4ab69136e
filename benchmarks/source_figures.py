"""What the source tree is like, at several revisions beside each other.

    python benchmarks/source_figures.py                 # the working tree
    python benchmarks/source_figures.py v0.1.0 HEAD     # revisions of git

Of `maps_ray/`: files and lines; the median length of a file, the share of files below 100 lines, the longest; lines
that are comments, as a share of lines with code or comments; mentions of `Any` outside imports.
"""

from __future__ import annotations

import argparse
import io
import statistics
import subprocess
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "maps_ray"


def sources(revision: str | None) -> dict[str, str]:
    """Path -> text of every Python file of the package."""
    if revision is None:
        return {str(path): path.read_text() for path in sorted((ROOT / PACKAGE).rglob("*.py"))}

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout

    names = git("ls-tree", "-r", "--name-only", revision, PACKAGE).splitlines()
    return {name: git("show", f"{revision}:{name}") for name in names if name.endswith(".py")}


def figures(files: dict[str, str]) -> dict[str, str]:
    """The row of one revision."""
    lengths = [text.count("\n") for text in files.values()]
    comments, code, untyped = 0, 0, 0
    for text in files.values():
        commented, filled = set(), set()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                commented.add(token.start[0])
            elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
                filled.update(range(token.start[0], token.end[0] + 1))
            if token.type == tokenize.NAME and token.string == "Any" and "import" not in token.line:
                untyped += 1
        comments += len(commented)
        code += len(commented | filled)
    return {
        "files": str(len(files)),
        "lines": f"{sum(lengths):,}",
        "median": f"{statistics.median(lengths):.0f}",
        "below 100": f"{sum(length < 100 for length in lengths) / len(lengths):.0%}",
        "longest": str(max(lengths)),
        "comments": f"{comments / code:.1%}",
        "Any": str(untyped),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", nargs="*", metavar="REVISION")
    chosen: list[str | None] = [*parser.parse_args().revisions] or [None]
    rows = {revision or "working tree": figures(sources(revision)) for revision in chosen}
    columns = ["revision", *next(iter(rows.values()))]
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for revision, row in rows.items():
        print(f"| {revision} | " + " | ".join(row.values()) + " |")


if __name__ == "__main__":
    main()
