"""Writes RLDS as TensorFlow Datasets does, for tests: protobuf's wire format by hand, so that the reader is not tested
by its own code."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import google_crc32c
import numpy as np
from PIL import Image

Value = Sequence[bytes] | np.ndarray


def varint(value: int) -> bytes:
    out = b""
    value &= (1 << 64) - 1
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def example(features: Mapping[str, Value]) -> bytes:
    entries = b""
    for name, value in features.items():
        if not isinstance(value, np.ndarray):
            made = field(1, b"".join(field(1, item) for item in value))
        elif value.dtype.kind == "f":
            made = field(2, field(1, value.astype("<f4").tobytes()))
        else:
            made = field(3, field(1, b"".join(varint(int(item)) for item in value.ravel())))
        entries += field(1, field(1, name.encode()) + field(2, made))
    return field(1, entries)


def masked(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def jpeg(rng: np.random.Generator, size: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (size, size, 3), np.uint8)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def episode(rng: np.random.Generator, steps: int, text: str, size: int = 16) -> dict[str, Value]:
    return {
        "steps/observation/image": [jpeg(rng, size) for _ in range(steps)],
        "steps/action": rng.normal(size=(steps, 7)).astype(np.float32),
        "steps/observation/state": rng.normal(size=(steps, 8)).astype(np.float32),
        "steps/language_instruction": [text.encode()] * steps,
        "steps/is_first": np.arange(steps) == 0,
        "episode_metadata/file_path": [b"somewhere"],
    }


FEATURES = {
    "observation": {"image": ("image", [16, 16, 3]), "state": ("tensor", [8])},
    "action": ("tensor", [7]),
    "language_instruction": ("text", []),
    "is_first": ("tensor", []),
}


def node(described: object) -> dict[str, object]:
    if isinstance(described, dict):
        return {"featuresDict": {"features": {name: node(child) for name, child in described.items()}}}
    kind, shape = described  # type: ignore[misc]
    facts = {"shape": {"dimensions": [str(size) for size in shape]}, "dtype": "float32", "encoding": "none"}
    return {kind: {} if kind == "text" else facts}


def write(root: Path, shards: Sequence[Sequence[Mapping[str, Value]]], name: str = "made") -> Path:
    """A data set of one split, an inner sequence for each shard."""
    root.mkdir(parents=True, exist_ok=True)
    for number, episodes in enumerate(shards):
        path = root / f"{name}-train.tfrecord-{number:05d}-of-{len(shards):05d}"
        path.write_bytes(b"".join(record(example(one)) for one in episodes))
    split = {"name": "train", "shardLengths": [str(len(episodes)) for episodes in shards]}
    info = {"name": name, "version": "1.0.0", "fileFormat": "tfrecord", "splits": [split]}
    (root / "dataset_info.json").write_text(json.dumps(info))
    steps = {"sequence": {"feature": node(FEATURES)}}
    (root / "features.json").write_text(json.dumps({"featuresDict": {"features": {"steps": steps}}}))
    return root
