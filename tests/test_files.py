"""Files that several processes read and write."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
from pathlib import Path

import pytest

from maps_ray.files import append_line, file_lock, read_json, read_lines, replaced, take_lock, write_json


def test_a_file_that_failed_leaves_the_old_one_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    write_json(path, {"value": 1})
    with pytest.raises(OSError, match="no space"), replaced(path) as partial:
        partial.write_text("half")
        raise OSError("no space")
    assert read_json(path) == {"value": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "shared.txt"
    with replaced(path, shared=True) as first, replaced(path, shared=True) as second:
        first.write_text("first")
        second.write_text("second")
    assert first != second
    assert path.read_text() == "first"  # whose block ended last


def test_a_line_cut_short_swallows_no_other(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append_line(path, {"line": 1})
    with path.open("a") as file:
        file.write('{"line": 2, "cut')
    append_line(path, {"line": 3}, durable=True)
    assert read_lines(path) == [{"line": 1}, {"line": 3}]
    assert [json.loads(line)["line"] for line in path.read_text().splitlines()[::2]] == [1, 3]
    assert read_lines(tmp_path / "missing.jsonl") == []


def _try(path: Path, got: multiprocessing.SimpleQueue[bool]) -> None:
    with file_lock(path, wait_s=0.1) as mine:
        got.put(mine)


def test_a_lock_is_one_processs_alone_and_goes_with_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()

    def ask() -> bool:
        process = context.Process(target=_try, args=(tmp_path / "lock", answers))
        process.start()
        process.join()
        return bool(answers.get())

    with file_lock(tmp_path / "lock", wait_s=0) as mine:
        assert mine
        assert not ask()
    assert ask()


def test_a_file_system_without_locks_is_no_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (tmp_path / "lock").open("w") as file:
        assert take_lock(file, wait_s=0)
