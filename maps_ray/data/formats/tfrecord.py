"""TFRecord files and the `tf.train.Example` in their records, without TensorFlow.

A record is: u64 length, masked CRC32C of it, the data, masked CRC32C of the data; little-endian. An Example is a map of
feature names to lists of bytes, floats or ints; it is walked in protobuf's wire format, so that images are skipped, and
each list of numbers is parsed by protobuf (https://protobuf.dev/programming-guides/encoding).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import google_crc32c
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

from maps_ray.data.dataset_error import DatasetError
from maps_ray.files import remedy

HEADER = 12
FOOTER = 4
_KINDS = {1: "bytes", 2: "float", 3: "int"}

Read = Callable[[int, int], bytes]
"""Bytes start .. stop - 1 of a record's data."""


@dataclass(frozen=True)
class Entry:
    """One feature of an Example: where its list lies in the record's data."""

    kind: str
    """`bytes`, `float`, `int`, or `empty`."""
    start: int
    stop: int


class Malformed(ValueError):
    """Data that is no Example."""


def masked_crc(data: bytes) -> int:
    """As TFRecord stores it, so that checksums of checksums differ."""
    crc = google_crc32c.value(data)
    # `crc32c::Mask` and `kMaskDelta` of tensorflow/core/lib/hash/crc32c.h.
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def record_length(header: bytes, where: str, file: str) -> int:
    """Length of a record's data from its 12 bytes of header.

    Args:
        header: the bytes.
        where: what errors call the record.
        file: that holds it.

    Raises:
        DatasetError: its checksum is wrong.
    """
    length, crc = struct.unpack("<QI", header)
    if masked_crc(header[:8]) != crc:
        what = remedy(file, "the file is damaged: fetch it again")
        raise DatasetError(f"{where}: wrong checksum of the record's length; {what}")
    return int(length)


def check_data(data: bytes, footer: bytes, where: str) -> None:
    """Raises:
    DatasetError: the data's checksum is wrong.
    """
    if len(footer) != FOOTER or masked_crc(data) != struct.unpack("<I", footer)[0]:
        raise DatasetError(f"{where}: wrong checksum of the record's data; the file is damaged: fetch it again")


def entries(read: Read, length: int) -> dict[str, Entry]:
    """The features of an Example; lists are not read.

    Raises:
        Malformed: it is none.
    """
    lists: dict[str, Entry] = {}
    for features in _fields(read, 0, length, 1):
        for entry in _fields(read, *features, 1):
            name, value = "", (0, 0)
            for number, start, stop in _walk(read, *entry):
                if number == 1:
                    name = _decoded(read(start, stop))
                elif number == 2:
                    value = (start, stop)
            lists[name] = _list(read, *value)
    return lists


def items(read: Read, entry: Entry) -> np.ndarray:
    """Where the values of a list of bytes lie: int64 (T, 2), start and stop.

    Raises:
        Malformed: it is none.
    """
    return np.array(list(_fields(read, entry.start, entry.stop, 1)), np.int64).reshape(-1, 2)


def texts(data: bytes) -> list[bytes]:
    """Values of a list of bytes."""
    return list(_parsed("BytesList", data).value)


def numbers(kind: str, data: bytes) -> np.ndarray:
    """Values of a list of floats (float32) or ints (int64)."""
    name, dtype = ("FloatList", np.float32) if kind == "float" else ("Int64List", np.int64)
    return np.array(_parsed(name, data).value, dtype)


def _list(read: Read, start: int, stop: int) -> Entry:
    # Of a `oneof` that is set several times protobuf takes the last.
    last = Entry("empty", start, start)
    for number, first, end in _walk(read, start, stop):
        if number in _KINDS:
            last = Entry(_KINDS[number], first, end)
    return last


def _fields(read: Read, start: int, stop: int, wanted: int) -> Iterator[tuple[int, int]]:
    for number, first, end in _walk(read, start, stop):
        if number == wanted:
            yield first, end


def _walk(read: Read, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """The fields of a message that have a length: (number, start, stop) of each."""
    while start < stop:
        # Tag and length: two numbers of ten bytes at most.
        head = read(start, min(start + 20, stop))
        tag, at = _varint(head, 0)
        size, at = _varint(head, at)
        # Maps, messages, lists and packed numbers all have a length (LEN).
        if tag & 7 != 2:
            raise Malformed(f"wire type {tag & 7} at byte {start}")
        first = start + at
        start = first + size
        if start > stop:
            raise Malformed(f"a field of {size} bytes at byte {first} ends behind its message")
        yield tag >> 3, first, start


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
    raise Malformed("a number without an end")


def _decoded(name: bytes) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        raise Malformed("a feature's name is no text") from None


def _parsed(name: str, data: bytes) -> Message:
    try:
        return _MESSAGES[name].FromString(data)
    except DecodeError as error:
        raise Malformed(str(error)) from None


def _messages() -> dict[str, type[Message]]:
    """The lists of tensorflow/core/example/feature.proto, declared anew: TensorFlow's own package is not needed."""
    kinds = descriptor_pb2.FieldDescriptorProto
    package = "maps_ray.tfrecord"
    file = descriptor_pb2.FileDescriptorProto(name="maps_ray/feature.proto", package=package, syntax="proto3")
    types = {"BytesList": kinds.TYPE_BYTES, "FloatList": kinds.TYPE_FLOAT, "Int64List": kinds.TYPE_INT64}
    for name, kind in types.items():
        file.message_type.add(name=name).field.add(name="value", number=1, type=kind, label=kinds.LABEL_REPEATED)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}")) for name in types}


_MESSAGES = _messages()
