"""The tables of a data set folder, each replaced as a whole."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from maps_ray.files import replaced


def column(values: np.ndarray) -> pa.Array:
    """(N,) as a plain column, (N, D) as lists of fixed length."""
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a small parquet file."""
    return list(pq.read_table(path).to_pylist())


def write_parquet(tables: Sequence[pa.Table], path: Path) -> None:
    """One row group per table, so that one episode can be read alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as partial, pq.ParquetWriter(partial, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)


def write_tasks(tasks: Mapping[str, int], path: Path) -> None:
    """Sentences as the table's pandas index, as LeRobot expects it."""
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [
            {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"},
            {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object"},
        ],
    }
    table = pa.table({"task_index": pa.array(list(tasks.values()), pa.int64()), "task": list(tasks)})
    write_parquet([table.replace_schema_metadata({"pandas": json.dumps(pandas)})], path)
