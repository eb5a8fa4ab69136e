"""docs/run-spec.md and docs/sweep-spec.md are what `maps-ray fields` prints."""

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
