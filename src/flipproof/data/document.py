"""Documents of any size: read in pieces, in an order of their own, and which part of each is held out.

**Held out.** What one config trains on, no other config of the same source measures, because what is held out depends
on the source's documents alone and on no key: of every ten documents, as the source lists them, one. A document is a
row of a table, whatever its column, or a text file. A text file of more than 1 MiB, the files of a source of fewer than
ten, and a row that is alone are divided instead: the last tenth is held out (of a small document 4 KiB, at most half),
from the beginning of a line on. Which tokens, tokenizer, column, length or limits a config names is of no matter:
limits say how much of either part is used, from its beginning on. And nothing needs to be known of documents further
on, so no source is read whole for it.

**Order.** Documents are taken in windows that hold no more than 32 MiB of rows and shuffled by a fixed seed within
each. Files are not read before their turn: a folder of text is one window.

**Pieces.** A text is tokenised in pieces of 64 Ki characters, each cut between a letter or digit and the white space
after it. The pre-tokenizers and vocabularies of byte-level BPE (GPT-2, Llama 3, Qwen), SentencePiece (Llama 2, Gemma,
T5) and WordPiece all part there, so the tokens are those of the whole; ``packing`` takes care of what a tokenizer puts
before a text. A text that has no such place may have one token more for each piece.
"""

import codecs
import gzip
import hashlib
import io
import re
import threading
import zlib
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import numpy as np

from flipproof.errors import ConfigError
from flipproof.log import logger

Part = Literal["all", "training", "held-out"]
"""Of a source."""
_IN = 10  # one document in so many is held out
_LARGE = 2**20  # bytes: a text file above this is divided, whatever its neighbours
_SMALL = 2**12  # bytes: so much of a small document is held out, or half of it
_PIECE = 2**16  # characters
_WINDOW = 2**25  # bytes in memory
COMPRESSED = (".gz", ".zst")
_LETTER_THEN_SPACE = re.compile(r"(?s).*[^\W_](?=[ \n\r\t])")
_ANY_THEN_SPACE = re.compile(r"(?s).*\S(?=\s)")


@dataclass(frozen=True)
class TextFile:
    """A file that is one document of UTF-8 text. Line ends of every kind are read as "\\n", a byte-order mark as
    nothing."""

    path: Path
    size: int
    """Bytes."""
    errors: str = "strict"
    """What becomes of bytes that are not UTF-8, as in ``open``."""

    held_in_memory = 0

    def read(self, start: int, end: int) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                return file.read(end - start)
        except OSError as error:
            raise _cannot_read(self.path, error) from error

    def decoder(self) -> Any:
        return _text_decoder(self.errors)


