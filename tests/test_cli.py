"""The command line where its surroundings are odd: no working directory, a terminal without colour or letters."""

from __future__ import annotations

import importlib
import io
import sys
from pathlib import Path

import pytest

from maps_ray import cli, exit_codes


def test_a_working_directory_that_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setattr(sys, "argv", ["maps-ray", "check", "spec.yaml"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == exit_codes.REFUSED
    assert capsys.readouterr().err == "the working directory was removed: cd to one that is there\n"


def test_a_locale_that_knows_ascii_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    monkeypatch.setattr(cli, "app", lambda: print("Wähle \u7c73 \udce9"))
    cli.main()
    assert written.getvalue() == b"W\\xe4hle \\u7c73 \\udce9\n"


@pytest.mark.parametrize(("value", "coloured"), [("", True), ("1", False)])
def test_no_color(monkeypatch: pytest.MonkeyPatch, value: str, coloured: bool) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("NO_COLOR", value)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    exit_codes.failed("it failed")
    assert ("\x1b[31m" in terminal.getvalue()) == coloured and "it failed" in terminal.getvalue()


def test_a_submission_is_called_as_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "jobs"))
    name_of = importlib.import_module("submit").name_of
    spec = tmp_path / "spec.yaml"
    spec.write_text("name: 2026-11-28\ndata: {path: $ONLY_ON_THE_CLUSTER}\n")
    assert name_of(spec, []) == "2026-11-28"
    assert name_of(spec, ["--set", "training.seed=1", "--set", "name=other", "--resume"]) == "other"
    assert name_of(spec, ["--set=name=third"]) == "third"


def test_a_file_system_that_refuses_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(cli, "app", lambda: (tmp_path / "gone" / "report.html").write_text(""))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == exit_codes.FAILED
    assert capsys.readouterr().err == f"{tmp_path}/gone/report.html: No such file or directory\n"
