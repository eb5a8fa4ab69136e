"""A spec that is written down is read back the same, whatever its fields hold."""

from __future__ import annotations

from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maps_ray.spec import RunSpec, dump, load_spec, parse
from maps_ray.spec.load import read_dumped

# Any text that a file system and YAML can hold.
names = st.text(st.characters(codec="utf-8", exclude_characters="\0/", exclude_categories=["Cc", "Cs"]), min_size=1)
paths = names.map(lambda name: f"/data/x{name}").filter(lambda path: ":" not in path and path == path.strip())
sections = {
    "proximity": st.fixed_dictionaries(
        {
            "order": st.permutations(["dinov2", "siglip", "projector", "language"]),
            "shape": st.sampled_from(["linear", "cosine", "constant", "learned"]),
            "lambda_max": st.floats(0, 100),
            "recipe": st.sampled_from(["paper", "released"]),
            "strengths": st.dictionaries(st.sampled_from(["dinov2", "projector"]), st.floats(0, 5)),
            "l2_sp": st.floats(0, 1) | st.fixed_dictionaries({"strength": st.floats(0, 1)}),
        }
    ),
    "training": st.fixed_dictionaries(
        {
            "learning_rate": st.floats(1e-12, 1, exclude_min=True),
            "max_steps": st.integers(1, 10**9),
            "seed": st.integers(0, 2**31 - 1),
            "precision": st.sampled_from(["fp32", "bf16"]),
        }
    ),
    "data": st.fixed_dictionaries(
        {"path": paths, "cameras": st.lists(names, min_size=1, max_size=3, unique=True), "augment": st.booleans()}
    ),
}


def test_a_text_that_would_be_read_as_a_number_stays_a_text(tmp_path: Path) -> None:
    cameras = ["0e0", "-1E5", "1.5"]
    raw = {"name": "run", "model": {"checkpoint": "/base"}, "data": {"path": "/data/x", "cameras": cameras}}
    file = tmp_path / "spec.yaml"
    file.write_text(dump(parse(RunSpec, raw)), encoding="utf-8")
    assert read_dumped(file).data.cameras == cameras


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.fixed_dictionaries(sections), paths)
def test_what_is_dumped_is_read_back(tmp_path: Path, raw: dict[str, object], checkpoint: str) -> None:
    spec = parse(RunSpec, {"name": "run", "model": {"checkpoint": checkpoint}, **raw})
    file = tmp_path / "spec.yaml"
    file.write_text(dump(spec), encoding="utf-8")
    assert read_dumped(file) == spec
    assert load_spec(file).model_copy(update={"cluster": spec.cluster}) == spec