class CompressedText:
    """A compressed file that is one document of UTF-8 text, as if it were not compressed: its size is that of the text,
    which is counted once, and reading on from where reading ended unpacks nothing twice.

    One such file is open in a thread, since a source may have any number of them.
    """

    held_in_memory = 0
    _open = threading.local()  # .at: (document, its stream, the position in it)

    def __init__(self, path: Path, errors: str = "strict") -> None:
        self.path, self.errors = path, errors

    @cached_property
    def size(self) -> int:
        try:
            with opened(self.path) as file:
                return sum(len(block) for block in iter(lambda: file.read(_LARGE), b""))
        except OSError as error:
            raise _cannot_read(self.path, error) from error

    def read(self, start: int, end: int) -> bytes:
        try:
            return self._read(start, end)
        except OSError as error:
            raise _cannot_read(self.path, error) from error

    def _read(self, start: int, end: int) -> bytes:
        document, stream, at = getattr(self._open, "at", (None, self._blocks(), 0))
        if document is not self or start < at:
            stream, at = self._blocks(), 0
            next(stream)
        while at < start:
            skipped = stream.send(min(start - at, _LARGE))
            if not skipped:
                break
            at += len(skipped)
        data = stream.send(end - start)
        self._open.at = self, stream, at + len(data)
        return data

    def _blocks(self) -> Generator[bytes, int, None]:
        """Of each size that is sent; short at the end alone. The file is closed with the generator."""
        data = b""
        with opened(self.path) as file:
            while True:
                data = file.read((yield data))

    def decoder(self) -> Any:
        return _text_decoder(self.errors)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked where its name says that it is compressed.

    Raises:
        ConfigError: where it cannot be unpacked, also while it is read.
        OSError: where it cannot be read.
    """
    compression = path.suffix.lower() if path.suffix.lower() in COMPRESSED else None
    try:
        if compression == ".gz":
            with gzip.open(path) as unpacked:
                yield cast(BinaryIO, unpacked)
        elif compression == ".zst":
            import pyarrow as pa

            with pa.input_stream(path, compression="zstd") as stream:
                yield cast(BinaryIO, io.BufferedReader(stream))
        else:
            with path.open("rb") as file:
                yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _cannot_unpack(path, error) from error
    except OSError as error:
        if compression is None or error.errno is not None:
            raise
        raise _cannot_unpack(path, error) from error  # pyarrow's


def _cannot_read(path: Path, error: OSError) -> ConfigError:
    return ConfigError([f"data file {str(path)!r} cannot be read ({error.strerror or error})"])


def _cannot_unpack(path: Path, error: Exception) -> ConfigError:
    kind = path.suffix.lower()
    return ConfigError(
        [f"data file {str(path)!r} is damaged, or not what {kind} says ({' '.join(str(error).split())})"]
    )


@dataclass(frozen=True)
class Row:
    """A row of a table, whose text is looked for when it is needed."""

    where: str
    """As messages call it."""
    column: str
    item: Callable[[], Mapping[str, Any]]
    """The row's columns, or those of them that are read."""
    held_in_memory: int
    """Bytes, about."""

    @cached_property
    def data(self) -> bytes:
        item = self.item()
        if self.column not in item:
            raise lacks_column(self.column, self.where, item)
        return _utf8(item[self.column], self.where, self.column)

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, start: int, end: int) -> bytes:
        return self.data[start:end]

    def decoder(self) -> Any:
        return codecs.getincrementaldecoder("utf-8")()


@dataclass(frozen=True)
class Record(Row):
    """A row that is read whole, a sample of instruction data: ``instruct`` makes tokens of it. As a span it is one byte
    that nothing reads, so that it is held out or not, and never divided."""

    size = 1
    data = b" "


def lacks_column(column: str, where: str, columns: Collection[str]) -> ConfigError:
    """What is said of a row without a column that others have: its text may stand in another one."""
    seen = f"the columns {', '.join(columns)}" if columns else "no columns"
    return ConfigError([f"data.text_column = {column!r}: {where} has {seen}; without text it holds null or '' there"])


def _text_decoder(errors: str) -> Any:
    return io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(errors), translate=True)


Document = TextFile | CompressedText | Row


class Span(NamedTuple):
    """Bytes ``start`` to ``end`` of a document."""

    document: Document
    start: int
    end: int


class Piece(NamedTuple):
    """A part of a span's text that is tokenised by itself."""

    text: str
    begins: bool
    """Whether the span begins here."""
    ends: bool


class RowCount:
    """How many rows were read, and how many of them hold no text: many tell of a column that was not meant."""

    def __init__(self) -> None:
        self.rows = self.empty = 0

    def of(self, spans: Iterable[Span]) -> Iterator[Span]:
        """The same spans, counted."""
        for span in spans:
            self.see(span)
            yield span

    def see(self, span: Span) -> None:
        if isinstance(span.document, Row):
            data = span.document.data
            self.rows += 1
            self.empty += not data or data.isspace()

    def say(self, name: str, part: Part) -> None:
        if self.empty:
            which = "" if part == "all" else f", its {part} part"
            logger.info("data source %r%s: %s of %s rows are empty", name, which, f"{self.empty:,}", f"{self.rows:,}")


def spans(documents: Iterable[Document], part: Part) -> Iterator[Span]:
    """What belongs to a part of a source, in the order of packing."""
    numbered = enumerate(documents)
    first = list(islice(numbered, _IN))
    few = len(first) if len(first) < _IN else None
    for index, window in enumerate(_windows(chain(first, numbered))):
        for k in np.random.Generator(np.random.Philox(key=index)).permutation(len(window)):
            number, document = window[k]
            if part != "all" and _is_divided(document, few):
                at = _divided_at(document)
                yield Span(document, 0, at) if part == "training" else Span(document, at, document.size)
            elif part == "all" or (part == "held-out") == _is_held_out(number, few):
                yield Span(document, 0, document.size)


