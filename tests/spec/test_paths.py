"""Home folders and variables in every path field, and characters that other programs stumble over."""

from __future__ import annotations

from pathlib import Path

import pytest

from maps_ray.spec import RunSpec, SpecError, dump, load_spec, read_dumped
from maps_ray.spec.paths import absolute, escape, expand, output, scratch_folder, unescape

FIELDS = ["model.checkpoint", "data.path", "cluster.storage", "tracking.credentials"]
MINIMAL = "name: run\nmodel: {checkpoint: base}\ndata: {path: demos}\n"


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("NOWHERE", raising=False)
    return tmp_path


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    file = tmp_path / "spec.yaml"
    file.write_text(MINIMAL)
    return file


def value(spec: RunSpec, field: str) -> str:
    section, name = field.split(".")
    return str(getattr(getattr(spec, section), name))


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    ("given", "below"),
    [("~/x", "home/x"), ("$SCRATCH/x", "scratch/x"), ("${SCRATCH}/a b/x", "scratch/a b/x"), ("$HOME/$$x", "home/$x")],
)
def test_home_and_variables(home: Path, spec_file: Path, field: str, given: str, below: str) -> None:
    assert value(load_spec(spec_file, [f"{field}={given}"]), field) == str(home / below)
    # In the file too, where a path is relative to it.
    section, name = field.split(".")
    text = {
        "model.checkpoint": MINIMAL.replace("base", f"'{given}'"),
        "data.path": MINIMAL.replace("demos", f"'{given}'"),
    }
    spec_file.write_text(text.get(field, MINIMAL + f"{section}: {{{name}: '{given}'}}\n"))
    assert value(load_spec(spec_file), field) == str(home / below)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("$NOWHERE/x", "the variable 'NOWHERE' is not set"),
        ("~nobody-of-that-name/x", "no home folder is known for '~nobody-of-that-name'"),
        ('"a\\nb"', "has the character '\\n'"),
        ('"a\\0b"', "has the character '\\x00'"),
        ('"\\ud800"', "has the character '\\ud800'"),
        ("x" * 256, "is too long: a name has at most 255 bytes"),
        ("é/" * 1200, "is too long: a name has at most 255 bytes, a path 3500"),
    ],
)
def test_what_cannot_be_expanded_names_the_field(
    home: Path, spec_file: Path, field: str, given: str, message: str
) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(spec_file, [f"{field}={given}"])
    assert str(caught.value).startswith(f"{field} = ") and message in str(caught.value)


@pytest.mark.parametrize(
    "name", ["a b", "50%20x", "a#b", "a?b", "[x]", 'it\'s "x"', "é&=+;,:!@(x)", "back\\slash", "$$d"]
)
def test_other_characters_stay_and_come_back(home: Path, spec_file: Path, name: str) -> None:
    fields = [f"{field}='{name.replace(chr(39), chr(39) * 2)}'" for field in FIELDS]
    spec = load_spec(spec_file, fields)
    assert spec.run_dir == Path.cwd() / name.replace("$$", "$") / "run"
    (home / "again.yaml").write_text(dump(spec))
    assert load_spec(home / "again.yaml") == spec == read_dumped(home / "again.yaml")


def test_a_relative_path_below_a_folder_with_a_dollar(
    home: Path, spec_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = home / "cost$NOWHERE"
    folder.mkdir()
    monkeypatch.chdir(folder)
    spec = load_spec(spec_file)
    assert spec.cluster.storage == folder / "runs"
    (folder / "again.yaml").write_text(dump(spec))
    assert load_spec(folder / "again.yaml") == spec


def test_variables_in_the_tracking_uri(home: Path, spec_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HOST", "mlflow.lab")
    assert load_spec(spec_file, ["tracking.uri=http://$MLFLOW_HOST:5000"]).tracking.uri == "http://mlflow.lab:5000"


def test_uris_are_not_joined(home: Path) -> None:
    assert absolute("s3://bucket/$$x", home) == "s3://bucket/$x"
    assert unescape(escape("$a$$b")) == "$a$$b" and expand(escape("$a$$b")) == "$a$$b"


def test_the_scratch_folder_of_the_environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    for named, folder in (("~/scratch", home / "home/scratch"), ("below", home / "below"), ("/x", Path("/x"))):
        monkeypatch.setenv("MAPS_RAY_SCRATCH", named)
        assert scratch_folder(None) == folder


def test_where_a_command_writes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").touch()
    assert output(str(home / "new/below")) == home / "new/below"
    assert output(str(home / "file")) == home / "file"
    with pytest.raises(ValueError, match=r"file is a file, and .*file/x would lie in it"):
        output(str(home / "file/x"))
    with pytest.raises(ValueError, match="cannot be written: File name too long"):
        output(str(home / ("x" * 300)))
    # Root, who runs these tests in a container, may write everywhere.
    monkeypatch.setattr("os.access", lambda place, mode: False)
    with pytest.raises(ValueError, match=f"{home} cannot be written: choose another folder"):
        output(str(home / "new/below"))
