"""Images in the cells of a LeRobotDataset's data files: bytes, or paths of files inside the data set."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from maps_ray.data.dataset_error import DatasetError
from maps_ray.data.formats.base import Handles
from maps_ray.data.storage import Storage
from maps_ray.spec import nearest

_FILES_KEPT = 8
_COLUMNS_KEPT = 4
# Bytes of a PNG of one pixel.
_SMALLEST_IMAGE = 67


class _Parquet:
    """An open data file of stored images, and the row after the last of each of its row groups."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self.table = pq.ParquetFile(source)
        groups = range(self.table.metadata.num_row_groups)
        self.ends = np.cumsum([self.table.metadata.row_group(group).num_rows for group in groups])

    def close(self) -> None:
        self._source.close()


class StoredImages:
    """The images of a data set; files stay open, and the columns used last are kept.

    Args:
        storage: where the files lie.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._columns: Handles[pa.ChunkedArray] = Handles(_COLUMNS_KEPT)
        self._opened: Handles[_Parquet] = Handles(_FILES_KEPT, _Parquet.close)

    def image(self, file: str, camera: str, row: int) -> np.ndarray:
        """The image in a row of a data file: uint8 (H, W, 3), RGB.

        Raises:
            DatasetError: none is there, or it cannot be decoded.
        """
        where = f"{self._storage.at(file)}: {camera} in row {row}"
        with self._parquet(file) as opened:
            ends = opened.ends
        # A row group is the least that Parquet reads.
        group = int(np.searchsorted(ends, row, side="right"))
        column = self._columns.get((file, group, camera), lambda: self._image_column(file, group, camera))
        value = column[row - int(ends[group - 1] if group else 0)].as_py()
        return decode_image(self._image_bytes(value, where), where)

    @contextmanager
    def _parquet(self, file: str) -> Iterator[_Parquet]:
        try:
            with self._opened.held(file, lambda: _Parquet(self._storage.open(file))) as opened:
                yield opened
        except DatasetError:
            raise
        except (OSError, pa.ArrowException, ValueError) as error:
            raise DatasetError(f"{self._storage.at(file)}: cannot read ({error}); fetch or write it again") from None

    def _image_column(self, file: str, group: int, camera: str) -> pa.ChunkedArray:
        with self._parquet(file) as opened:
            try:
                return opened.table.read_row_group(group, [camera])[camera]
            except (OSError, pa.ArrowException, KeyError, ValueError) as error:
                raise DatasetError(
                    f"{self._storage.at(file)}: cannot read {camera} ({error}); fetch or write it again"
                ) from None

    def _image_bytes(self, value: object, where: str) -> bytes:
        found = _cell(value, where)
        return self._storage.read(found) if isinstance(found, str) else found

    def check(self, file: str, camera: str) -> None:
        """Raises `DatasetError` unless each row has bytes, by the table's own counts, or a path whose file is there."""
        where = self._storage.at(file)
        with self._parquet(file) as opened:
            table = opened.table
            if camera not in table.schema_arrow.names:
                raise DatasetError(f"{where}: no column {camera!r}; {nearest(camera, table.schema_arrow.names)}")
            leaves = {table.schema.column(i).path: i for i in range(len(table.schema))}
            leaf = leaves.get(f"{camera}.bytes", leaves.get(camera))
            for group in range(table.metadata.num_row_groups):
                if leaf is not None and _is_full(table.metadata.row_group(group).column(leaf)):
                    continue
                for row, value in enumerate(table.read_row_group(group, [camera])[camera].to_pylist()):
                    place = f"{where}: {camera} in row {row} of row group {group}"
                    found = _cell(value, place)
                    if isinstance(found, str) and not self._storage.is_file(found):
                        raise DatasetError(f"{place}: {self._storage.at(found)} is missing")

    def close(self) -> None:
        """Closes what this process opened; the images can be read on."""
        self._columns.clear()
        self._opened.clear()


def _is_full(column: pq.ColumnChunkMetaData) -> bool:
    """Whether a column has bytes in every row, as far as the file's metadata tell; else each row is looked at."""
    facts = column.statistics
    # Writers may leave statistics out. Of texts, which are paths, they do not say enough.
    known = facts is not None and facts.has_null_count and not facts.null_count
    raw = column.physical_type == "BYTE_ARRAY" and (facts is None or facts.logical_type.type == "NONE")
    return known and raw and column.total_uncompressed_size >= _SMALLEST_IMAGE * column.num_values


def _cell(value: object, where: str) -> bytes | str:
    """What a cell of an image column holds: an image's bytes, or the path of a file inside the data set.

    Raises:
        DatasetError: neither.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, bytes | str) or not value:
        raise DatasetError(f"{where} holds no image: neither bytes nor a path; write it again")
    return value


def decode_image(data: bytes, where: str) -> np.ndarray:
    """PNG, JPEG and what else PIL reads -> uint8 (H, W, 3), RGB.

    Raises:
        DatasetError: it cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith(("I", "F")):
                # PIL would cut all but the least of such values off at white.
                raise DatasetError(f"{where}: values of more than 8 bits, as of depth, are no picture: choose another")
            return np.asarray(image.convert("RGB"))
    except DatasetError:
        raise
    # Pillow raises SyntaxError for a broken PNG.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{where}: cannot decode the image ({error}); fetch or write it again") from None