def _windows(numbered: Iterable[tuple[int, Document]]) -> Iterator[list[tuple[int, Document]]]:
    window: list[tuple[int, Document]] = []
    held = 0
    for number, document in numbered:
        window.append((number, document))
        held += document.held_in_memory
        if held >= _WINDOW:
            yield window
            window, held = [], 0
    if window:
        yield window


def _is_divided(document: Document, few: int | None) -> bool:
    """``few``: the number of documents, where it is less than ten."""
    return few == 1 or (not isinstance(document, Row) and (few is not None or document.size > _LARGE))


def _is_held_out(number: int, few: int | None) -> bool:
    """Of each ten documents one, which is not always the same: a source may itself have a period."""
    ten, which = divmod(number, _IN)
    return which == hashlib.sha256(f"held out of ten {ten}".encode()).digest()[0] % _IN % (few or _IN)


def _divided_at(document: Document) -> int:
    """The byte at which the held-out part of a document begins: that of a line if one is near, else of a word, else of
    a character."""
    held = max(document.size // _IN, min(document.size // 2, _SMALL))
    at = document.size - held
    near = document.read(at, at + min(held // 2, _PIECE))
    for mark in (b"\n", b" "):
        if mark in near:
            return at + near.index(mark) + 1
    return at + next((i for i, byte in enumerate(near) if byte & 0xC0 != 0x80), 0)


def pieces(span: Span) -> Iterator[Piece]:
    """The text of a span; nothing where it is blank.

    Raises:
        ConfigError: for a file that cannot be read or is not UTF-8, and a row that is not text.
    """
    text, begins = "", True
    for block in blocks(span):
        text += block
        while len(text) >= _PIECE:
            cut = _last_cut(text[:_PIECE])
            if not (begins and text[:cut].isspace()):
                yield Piece(text[:cut], begins, False)
                begins = False
            text = text[cut:]
    if not begins or not (text.isspace() or not text):
        yield Piece(text, begins, True)


def _last_cut(text: str) -> int:
    match = _LETTER_THEN_SPACE.match(text) or _ANY_THEN_SPACE.match(text)
    return match.end() if match else len(text)


def blocks(span: Span) -> Iterator[str]:
    """The text of a span as it is read, some at a time. Raises as ``pieces`` does."""
    document, at, end = span
    decoder = document.decoder()
    while at < end:
        data = document.read(at, min(at + _PIECE, end))
        at = at + len(data) if data else end  # the file has been cut while it was read
        try:
            yield decoder.decode(data, final=at >= end)
        except UnicodeDecodeError as error:
            assert not isinstance(document, Row)
            raise not_utf8(str(document.path), document.path, error, at - len(error.object) + error.start) from error


def not_utf8(where: str, path: Path, error: UnicodeDecodeError, offset: int) -> ConfigError:
    """What is said of bytes that are not UTF-8, ``offset`` bytes from the beginning of ``where``."""
    byte = error.object[error.start]
    encoding = "UTF-16" if offset == 0 and byte in (0xFE, 0xFF) else "LATIN1"
    return ConfigError(
        [
            f"data file {where}: byte {offset} (0x{byte:02x}) is not UTF-8; convert the file, as with "
            f"iconv -f {encoding} -t UTF-8 {path.name} (LATIN1, CP1252, UTF-16: whichever it is)"
        ]
    )


def _utf8(value: Any, where: str, column: str) -> bytes:
    """A cell as UTF-8."""
    if value is None:
        return b""
    if isinstance(value, str):
        try:
            return value.encode()
        except UnicodeEncodeError:  # halves of surrogate pairs, which JSON can hold and text cannot
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
    if isinstance(value, bytes):
        try:
            value.decode()
            return value
        except UnicodeDecodeError as error:
            raise ConfigError(
                [f"data.text_column = {column!r}: {where} holds bytes that are not UTF-8 (byte {error.start} of them)"]
            ) from error
    kind = type(value).__name__
    if isinstance(value, list) and value:
        kind += f" of {type(value[0]).__name__}"
    hint = "; chat messages are read with data.format = 'chat'" if isinstance(value, list) else ""
    raise ConfigError([f"data.text_column = {column!r}: {where} holds a value of type {kind}, not text{hint}"])
