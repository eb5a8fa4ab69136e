"""docs/run-spec.md and docs/sweep-spec.md are what `maps-ray fields` prints."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from maps_ray.cli import app

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("document", "arguments"), [("run-spec", ["fields"]), ("sweep-spec", ["fields", "--sweep"])])
def test_document_is_up_to_date(document, arguments):
    printed = CliRunner().invoke(app, arguments).stdout
    command = " ".join(["maps-ray", *arguments])
    assert (ROOT / f"docs/{document}.md").read_text() == printed, f"run: {command} > docs/{document}.md"


def test_fields_as_json_are_those_of_the_document():
    rows = json.loads(CliRunner().invoke(app, ["fields", "--json"]).stdout)
    named = {row["field"]: row for row in rows}
    assert len(named) == len(rows)
    assert named["training.learning_rate"]["type"] == "float"
    document = (ROOT / "docs/run-spec.md").read_text()
    assert document.count("\n| `") == len(rows)
    assert all(row["meaning"].replace("|", "\\|") in document for row in rows)
