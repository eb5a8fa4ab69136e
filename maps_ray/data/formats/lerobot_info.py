"""`meta/info.json` of a LeRobotDataset, and tables whose every value is checked before it is used."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Sequence
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from maps_ray.data import layout as v3
from maps_ray.data.dataset_error import DatasetError
from maps_ray.data.storage import Storage, leads_out
from maps_ray.files import remedy
from maps_ray.spec import nearest

# Up to it a float64, as which JSON and pandas may have stored it, tells whole numbers apart.
_MOST = 2**53


class Feature(BaseModel):
    """One entry of `features`."""

    model_config = ConfigDict(extra="allow")

    dtype: str
    shape: list[int] = Field(max_length=8)


class Info(BaseModel):
    """What readers need of `meta/info.json`; other fields are left alone."""

    codebase_version: str
    fps: float = Field(gt=0, le=10_000, allow_inf_nan=False)
    features: dict[str, Feature]
    data_path: str
    video_path: str | None = None
    total_episodes: int | None = Field(None, ge=0, le=_MOST)
    total_frames: int | None = Field(None, ge=0, le=_MOST)
    chunks_size: int = Field(v3.FILES_PER_CHUNK, ge=1, le=_MOST)
    splits: dict[str, str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_flags_for_numbers(cls, raw: object) -> object:
        # Pydantic takes true for 1.
        if isinstance(raw, dict):
            for name in ("fps", "total_episodes", "total_frames", "chunks_size"):
                if isinstance(raw.get(name), bool):
                    raise ValueError(f"{name} is {raw[name]}, must be a number")
        return raw

    @model_validator(mode="after")
    def _videos_have_a_path(self) -> Info:
        videos = [name for name, feature in self.features.items() if feature.dtype == "video"]
        if videos and not self.video_path:
            raise ValueError(f"{videos[0]} is a video, but video_path is missing")
        return self

    def cameras(self, dtype: str) -> list[str]:
        """Features of a type, `video` or `image`."""
        return [name for name, feature in self.features.items() if feature.dtype == dtype]


def read_json(storage: Storage, name: str) -> object:
    """Raises:
    DatasetError: missing file, or no JSON.
    """
    try:
        return json.loads(storage.text(name))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{storage.at(name)}: not readable as JSON ({error})") from None


def read_info(storage: Storage) -> Info:
    """Reads and checks `meta/info.json`.

    Raises:
        DatasetError: it is missing or broken; names the field and its value.
    """
    raw = read_json(storage, v3.INFO)
    try:
        return Info.model_validate(raw)
    except ValidationError as error:
        raise DatasetError(f"{storage.at(v3.INFO)}: {faults(error)}") from None


def faults(error: ValidationError) -> str:
    """Every fault that pydantic found, as field, what is wrong, and the value."""
    told = []
    for fault in error.errors()[:5]:
        place = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "missing":
            told.append(f"lacks {place}")
            continue
        message = fault["msg"].removeprefix("Value error, ")
        told.append(f"{place} = {_short(fault['input'])}: {message}" if place else message)
    return "; ".join(told)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."


def expand(template: str, field: str, where: str, **values: int | str) -> str:
    """A path template filled in.

    Raises:
        DatasetError: a template that is broken, asks for other values, or leads out of the data set; names the field.
    """

    def refuse(why: str) -> DatasetError:
        return DatasetError(
            f"{where}: {field} = {_short(template)}: {why}; this version's templates use "
            + ", ".join(f"{{{name}}}" for name in values)
        )

    try:
        parts = _parts(template)
    except ValueError as error:
        raise refuse(str(error)) from None
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if name not in values:
            raise refuse(f"unknown value {name!r}")
        number = isinstance(values[name], int)
        # `format` would look up attributes of what it is given, and fill memory for a width of ten digits; metadata may
        # come from anywhere.
        if conversion or not re.fullmatch(r"(0?\d{1,2})?d?" if number else "", spec or ""):
            raise refuse(f"cannot format {name!r} as {spec or conversion!r}")
    name = template.format(**values)
    if leads_out(name):
        raise DatasetError(f"{where}: {field} = {_short(template)}: leads out of the data set; it must lie inside")
    return name


@cache
def _parts(template: str) -> list[tuple[str, str | None, str | None, str | None]]:
    return list(string.Formatter().parse(template))


def vector_width(info: Info, name: str, where: str) -> int:
    """Dimensions of a vector feature.

    Raises:
        DatasetError: it has no or several axes.
    """
    shape = info.features[name].shape
    if len(shape) != 1 or not 0 < shape[0] < 2**20:
        raise DatasetError(f"{where}: {name} must be a vector, its shape is {tuple(shape)}")
    return shape[0]


def vector_features(info: Info) -> list[str]:
    """Features of numbers, those that LeRobot adds to every row left out."""
    numbers = [n for n, f in info.features.items() if f.dtype.startswith(("float", "int")) and len(f.shape) == 1]
    return [name for name in numbers if name not in v3.INDEX_FEATURES]


def read_table(
    storage: Storage, name: str, columns: Sequence[str], optional: Sequence[str] = (), prefix: str = ""
) -> pa.Table:
    """Columns of a parquet file, of `optional` those there are, and those whose name starts with `prefix` if given.

    Raises:
        DatasetError: missing or broken file, or a missing column; names those there are.
    """
    where = storage.at(name)
    try:
        with storage.open(name) as file, pq.ParquetFile(file) as table:
            names = list(table.schema_arrow.names)
            for column in columns:
                if column not in names:
                    raise DatasetError(f"{where}: no column {column!r}; {nearest(column, names)}")
            wanted = {*columns, *optional}
            return table.read([n for n in names if n in wanted or (prefix and n.startswith(prefix))])
    except DatasetError:
        raise
    # A damaged footer may claim any size.
    except (OSError, pa.ArrowException, ValueError, OverflowError, MemoryError) as error:
        raise DatasetError(f"{where}: cannot read ({error}); {remedy(where)}") from None


def column_values(table: pa.Table, name: str, where: str) -> list[object]:
    """A column as Python values, whatever its type.

    Raises:
        DatasetError: text that is not UTF-8, or values that Python does not have.
    """
    try:
        return list(table[name].to_pylist())
    except (pa.ArrowException, ValueError, OverflowError, TypeError) as error:
        raise DatasetError(f"{where}: column {name!r} cannot be read ({error}); write it again") from None


def whole_numbers(table: pa.Table, name: str, where: str) -> list[int]:
    """A column of counts or indices, none of them null or below 0.

    Raises:
        DatasetError: anything else; names the column and the row.
    """
    result = []
    for row, value in enumerate(column_values(table, name, where)):
        # pandas makes floats of whole numbers in a column with a null.
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _MOST:
            raise DatasetError(f"{where}: column {name!r} is {_short(value)} in row {row}, must be a whole number")
        result.append(value)
    return result


def real_numbers(table: pa.Table, name: str, where: str) -> list[float]:
    """A column of finite numbers, for instance of seconds.

    Raises:
        DatasetError: anything else; names the column and the row.
    """
    result = []
    for row, value in enumerate(column_values(table, name, where)):
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < _MOST:
            raise DatasetError(f"{where}: column {name!r} is {_short(value)} in row {row}, must be a finite number")
        result.append(float(value))
    return result


def matrix(column: pa.ChunkedArray, name: str, width: int, where: str) -> np.ndarray:
    """A column of lists (or of scalars, for width 1) as float32 (N, width); a null inside a list is NaN.

    Raises:
        DatasetError: another type or width.
    """
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    nested = (
        pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type)
    )
    lengths = plain(array.value_lengths(), name, where) if nested and not array.null_count else np.ones(len(array))
    if array.null_count or not len(array) or not (lengths == width).all():
        widths = ", ".join(str(int(length)) for length in np.unique(lengths)[:5])
        raise DatasetError(f"{where}: {name} must have {width} dimensions in every row; found {widths or 'no rows'}")
    flat = array.flatten() if nested else array
    if not (pa.types.is_integer(flat.type) or pa.types.is_floating(flat.type) or pa.types.is_null(flat.type)):
        raise DatasetError(f"{where}: {name} holds {flat.type}, must be numbers")
    if flat.null_count or pa.types.is_float16(flat.type):
        flat = flat.cast(pa.float64()).fill_null(float("nan"))
    return plain(flat, name, where).astype(np.float32, copy=False).reshape(-1, width)


def indices(column: pa.ChunkedArray, name: str, where: str) -> np.ndarray:
    """A column of whole numbers as int64.

    Raises:
        DatasetError: anything else.
    """
    values = plain(column, name, where)
    with np.errstate(invalid="ignore"):
        whole = values.astype(np.int64)
    if not np.array_equal(whole, values):
        raise DatasetError(f"{where}: column {name!r} must hold whole numbers; write it again")
    return whole


def plain(column: pa.Array | pa.ChunkedArray, name: str, where: str) -> np.ndarray:
    """A column of numbers as numpy; `pa.Array.to_numpy` would import pandas, which takes longer than all the rest.

    Raises:
        DatasetError: nulls, or no numbers.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    if array.null_count:
        raise DatasetError(f"{where}: column {name!r} holds nulls; write it again")
    if not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
        raise DatasetError(f"{where}: column {name!r} holds {array.type}, must be numbers")
    return np.from_dlpack(array)
