"""Folders as transformers 5 writes them, and the one dtype that every configuration of ours says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from maps_ray.models import describe, export_policy, load_policy, load_processor, save_policy
from maps_ray.models.files.folders import published_config
from maps_ray.models.minivla.tiny import write_tiny

STATISTICS = {"demos": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "min": [-1.0] * 7, "max": [1.0] * 7}}}


@pytest.fixture
def newer(small_checkpoint: Path, tmp_path: Path) -> Path:
    """The small policy with `dtype` throughout, and its image processor as a section of `processor_config.json`."""
    folder = shutil.copytree(small_checkpoint, tmp_path / "newer")
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    config |= {"dtype": "bfloat16", "transformers_version": "5.1.0"}
    config["text_config"] = {**config["text_config"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    section = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    whole = {"image_processor": section, "processor_class": "PrismaticProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(whole))
    return folder


def dtypes(value: Any) -> set[str]:
    """All that a configuration says of dtypes, however deep."""
    if not isinstance(value, dict):
        return set()
    own = {str(part) for name, part in value.items() if name in ("dtype", "torch_dtype")}
    return own.union(*(dtypes(part) for part in value.values()))


def test_a_folder_of_transformers_5_is_read(newer: Path, small_checkpoint: Path) -> None:
    assert describe(newer).problems == []
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    samples = [load_processor(folder).encode("pick up", [image]) for folder in (newer, small_checkpoint)]
    for name, value in samples[0].items():
        np.testing.assert_array_equal(value, samples[1][name])


def test_what_is_written_says_its_dtype_once(newer: Path, tmp_path: Path) -> None:
    state = load_policy(newer, dtype=torch.float32).state_dict()
    save_policy(state, newer, tmp_path / "saved", dtype=torch.float32, statistics=STATISTICS)
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert dtypes(written) == {"float32"} and written["torch_dtype"] == "float32" and "dtype" not in written
    assert describe(tmp_path / "saved").problems == []
    export_policy(tmp_path / "saved", tmp_path / "half", "openvla-oft", dtype=torch.bfloat16)
    assert dtypes(json.loads((tmp_path / "half" / "config.json").read_text())) == {"bfloat16"}
    # The published scripts look for this file alone.
    section = json.loads((newer / "processor_config.json").read_text())["image_processor"]
    assert json.loads((tmp_path / "half" / "preprocessor_config.json").read_text()) == section


def test_an_export_says_what_is_stored_not_what_the_base_said(newer: Path, tmp_path: Path) -> None:
    state = load_policy(newer, dtype=torch.float32).state_dict()
    save_policy(state, newer, tmp_path / "saved", dtype=torch.float32, statistics=STATISTICS)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    (tmp_path / "saved" / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    export_policy(tmp_path / "saved", tmp_path / "out", "openvla-oft")
    assert dtypes(json.loads((tmp_path / "out" / "config.json").read_text())) == {"float32"}


def test_minivla_says_its_dtype_once(tmp_path: Path) -> None:
    write_tiny(tmp_path / "base", "oft", ["pick up"])
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert dtypes(config) == {"bfloat16"}
    config["dtype"] = config["qwen_config"]["dtype"] = "float16"
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    state = load_policy(tmp_path / "base", dtype=torch.float32).state_dict()
    save_policy(state, tmp_path / "base", tmp_path / "saved", dtype=torch.float32, statistics=STATISTICS)
    assert dtypes(json.loads((tmp_path / "saved" / "config.json").read_text())) == {"float32"}
    export_policy(tmp_path / "saved", tmp_path / "out", "minivla")
    assert dtypes(json.loads((tmp_path / "out" / "config.json").read_text())) == {"float32"}


def test_all_else_stays() -> None:
    config = {"dtype": "float16", "text_config": {"torch_dtype": "float16", "hidden_size": 4}, "quantization": None}
    assert published_config(config, "float32") == {
        "torch_dtype": "float32",
        "text_config": {"torch_dtype": "float32", "hidden_size": 4},
        "quantization": None,
    }


def test_rotary_positions_are_said_as_the_published_scripts_read_them() -> None:
    rotary = {"rope_theta": 1e6, "rope_type": "default"}
    text = published_config({"text_config": {"rope_parameters": rotary}}, "float32")["text_config"]
    assert text == {"rope_parameters": rotary, "rope_theta": 1e6}


def test_a_tokenizer_of_another_model_is_a_problem(small_checkpoint: Path, tmp_path: Path) -> None:
    write_tiny(tmp_path / "minivla", "oft", ["pick up"])
    folder = shutil.copytree(small_checkpoint, tmp_path / "openvla")
    for target, source in ((folder, tmp_path / "minivla"), (tmp_path / "minivla", small_checkpoint)):
        shutil.copyfile(source / "tokenizer.json", tmp_path / "other.json")
        assert describe(target).problems == []
        kept = (target / "tokenizer.json").read_bytes()
        shutil.copyfile(tmp_path / "other.json", target / "tokenizer.json")
        assert len(describe(target).problems) == 1 and "tokenizer.json" in describe(target).problems[0]
        Tokenizer(models.WordLevel({"[UNK]": 0, "pick": 1}, unk_token="[UNK]")).save(str(target / "tokenizer.json"))
        assert "tokenizer.json" in describe(target).problems[0]
        (target / "tokenizer.json").write_bytes(kept)
