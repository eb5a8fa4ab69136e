"""docs/run-spec.md is what `maps-ray fields` prints."""

from pathlib import Path

from maps_ray.spec.reference import reference

ROOT = Path(__file__).parents[2]


def test_document_is_up_to_date():
    assert (ROOT / "docs/run-spec.md").read_text() == reference(), "run: maps-ray fields > docs/run-spec.md"
