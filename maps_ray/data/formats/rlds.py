"""RLDS as TensorFlow Datasets writes it: shards of TFRecords, one episode a record. TensorFlow is not needed.

Format: https://github.com/google-research/rlds, https://www.tensorflow.org/datasets/external_tfrecord. Opening reads
each record's numbers and texts, images are skipped. The first time a process touches a record it reads all of it and
compares its checksum; from then on a frame costs its own bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from maps_ray.data.dataset_error import DatasetError
from maps_ray.data.formats import tfrecord
from maps_ray.data.formats.base import Dataset, Episode, Handles, Names
from maps_ray.data.formats.lerobot_info import expand, faults, read_json
from maps_ray.data.formats.stored_images import decode_image
from maps_ray.data.storage import Storage, content, digest
from maps_ray.data.transforms import Transform
from maps_ray.models.resampling import decode_jpeg
from maps_ray.spec import nearest

Model = TypeVar("Model", bound=BaseModel)

INFO = "dataset_info.json"
FEATURES = "features.json"
_STEPS = "steps/"
_OBSERVATION = "observation/"
_METADATA = "episode_metadata/"
_TEXTS = ("language_instruction", "natural_language_instruction", "observation/natural_language_instruction")
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
_MAPS_KEPT = 4096
# A record is an episode with all its images; a map of it holds two numbers for each of them.
_RECORDS_KEPT = 2


class _Split(BaseModel):
    name: str
    shardLengths: list[int]
    filepathTemplate: str = _TEMPLATE


class _Info(BaseModel):
    name: str
    splits: list[_Split]
    fileFormat: str = "tfrecord"
    version: str | None = None


class _Shape(BaseModel):
    dimensions: list[int] = Field(default_factory=list)


class _Leaf(BaseModel):
    shape: _Shape = Field(default_factory=_Shape)
    dtype: str = ""
    encoding: str = "none"


class _Sequence(BaseModel):
    feature: _Node


class _Dict(BaseModel):
    features: dict[str, _Node]


class _Node(BaseModel):
    """An entry of features.json; of the alternatives, at most one is there."""

    featuresDict: _Dict | None = None
    sequence: _Sequence | None = None
    image: _Leaf | None = None
    tensor: _Leaf | None = None
    text: dict[str, object] | None = None


@dataclass(frozen=True)
class _Record:
    """One episode: where its record lies, its steps and sentences."""

    shard: str
    number: int
    start: int
    """Of the data, in the shard."""
    length: int
    steps: int
    tasks: tuple[tuple[str, int], ...]
    """(sentence, steps) in order."""


@dataclass
class _Map:
    """Where the features of a record lie, whose checksum was right."""

    entries: dict[str, tfrecord.Entry]
    images: dict[str, np.ndarray]
    """Camera -> int64 (T, 2)."""


class Rlds(Dataset):
    """See `Dataset`."""

    format = "rlds"

    def __init__(self, storage: Storage, split: str, transform: Transform | None, names: Names) -> None:
        super().__init__(storage, split, transform, names)
        self.fps = transform.fps if transform else None
        self._info = _checked(storage, INFO, _Info)
        if self._info.fileFormat != "tfrecord":
            raise DatasetError(
                f"{storage.at(INFO)}: fileFormat is {self._info.fileFormat!r}, this reader knows tfrecord"
            )
        self._leaves = _leaves(storage)
        images = sorted(name for name, (kind, _) in self._leaves.items() if kind == "image")
        self._cameras = {name.removeprefix(_OBSERVATION): name for name in images}
        self.cameras = list(self._cameras)
        self._widths = {name: width for name, (kind, width) in self._leaves.items() if kind == "vector"}
        self._text = next((n for n in _TEXTS if self._leaves.get(n, ("", 0))[0] == "text"), None)
        self._shards = self._shard_names()
        self._records: tuple[_Record, ...] = ()
        self._maps: Handles[_Map] = Handles(_MAPS_KEPT)
        self._data: Handles[bytes] = Handles(_RECORDS_KEPT)

    def stored_splits(self) -> list[str]:
        return [split.name for split in self._info.splits]

    @property
    def shards(self) -> list[str]:
        return list(self._shards)

    def scan(self, shard: str) -> object:
        """[start, length, steps, [[sentence, steps], ...], metadata] of each record."""
        scanned: list[list[object]] = []
        size, place = self.storage.size(shard), 0
        with self.storage.open(shard) as file:

            def read(start: int, stop: int) -> bytes:
                file.seek(start)
                return file.read(stop - start)

            while place < size:
                where = f"{self.storage.at(shard)}: record {len(scanned)}"
                header = read(place, place + tfrecord.HEADER)
                cut = f"{where} is cut short ({size} bytes on disk); fetch it again"
                if len(header) < tfrecord.HEADER:
                    raise DatasetError(cut)
                length = tfrecord.record_length(header, where, self.storage.at(shard))
                start = place + tfrecord.HEADER
                place = start + length + tfrecord.FOOTER
                if place > size:
                    raise DatasetError(cut)
                try:
                    facts = self._facts(lambda a, b, start=start: read(start + a, start + b), length, where)  # type: ignore[misc]
                except tfrecord.Malformed as error:
                    raise DatasetError(f"{where} is no tf.train.Example ({error}); fetch it again") from None
                scanned.append([start, length, *facts])
        expected = self._shards[shard]
        if len(scanned) != expected:
            raise DatasetError(
                f"{self.storage.at(shard)}: holds {len(scanned)} records, {INFO} says {expected} (shardLengths); "
                "fetch it again"
            )
        return scanned

    def assemble(self, scans: Sequence[Any]) -> None:
        records: list[_Record] = []
        episodes: list[Episode] = []
        for shard, scanned in zip(self._shards, scans, strict=True):
            for number, (start, length, steps, tasks, extra) in enumerate(scanned):
                record = _Record(shard, number, start, length, steps, tuple((text, count) for text, count in tasks))
                first = self.transform.dropped[0] if self.transform else 0
                task = _at(record.tasks, min(first, max(steps - 1, 0)))
                name = f"episode {len(records)} (record {number} of {shard})"
                episodes.append(Episode(len(records), task, self._steps(steps), name, extra))
                records.append(record)
        self._records, self.episodes = tuple(records), tuple(episodes)

    def features(self) -> Mapping[str, int | None]:
        return self._widths

    def stored(self, names: Sequence[str], index: int) -> dict[str, np.ndarray]:
        record = self._records[index]
        features = self._map(record).entries
        result = {}
        for name in names:
            entry = features.get(_STEPS + name)
            width = self._widths[name]
            if entry is None:
                raise DatasetError(f"{self._where(record)}: no feature {name!r}, which {FEATURES} has; fetch it again")
            values = self._numbers(record, entry)
            if len(values) != record.steps * width:
                raise DatasetError(
                    f"{self._where(record)}: {name} has {len(values)} values, {record.steps} steps of {width} "
                    f"({FEATURES}) need {record.steps * width}; {FEATURES} is of another version than the records"
                )
            result[name] = values.astype(np.float32, copy=False).reshape(record.steps, width)
        return result

    def stored_frame(self, camera: str, index: int, step: int) -> np.ndarray:
        record = self._records[index]
        where = f"{self._where(record)}: {camera}, step {step}"
        start, stop = (int(place) for place in self._images(record, camera)[step])
        return decode_published(self._read(record, start, stop), where)

    def stored_task(self, index: int, step: int) -> str:
        return _at(self._records[index].tasks, step)

    def close(self) -> None:
        self._maps.clear()
        self._data.clear()

    def fingerprint(self) -> str:
        sizes = {shard: self.storage.size(shard) for shard in self._shards}
        parts: list[str | bytes] = [self.format, self.split]
        parts += [self.storage.read(name) for name in (INFO, FEATURES)]
        parts += content(self.storage, sizes)
        return digest(parts)

    def _with_prefixes(self, name: str) -> tuple[str, ...]:
        return (name.removeprefix(_OBSERVATION),)

    def _facts(self, read: tfrecord.Read, length: int, where: str) -> tuple[int, list[list[object]], dict[str, object]]:
        """Steps, sentences and metadata of one record."""
        features = tfrecord.entries(read, length)
        steps = self._count(read, features, where)
        tasks: list[list[object]] = [["", steps]]
        if self._text is not None and _STEPS + self._text in features:
            entry = features[_STEPS + self._text]
            values = tfrecord.texts(read(entry.start, entry.stop)) if entry.kind == "bytes" else []
            if len(values) != steps:
                raise DatasetError(
                    f"{where}: {self._text} has {len(values)} values, the episode {steps} steps; {FEATURES} is of "
                    "another version than the records"
                )
            runs = groupby(value.decode("utf-8", "replace") for value in values)
            tasks = [[text, len(list(same))] for text, same in runs]
        extra: dict[str, object] = {}
        for name, entry in features.items():
            # Short ones alone: they stay in memory for every episode.
            if name.startswith(_METADATA) and entry.stop - entry.start < 4096:
                value = _scalar(entry, read(entry.start, entry.stop))
                if value is not None:
                    extra[name.removeprefix(_METADATA)] = value
        return steps, tasks, extra

    def _count(self, read: tfrecord.Read, features: Mapping[str, tfrecord.Entry], where: str) -> int:
        """T of an episode: the values of is_first."""
        entry = features.get(f"{_STEPS}is_first")
        if entry is None:
            vectors = [name for name in self._widths if _STEPS + name in features]
            if not vectors:
                known = ", ".join(sorted(features)[:8]) or "none"
                raise DatasetError(
                    f"{where}: none of the features of {FEATURES} is there, only {known}; {FEATURES} is of another "
                    "version than the records"
                )
            entry = features[_STEPS + vectors[0]]
            return len(tfrecord.numbers(entry.kind, read(entry.start, entry.stop))) // self._widths[vectors[0]]
        return len(tfrecord.numbers("int", read(entry.start, entry.stop)))

    def _map(self, record: _Record) -> _Map:
        def build() -> _Map:
            data = self._record(record)
            try:
                return _Map(tfrecord.entries(lambda a, b: data[a:b], len(data)), {})
            except tfrecord.Malformed as error:
                raise DatasetError(f"{self._where(record)} is no tf.train.Example ({error})") from None

        return self._maps.get((record.shard, record.start), build)

    def _images(self, record: _Record, camera: str) -> np.ndarray:
        known = self._map(record)
        if camera not in known.images:
            entry = known.entries.get(_STEPS + self._cameras[camera])
            if entry is None or entry.kind != "bytes":
                raise DatasetError(f"{self._where(record)}: no images of {camera}, which {FEATURES} has")
            data = self._record(record)
            try:
                places = tfrecord.items(lambda a, b: data[a:b], entry)
            except tfrecord.Malformed as error:
                raise DatasetError(f"{self._where(record)}: {camera} is no list of images ({error})") from None
            if len(places) != record.steps:
                raise DatasetError(f"{self._where(record)}: {camera} has {len(places)} images for {record.steps} steps")
            known.images[camera] = places
        return known.images[camera]

    def _numbers(self, record: _Record, entry: tfrecord.Entry) -> np.ndarray:
        if entry.kind not in ("float", "int"):
            raise DatasetError(f"{self._where(record)}: a list of {entry.kind} where {FEATURES} has numbers")
        try:
            return tfrecord.numbers(entry.kind, self._read(record, entry.start, entry.stop))
        except tfrecord.Malformed as error:
            raise DatasetError(f"{self._where(record)}: a list of numbers cannot be read ({error})") from None

    def _record(self, record: _Record) -> bytes:
        """All data of a record, its checksum compared."""

        def read() -> bytes:
            stop = record.start + record.length
            whole = self.storage.read(record.shard, record.start, stop + tfrecord.FOOTER)
            tfrecord.check_data(whole[: record.length], whole[record.length :], self._where(record))
            return whole[: record.length]

        return self._data.get((record.shard, record.start), read)

    def _read(self, record: _Record, start: int, stop: int) -> bytes:
        key = (record.shard, record.start)
        # Not read for this alone: once the checksum was compared, a frame costs its own bytes.
        whole = self._data.peek(key)
        if whole is not None:
            return whole[start:stop]
        return self.storage.read(record.shard, record.start + start, record.start + stop)

    def _where(self, record: _Record) -> str:
        return f"{self.storage.at(record.shard)}: record {record.number}"

    def _shard_names(self) -> dict[str, int]:
        """Shard -> its number of records, of the chosen split, in order; all are there."""
        splits = {split.name: split for split in self._info.splits}
        if self.split not in splits:
            raise DatasetError(f"{self.path}: no split {self.split!r}; {nearest(self.split, splits)}")
        split = splits[self.split]
        total = len(split.shardLengths)
        where, field = self.storage.at(INFO), f"splits.{split.name}.filepathTemplate"
        names = {}
        for number, records in enumerate(split.shardLengths):
            parts = {"SHARD_INDEX": f"{number:05d}", "NUM_SHARDS": f"{total:05d}"}
            parts["SHARD_X_OF_Y"] = f"{parts['SHARD_INDEX']}-of-{parts['NUM_SHARDS']}"
            name = expand(
                split.filepathTemplate or _TEMPLATE,
                field,
                where,
                DATASET=self._info.name,
                SPLIT=split.name,
                FILEFORMAT="tfrecord",
                **parts,
            )
            names[name] = records
        there = self.storage.files()
        missing = [name for name in names if name not in there]
        if missing:
            raise DatasetError(
                f"{self.storage.at(missing[0])}: shard is missing ({len(missing)} of {total} of split {self.split}); "
                "fetch it again"
            )
        return names


def find_version(storage: Storage) -> Storage | None:
    """The folder with dataset_info.json: the one given, or its newest version; None when this is no RLDS."""
    if storage.is_file(INFO):
        return storage
    versions = [name.split("/")[0] for name in storage.files() if re.fullmatch(rf"\d+\.\d+\.\d+/{INFO}", name)]
    if not versions:
        return None
    # As numbers: 1.10.0 is newer than 1.9.0.
    newest = max(versions, key=lambda version: [int(part) for part in version.split(".")])
    return Storage(storage.at(newest), storage.fetch)


def decode_published(data: bytes, where: str) -> np.ndarray:
    """An image of a record -> uint8 (H, W, 3), RGB, as the published pipeline decodes it.

    Raises:
        DatasetError: it cannot be decoded.
    """
    if not data.startswith(b"\xff\xd8"):
        return decode_image(data, where)
    try:
        return decode_jpeg(data)
    except ValueError as error:
        raise DatasetError(f"{where}: cannot decode the JPEG ({error}); fetch or write it again") from None


def _checked(storage: Storage, name: str, kind: type[Model]) -> Model:
    try:
        return kind.model_validate(read_json(storage, name))
    except (ValidationError, RecursionError) as error:
        told = faults(error) if isinstance(error, ValidationError) else "nested too deeply"
        raise DatasetError(f"{storage.at(name)}: {told}; is it of another version of tensorflow_datasets?") from None


def _leaves(storage: Storage) -> dict[str, tuple[str, int]]:
    """Feature of a step, by its path -> (`image`, `text` or `vector`, dimensions)."""
    root: _Node = _checked(storage, FEATURES, _Node)
    steps = root.featuresDict.features.get("steps") if root.featuresDict else None
    if steps is None or steps.sequence is None or steps.sequence.feature.featuresDict is None:
        raise DatasetError(
            f"{storage.at(FEATURES)}: has no sequence of steps (featuresDict.features.steps.sequence); this is no "
            "RLDS, or of another version of tensorflow_datasets"
        )
    leaves: dict[str, tuple[str, int]] = {}

    def visit(node: _Node, name: str) -> None:
        if node.featuresDict is not None:
            for key, child in node.featuresDict.features.items():
                visit(child, f"{name}/{key}" if name else key)
        elif node.image is not None:
            leaves[name] = "image", 0
        elif node.text is not None or (node.tensor is not None and node.tensor.dtype in ("string", "object")):
            leaves[name] = "text", 0
        elif node.tensor is not None and node.tensor.encoding in ("none", "") and len(node.tensor.shape.dimensions) < 2:
            width = node.tensor.shape.dimensions[0] if node.tensor.shape.dimensions else 1
            if width > 0:
                leaves[name] = "vector", width

    visit(steps.sequence.feature, "")
    return leaves


def _scalar(entry: tfrecord.Entry, data: bytes) -> str | float | int | None:
    if entry.kind == "bytes":
        values = tfrecord.texts(data)
        return values[0].decode("utf-8", "replace") if len(values) == 1 else None
    if entry.kind in ("float", "int"):
        array = tfrecord.numbers(entry.kind, data)
        return array[0].item() if len(array) == 1 else None
    return None


def _at(tasks: Sequence[tuple[str, int]], step: int) -> str:
    for sentence, steps in tasks:
        if step < steps:
            return sentence
        step -= steps
    return tasks[-1][0] if tasks else ""
