"""Parquet inputs for ``moetrain data tokenize``; the one file that needs pyarrow, loaded only for such an input."""

from collections.abc import Iterator

from moetrain.config import UserError
from moetrain.data.sources import Piece, Place, Source, document

try:  # a plain ImportError would not tell the user which of their files asked for it
    import pyarrow as pa  # pyright: ignore[reportMissingImports]
    import pyarrow.parquet as pq  # pyright: ignore[reportMissingImports]
except ImportError as e:
    raise UserError("reading .parquet needs pyarrow: pip install pyarrow (or give jsonl)") from e

_BATCH_ROWS = 1024


def read_rows(source: Source, *, field: str, start: Place) -> Iterator[Piece]:
    """One document per row of column ``field``, from row ``start.offset`` on; rows are numbered from 1 in messages."""
    try:
        file = pq.ParquetFile(source.path)
        names = file.schema_arrow.names
        if field not in names:
            raise UserError(f"{source.path}: no column {field!r} (it has {', '.join(names)}): set field=")
        num_rows, row = max(file.metadata.num_rows, 1), 0
        for group in range(file.num_row_groups):
            group_rows = file.metadata.row_group(group).num_rows
            if row + group_rows <= start.offset:  # finished before the restart: do not even decode it
                row += group_rows
                continue
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if row > start.offset:
                        where, read_bytes = f"{source.path}:{row}", source.size * row // num_rows
                        yield document(
                            {field: text}, where=where, field=field, after=Place(row, row + 1), read_bytes=read_bytes
                        )
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"cannot read {source.path}: {' '.join(str(e).split())}") from e
