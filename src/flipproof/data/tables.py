"""Rows of tables, one at a time: JSON Lines, a JSON array, CSV, Parquet; of each row no more than is asked for.

What is wrong with one column, or with one line, is of no matter to the others.
"""

import codecs
import csv
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from flipproof.data.document import COMPRESSED, CompressedText, Record, Row, Span, TextFile, blocks, not_utf8, opened
from flipproof.errors import ConfigError

_HEAD = 2**16  # bytes within which a file begins
_ITEM = 2**26  # characters: no item of a JSON array is larger
_CELL = 2**26  # characters: no cell of CSV is longer


def reason(error: BaseException) -> str:
    """What went wrong, on one line; of ``datasets``' error that says only that something did, its cause."""
    while type(error).__name__.startswith("DatasetGeneration") and error.__cause__ is not None:
        error = error.__cause__
    text = str(error).split("Example of usage")[0]
    return " ".join(text.split())[:500] or type(error).__name__


def no_column(column: str, name: str, columns: Iterable[str]) -> ConfigError:
    instead = "instruction data has instruction and output, prompt and completion, or messages (data.format)"
    return ConfigError([f"data.text_column = {column!r}: {name!r} has the columns {', '.join(columns)}; {instead}"])


def rows(values: Iterable[Any], name: str, column: str | None) -> Iterator[Row]:
    """Rows of the values of a column, or where that is None of whole rows."""
    for number, value in enumerate(values):
        where = f"{name}, row {number}"
        if column is None:
            yield Record(where, "", partial(dict, value), len(str(value)))
        else:
            held = len(value) if isinstance(value, str | bytes) else 100
            yield Row(where, column, partial(dict, [(column, value)]), held)


def parquet_rows(path: Path, column: str | None) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if column is None:
                yield from rows((row for batch in file.iter_batches(256) for row in batch.to_pylist()), str(path), None)
                return
            if column not in file.schema_arrow.names:
                raise no_column(column, str(path), file.schema_arrow.names)
            batches = file.iter_batches(256, columns=[column])
            yield from rows((v for batch in batches for v in batch.column(0).to_pylist()), str(path), column)
    except pa.ArrowException as error:
        raise ConfigError([f"data source {str(path)!r} cannot be read ({reason(error)})"]) from error


def json_rows(path: Path, column: str | None) -> Iterator[Row]:
    """The rows of a file of JSON Lines, or of one JSON array."""
    with opened(path) as file:
        begins = file.read(_HEAD).removeprefix(codecs.BOM_UTF8).lstrip()
        if begins.startswith(b"["):
            for number, (item, length) in enumerate(_array_items(path)):
                where = f"{path}, item {number}"
                yield _row(where, column, partial(_object, item, where), length)
            return
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}, line {number}"
                yield _row(where, column, partial(_line, line, where, path), len(line))


def _row(where: str, column: str | None, item: Callable[[], dict[str, Any]], held: int) -> Row:
    return Record(where, "", item, held) if column is None else Row(where, column, item, held)


def csv_rows(path: Path, column: str | None) -> Iterator[Row]:
    """The rows of a file whose first line names its columns, parted by commas, or in a .tsv by tabs."""
    csv.field_size_limit(max(csv.field_size_limit(), _CELL))
    number = 0

    def lines(file: BinaryIO) -> Iterator[str]:
        nonlocal number
        for number, line in enumerate(file, 1):
            try:
                yield (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode()
            except UnicodeDecodeError as error:
                raise not_utf8(f"{path}, line {number}", path, error, error.start) from error

    with opened(path) as file:
        reader = csv.reader(lines(file), delimiter="\t" if suffix_of(path) == ".tsv" else ",", strict=True)
        try:
            header = next(reader, None)
            if header is None:
                return
            if twice := [name for name in dict.fromkeys(header) if header.count(name) > 1]:
                raise ConfigError([f"data file {path}: its first line names column {twice[0]!r} more than once"])
            if column is not None and column not in header:
                raise no_column(column, str(path), header)
            begins = number + 1
            for cells in reader:
                where, begins = f"{path}, line {begins}", number + 1
                if cells and len(cells) != len(header):
                    raise ConfigError([f"data file {where} has {len(cells)} cells, and the first line {len(header)}"])
                if cells:
                    row = dict(zip(header, cells, strict=True))
                    row = row if column is None else {column: row[column]}
                    yield _row(where, column, partial(dict, row), sum(map(len, row.values())))
        except csv.Error as error:
            raise ConfigError([f"data file {path}, line {number} is not CSV: {reason(error)}"]) from error


def text_file(path: Path, errors: str = "strict") -> TextFile | CompressedText:
    """Raises OSError where there is no such file."""
    if path.suffix.lower() in COMPRESSED:
        return CompressedText(path, errors)
    return TextFile(path, path.stat().st_size, errors)


def suffix_of(path: Path) -> str:
    """ ".csv" of "a.csv" and of "a.csv.gz"."""
    name = path.name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return Path(name).suffix


def _line(line: bytes, where: str, path: Path) -> dict[str, Any]:
    try:
        item = json.loads(line.removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        raise not_utf8(where, path, error, error.start) from error
    except (ValueError, RecursionError) as error:
        what = reason(error)
        if isinstance(error, json.JSONDecodeError):  # which speaks of a line 1 in the line
            what = f"{error.msg.removesuffix(' at')}, column {error.colno}"
        raise ConfigError([f"data file {where} is not one JSON object: {what}"]) from error
    return _object(item, where)


def _object(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise ConfigError([f"data file {where} holds a {type(item).__name__}, not an object with columns"])
    return item


def _array_items(path: Path) -> Iterator[tuple[Any, int]]:
    """(item, its length in characters) of a file that is one JSON array, of which one item at a time is decoded."""
    document = text_file(path)
    reader = _JsonReader(blocks(Span(document, 0, document.size)))
    number, mark = -1, "["
    try:
        while reader.skip() == mark:
            reader.at += 1
            if mark == "[" and reader.skip() == "]":
                break
            number, mark = number + 1, ","
            yield reader.item()
        if reader.skip() != "]":
            raise ValueError("a comma or the end of the array is missing after it")
        reader.at += 1
        if rest := reader.skip():
            raise ConfigError([f"data file {path}: {rest!r} follows the end of its JSON array; one array is allowed"])
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError([f"data file {path}, item {number} is not JSON: {reason(error)}"]) from error


class _JsonReader:
    """A text that is read as far as it is asked for."""

    def __init__(self, unread: Iterator[str]) -> None:
        self.unread, self.text, self.at = unread, "", 0

    def skip(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at].isspace():
                self.at += 1
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def item(self) -> tuple[Any, int]:
        """The value that comes next, and its length. Raises ValueError where it is none."""
        while True:
            self.skip()
            try:
                item, end = json.JSONDecoder().raw_decode(self.text, self.at)
            except ValueError:
                if len(self.text) - self.at > _ITEM or not self._more():
                    raise
            else:
                length, self.at = end - self.at, end
                return item, length

    def _more(self) -> bool:
        """Read on, as much again as is there already: what is decoded anew stays within twice of the whole."""
        self.text, self.at = self.text[self.at :], 0
        before = len(self.text)
        for block in self.unread:
            self.text += block
            if len(self.text) > 2 * before:
                break
        return len(self.text) > before
