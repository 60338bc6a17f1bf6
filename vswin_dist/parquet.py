"""Tables as Parquet files, which `pandas.read_parquet` and every other reader take; a bounded part in memory at a time."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from vswin_dist.columns import BLOCK, Builder, Column, Table, Texts, kinds

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")


def write(table: Table[Any], path: Path) -> None:
    """Write `table` to `path`; the same rows give the same bytes, by one version of pyarrow."""
    import pyarrow as pa  # 40 MB, which no process needs that only maps what others have converted
    import pyarrow.parquet as pq

    schema = _schema(table.cls)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for block in table.blocks():
            writer.write_batch(pa.record_batch([_to_arrow(column) for column in block.values()], schema))


def read(path: Path, cls: type[T]) -> Table[T]:
    """Read the table at `path`.

    Raises:
        ValueError: no Parquet file, or without a column of `cls`, or with other values in it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    builder, schema = Builder(cls), _schema(cls)
    try:
        with pq.ParquetFile(path) as file:
            if missing := [name for name in schema.names if name not in file.schema_arrow.names]:
                raise ValueError(f"column {missing[0]} is missing")
            for batch in file.iter_batches(BLOCK, columns=schema.names):
                builder.add({f.name: _from_arrow(batch.column(f.name), f.type, builder.kinds[f.name]) for f in schema})
    except pa.ArrowException as error:
        raise ValueError(str(error)) from error
    return builder.table()


def size_and_sha256(path: Path) -> tuple[int, str]:
    """Give the bytes of the file at `path`, and their sha256."""
    with open(path, "rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _schema(cls: type[Any]) -> pa.Schema:
    import pyarrow as pa

    return pa.schema([(n, pa.string() if kind is None else pa.from_numpy_dtype(kind)) for n, kind in kinds(cls).items()])


# Arrays change hands as buffers: pyarrow's own conversions, and its `cast`, first import pandas, a second and 60 MB.


def _to_arrow(column: Column) -> pa.Array:
    import pyarrow as pa

    if not isinstance(column, Texts):
        kind = pa.from_numpy_dtype(column.dtype)
        return pa.Array.from_buffers(kind, len(column), [None, pa.py_buffer(np.ascontiguousarray(column))])
    offsets = np.concatenate(([0], column.ends)).astype(np.int32)
    data = np.ascontiguousarray(column.data)
    return pa.StringArray.from_buffers(len(column), pa.py_buffer(offsets), pa.py_buffer(data))


def _from_arrow(array: pa.Array, wanted: pa.DataType, kind: np.dtype[Any] | None) -> Column:
    if array.null_count:
        raise ValueError(f"{array.null_count} values are missing")
    if array.type != wanted:  # as another tool may have written it
        array = array.cast(wanted)
    if kind is not None:
        return np.frombuffer(array.buffers()[1] or b"", kind)[array.offset : array.offset + len(array)]
    _, offsets, data = array.buffers()
    places = np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1].astype(np.int64)
    if not len(places) or data is None:
        return Texts(np.zeros(len(array), np.int64), np.empty(0, np.uint8))
    return Texts(places[1:] - places[0], np.frombuffer(data, np.uint8)[places[0] : places[-1]])
