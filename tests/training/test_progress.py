"""The progress file and what the driver makes of it."""

from __future__ import annotations

import errno
import io
import sys
from pathlib import Path

import pytest

from maps_ray.training.progress import ProgressBar, ProgressWriter, read_progress


def test_the_file_is_written_at_most_once_in_an_interval_and_at_each_phase(tmp_path: Path) -> None:
    writer = ProgressWriter(tmp_path, max_steps=9, interval_s=1000)
    assert read_progress(tmp_path) == {}
    writer.write("training", 1, loss=0.5)
    writer.write("training", 2, loss=0.4)
    assert read_progress(tmp_path) == {"phase": "training", "step": 1, "max_steps": 9, "loss": 0.5}
    writer.write("saving a checkpoint", 2)
    assert read_progress(tmp_path) == {"phase": "saving a checkpoint", "step": 2, "max_steps": 9}


def test_a_log_gets_a_line_for_each_phase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(tmp_path, 9, "run") as bar:
        for step in (1, 2, 3):
            bar.update(
                {"phase": "training", "step": step, "loss": 0.25, "samples_per_second": 3.0, "seconds_left": 3725}
            )
        bar.update({"phase": "evaluating ood", "step": 3})
    assert read_progress(tmp_path) == {"phase": "evaluating ood", "step": 3, "max_steps": 9}
    assert capsys.readouterr().err.splitlines() == [
        "run: starting Ray",
        "run: training  step 1/9  loss 0.2500  3.0 samples/s  1:02:05 left",
        "run: evaluating ood  step 3/9",
    ]


def test_nothing_is_shown_when_not_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(tmp_path, 9, "run", shown=False) as bar:
        bar.say("waiting")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_that_has_gone_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    class Gone(io.StringIO):
        gone = False

        def isatty(self) -> bool:
            return terminal

        def write(self, text: str) -> int:
            if self.gone:
                raise OSError(errno.EIO, "Input/output error")
            return super().write(text)

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stderr := Gone())
    with ProgressBar(tmp_path, 9, "run") as bar:
        stderr.gone = True
        bar.say("waiting")
        bar.update({"phase": "training", "step": 1})
    assert read_progress(tmp_path) == {"phase": "training", "step": 1, "max_steps": 9}
