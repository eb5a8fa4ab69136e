"""A `config.json` with any field spoilt is read or refused, never answered by a traceback."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from maps_ray.models import CheckpointError, describe
from maps_ray.models.minivla.config import PolicyConfig as MiniVLAConfig
from maps_ray.models.openvla_oft.config import PolicyConfig as OpenVLAConfig
from maps_ray.models.vla_adapter.config import PolicyConfig as AdapterConfig

ASSETS = Path(__file__).parents[2] / "jobs/assets"
POLICY = {"num_images": 1, "use_proprio": False, "chunk": 8, "action_dim": 7, "proprio_dim": 8, "head": "l1"}
SPOILT = (None, "x", -1, 1.5, [], {}, True)


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Places of all entries, however deep."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*at, key)
        yield from paths(child, (*at, key))


def minivla() -> dict[str, Any]:
    tower = {"patch_size": 14, "embed_dim": 16, "depth": 2, "num_heads": 2}
    siglip = {**tower, "class_token": False, "global_pool": "map"}
    qwen = {"vocab_size": 900, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    qwen |= {"num_attention_heads": 2, "rope_theta": 1e6, "model_type": "qwen2"}
    sizes = {"qwen_config": qwen, "dino_kwargs": tower, "siglip_kwargs": siglip, "img_size": 28, "len_tokenizer": 800}
    return {**sizes, "model_type": "minivla_oft", "policy": POLICY}


def test_any_value_in_any_field() -> None:
    openvla = json.loads((ASSETS / "tiny_base/config.json").read_text()) | {"policy": POLICY}
    for whole, read in ((openvla, OpenVLAConfig), (minivla(), MiniVLAConfig), (minivla(), AdapterConfig)):
        read.from_dict(whole)
        for *above, last in paths(whole):
            for value in SPOILT:
                changed = copy.deepcopy(whole)
                section = changed
                for key in above:
                    section = section[key]
                section[last] = value
                try:
                    read.from_dict(changed)
                except CheckpointError as error:
                    assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "text_config.num_attention_heads",
            0,
            "text_config.num_attention_heads = 0: must be a whole number",
        ),
        ("text_config.rope_theta", "1e6", "text_config.rope_theta = '1e6': must be a number above 0"),
        ("pad_to_multiple_of", None, "pad_to_multiple_of = None: must be a whole number, at least 0"),
        ("n_action_bins", "many", "n_action_bins = 'many': must be a whole number, at least 2"),
        ("timm_model_ids", "dinov2", "timm_model_ids = 'dinov2': must be a list"),
        ("vision_kwargs.featurizer.depth", "24", "featurizer.depth = '24': must be a whole number, at least 1"),
        ("policy.use_proprio", "false", "use_proprio = 'false': must be true or false"),
    ],
)
def test_the_message_names_field_and_value(field: str, value: object, message: str) -> None:
    raw = json.loads((ASSETS / "tiny_base/config.json").read_text()) | {"policy": dict(POLICY)}
    *above, last = field.split(".")
    section = raw
    for key in above:
        section = section[key]
    section[last] = value
    with pytest.raises(CheckpointError) as caught:
        OpenVLAConfig.from_dict(raw)
    assert message in str(caught.value)


def test_any_value_in_the_processor(tmp_path: Path) -> None:
    for path in (ASSETS / "tiny_base").iterdir():
        (tmp_path / path.name).symlink_to(path)
    whole = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    for name in ("input_sizes", "interpolations", "tvf_normalize_params", "image_resize_strategy"):
        for value in (*SPOILT, [None, None], [[3, None, 5]] * 2, [["a", "b", "c"]] * 2, ["bicubic", 3]):
            (tmp_path / "preprocessor_config.json").write_text(json.dumps({**whole, name: value}))
            # Where these are not there, the means and deviations count.
            assert len(describe(tmp_path).problems) == (0 if name == "tvf_normalize_params" and not value else 1)
