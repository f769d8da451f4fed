"""Parquet files that a user gives: the one place where they are opened, checked and read.

pyarrow does the reading; polars would end the process over some damaged files. Whatever is wrong becomes one line, in
which "damaged" is said only of what cannot be parsed.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from workbench.common.errors import UserError, one_line
from workbench.common.reading import require_regular


@contextmanager
def explained(what: str, otherwise: str = "damaged") -> Iterator[None]:
    """Turn whatever pyarrow raises over a file into a UserError of one line.

    Args:
        what: the file, with which the line begins.
        otherwise: what is said where the file's bytes are at fault.
    """
    import pyarrow

    try:
        yield
    # Not about the file's bytes: a line of our own, and a lack of memory, pass as they are.
    except (UserError, MemoryError):
        raise
    # Before the others: the file is whole, and must not be called damaged.
    except (NotImplementedError, pyarrow.ArrowNotImplementedError) as error:
        raise UserError(f"{what}: holds columns of a type that is not read ({one_line(error)})") from None
    except OSError as error:
        if error.errno:  # from the system; pyarrow's own, about the bytes, have none
            raise UserError(f"{what}: cannot be read ({one_line(error)})") from None
        raise UserError(f"{what}: {otherwise} ({one_line(error)})") from None
    except Exception as error:  # pyarrow raises many kinds
        raise UserError(f"{what}: {otherwise} ({one_line(error)})") from None


@contextmanager
def open_parquet(path: Path, what: str) -> Iterator[Any]:
    """A pyarrow ParquetFile, whose footer has been read.

    Args:
        what: what the file is, with which lines about it begin.
    Raises:
        UserError: it is no regular file, not readable, or not parquet.
    """
    import pyarrow.parquet

    require_regular(path, what)
    with explained(what, f"{path.name} is not a whole parquet file"):
        file = pyarrow.parquet.ParquetFile(path)
    with file, explained(what):
        yield file


def read_table(path: Path, what: str, columns: Sequence[str] | None = None) -> Any:
    """A file's rows as a pyarrow table.

    Args:
        what: what the file is, with which lines about it begin.
        columns: those to read, in this order; None = all.
    Raises:
        UserError: it cannot be opened or parsed, lacks a column or has one twice.
    """
    with open_parquet(path, what) as file:
        require_columns(file.schema_arrow.names, columns or file.schema_arrow.names, what)
        table = file.read(columns)
        return table if columns is None else table.select(columns)


def require_columns(names: Sequence[str], wanted: Sequence[str], what: str, expected: str = "") -> None:
    """Check that each wanted column is there, once.

    Args:
        names: of the columns that there are.
        expected: a remark about columns that are missing.
    Raises:
        UserError: one is there twice, or not at all.
    """
    twice = [column for column in wanted if names.count(column) > 1]
    if twice:
        raise UserError(f"{what}: {twice[0]} is there twice")
    missing = [column for column in wanted if column not in names]
    if missing:
        raise UserError(f"{what}: no column {', '.join(missing)}{expected}")


def unified(schemas: Mapping[str, Any], what: str) -> Any:
    """The schema that files of the same columns have together.

    Files that differ agree on text for texts, on double precision for numbers and truth values, and on
    {bytes, path} for images of which some are bare bytes. Columns of nulls alone fit everything.

    Args:
        schemas: pyarrow schemas by the names of their files, for messages.
    Raises:
        UserError: a column's types have nothing in common.
    """
    import pyarrow as pa

    first = next(iter(schemas.values()))
    return pa.schema([(column, _unified_type(column, schemas, what)) for column in first.names])


def _unified_type(column: str, schemas: Mapping[str, Any], what: str) -> Any:
    """The type of one column in the schema of all files."""
    import pyarrow as pa

    types = {file: schema.field(column).type for file, schema in schemas.items()}
    distinct = list(dict.fromkeys(types.values()))
    typed = [kind for kind in distinct if not pa.types.is_null(kind)]
    if len(typed) <= 1:
        return (typed or distinct)[0]
    for common, fits in ((pa.string(), is_text), (pa.float64(), _is_number), (pa.binary(), _is_bytes)):
        if all(fits(kind) for kind in typed):
            return common
    if all(_is_bytes(kind) or is_image(kind) for kind in typed):
        return pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    one, other = (next(file for file, kind in types.items() if kind == kinds) for kinds in typed[:2])
    raise UserError(
        f"{what}: {column} holds {types[one]} in {one} and {types[other]} in {other}; write all of its files with one "
        "type"
    )


def is_text(kind: Any) -> bool:
    """Whether a column's type is one of those for texts."""
    import pyarrow.types as t

    # A dictionary column stores each text once, and numbers in its place.
    kind = kind.value_type if t.is_dictionary(kind) else kind
    return t.is_string(kind) or t.is_large_string(kind) or t.is_string_view(kind)


def _is_number(kind: Any) -> bool:
    import pyarrow.types as t

    return t.is_boolean(kind) or t.is_integer(kind) or t.is_floating(kind)


def _is_bytes(kind: Any) -> bool:
    import pyarrow.types as t

    return t.is_binary(kind) or t.is_large_binary(kind) or t.is_fixed_size_binary(kind) or t.is_binary_view(kind)


def is_image(kind: Any) -> bool:
    """Whether a column has images as Hugging Face's datasets writes them: an encoded file's bytes, and its path."""
    import pyarrow.types as t

    return t.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}
