"""What a config's data stand for: text files, tables, a Hub data set, one of ``save_to_disk``, the standard library.

A local name is a path, whatever characters it holds, and wins over a Hub data set of the same name. Of a folder all
that can be read is read, in the order of paths, each file once however many links lead to it; hidden ones are not.
Tables are read a row at a time, and no more of a row than its text column.

**Splits.** Where there are splits, those called train are trained on. What is held out is the split that
``data.eval_split`` names, whole; of a folder and of ``save_to_disk`` without it the validation split, or the test split
where there is none; else a part of what is trained on (see ``document``).
"""

import hashlib
import os
import pkgutil
import re
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from flipproof.config import DataConfig
from flipproof.data.document import Document, Part, Row, Span, lacks_column, spans
from flipproof.data.folders import KINDS, by_split, identity, kind_of, readable_within
from flipproof.data.tables import csv_rows, json_rows, no_column, parquet_rows, reason, rows, suffix_of, text_file
from flipproof.errors import ConfigError
from flipproof.models.hub import cache_where_unreachable

_WAYS_OUT = "give a local file or folder as data.source, or data.source = 'stdlib', which needs no network"
_HEAD = 2**16  # bytes of a file that are part of its signature
_ROWS_OF_SIGNATURE = 64  # of a stream
_ROWS_TO_SEE = 1000  # of JSON, before a column is said not to be there
_ROWS = {"json": json_rows, "csv": csv_rows, "parquet": parquet_rows}


class Choice(NamedTuple):
    """Which part of a data set a config names; None where it names none."""

    subset: str | None = None
    split: str | None = None
    revision: str | None = None
    key: str = "data.split"
    """What the split is called in the config."""

    def refuse(self, what: str, *fields: str) -> None:
        """Raises ConfigError where one of these is named."""
        for field in fields:
            if (value := getattr(self, field)) is not None:
                raise ConfigError([f"{self.key if field == 'split' else f'data.{field}'} = {value!r}: {what}"])


@dataclass(frozen=True)
class LocalFiles:
    """Files of one kind or several."""

    name: str
    column: str | None
    """Of tables, that holds the text; None where rows are read whole."""
    training: list[Path]
    held_out: list[Path] | None = None
    """None where it is a part of the others."""
    splits: str | None = None
    """What is to be said of them."""
    kinds: str | None = None
    """What is to be said of these."""
    errors: str = "strict"
    """As in ``TextFile``."""
    as_text: bool = False
    """Whatever the names of the files say."""

    remote = False
    """Whether asking for anything may use the network, and write into the cache of ``datasets``."""

    @property
    def said(self) -> list[str]:
        """What a user is told of it."""
        return [line for line in (self.kinds, self.splits) if line]

    @property
    def is_text(self) -> bool:
        """Whether all files are text, of which sizes tell how much there is."""
        return all(self._kind(path) == "text" for path in self.training)

    def _kind(self, path: Path) -> str:
        return "text" if self.as_text else kind_of(path) or ""

    def of(self, part: Part) -> list[Path]:
        """The files that a part is in."""
        return self.training if self.held_out is None or part == "training" else self.held_out

    def spans(self, part: Part) -> Iterator[Span]:
        """What belongs to a part, in the order of packing. Raises ConfigError where it cannot be read."""
        if part == "training" and not self.training:
            raise ConfigError(
                [f"data source {self.name!r} holds validation or test files alone: it can be data.eval_source"]
            )
        if self.column is not None:
            self._check_json_column(part, self.column)
        return spans(self._documents(part), part if self.held_out is None else "all")

    def signature(self, part: Part) -> Any:
        """JSON that changes when the documents of a part do."""
        kinds = [self._kind(path) for path in self.of(part)]
        column = None if set(kinds) <= {"text"} else self.column
        kind = kinds[0] if len(set(kinds)) == 1 else kinds
        return [kind, column, self.errors, [_file_signature(path) for path in self.of(part)]]

    def identities(self, part: Part) -> set[Any]:
        """What a part is made of: two sources with one in common have text in common."""
        return {identity(path) for path in self.of(part)}

    def columns(self, part: Part) -> list[str] | None:
        """The columns of a part's tables, of those of JSON the first rows'; None where any of it is text."""
        kinds = {self._kind(path) for path in self.of(part)}
        return None if "text" in kinds else self._columns(part, *kinds)

    def _columns(self, part: Part, *kinds: str) -> list[str]:
        found: dict[str, None] = {}
        for row in islice(replace(self, column=None)._documents(part, *kinds), _ROWS_TO_SEE if "json" in kinds else 1):
            assert isinstance(row, Row)
            found |= dict.fromkeys(row.item())
            if self.column in found:
                break
        return list(found)

    def _documents(self, part: Part, *kinds: str) -> Iterator[Document]:
        for path in self.of(part):
            kind = self._kind(path)
            if kinds and kind not in kinds:
                continue
            try:
                if kind == "text":
                    yield text_file(path, self.errors)
                else:
                    yield from _ROWS[kind](path, self.column)
            except OSError as error:
                raise ConfigError(
                    [f"data source {self.name!r}: {path} cannot be read ({error.strerror or reason(error)})"]
                ) from error

    def _check_json_column(self, part: Part, column: str) -> None:
        """Raises ConfigError where no row has it; of other tables each file is asked when it is read."""
        columns = self._columns(part, "json")
        if columns and column not in columns:
            raise no_column(column, self.name, columns)


class _Table:
    """Rows that ``datasets`` holds in Arrow files."""

    name: str
    column: str | None

    def _rows(self, data: Any) -> Iterator[Row]:
        return rows(self._values(data), self.name, self.column)

    def _values(self, data: Any) -> Iterator[Any]:
        if self.column is not None and self.column not in data.column_names:
            raise no_column(self.column, self.name, data.column_names)
        values = data.data if self.column is None else data.data.column(self.column)
        for start in range(0, len(values), 256):
            yield from values.slice(start, 256).to_pylist()

    def _signature(self, data: Any) -> Any:
        files = [file["filename"] for file in data.cache_files]
        if not files:  # it is in memory alone
            texts = hashlib.sha256()
            for value in self._values(data):
                texts.update(f"{len(value or '')} {value}".encode(errors="replace"))
            return [self.column, texts.hexdigest()]
        return [self.column, [[name, os.stat(name).st_size, os.stat(name).st_mtime_ns] for name in files]]


@dataclass(frozen=True)
class SavedData(_Table):
    """A directory of ``save_to_disk``."""

    name: str
    column: str | None
    path: Path
    choice: Choice

    remote = False
    is_text = False
    said = ()

    def spans(self, part: Part) -> Iterator[Span]:
        data, whole = self._of(part)
        return spans(self._rows(data), "all" if whole else part)

    def signature(self, part: Part) -> Any:
        data, whole = self._of(part)
        return [*self._signature(data), whole]

    def columns(self, part: Part) -> list[str]:
        names: list[str] = self._of(part)[0].column_names
        return names

    def identities(self, part: Part) -> set[Any]:
        return {identity(Path(file["filename"])) for file in self._of(part)[0].cache_files}

    def _of(self, part: Part) -> tuple[Any, bool]:
        """(the rows that a part is in, whether it is all of them)."""
        split, key = self.choice.split, self.choice.key
        if not isinstance(self._data, Mapping):
            self.choice.refuse(f"{self.name!r} has no splits", "split")
            return self._data, False
        there = ", ".join(self._data)
        held_out = next((name for name in ("validation", "test") if name in self._data), None)
        if split is None and len(self._data) == 1:
            split = next(iter(self._data))
        elif part != "training" and held_out is not None and (split is None or (split, key) == ("train", "data.split")):
            return self._data[held_out], True
        if (split or "train") not in self._data:
            raise ConfigError([f"{key} = {split or 'train'!r}: {self.name!r} has the splits {there}"])
        whole = key == "data.split" and (split or "train") == "train" and held_out is not None
        return self._data[split or "train"], whole

    @cached_property
    def _data(self) -> Any:
        import datasets

        try:
            return datasets.load_from_disk(self.path)
        except Exception as error:  # of many kinds; each means that this source gives no text
            raise ConfigError(
                [f"data source {self.name!r} is a directory of save_to_disk that cannot be read ({reason(error)})"]
            ) from error


@dataclass(frozen=True)
class HubData(_Table):
    """A split of a Hub data set."""

    name: str
    column: str | None
    choice: Choice

    remote = True
    is_text = False
    said = ()
    _how: ClassVar[dict[str, Any]] = {}
    """How else it is loaded."""

    @property
    def split(self) -> str:
        return self.choice.split or "train"

    def spans(self, part: Part) -> Iterator[Span]:
        return spans(self._rows(self._data), part)

    def signature(self, part: Part) -> Any:
        return self._signature(self._data) + [*self.choice[:3]] * any(self.choice[:3])

    def columns(self, _part: Part) -> list[str]:
        names: list[str] = self._data.column_names
        return names

    def identities(self, part: Part) -> set[Any]:
        subset = self.choice.subset or "default"
        return {(self.name.lower(), subset, name) for name in self.split.split("+")}

    def check(self) -> None:
        """Whether it can be reached, without its rows. Raises ConfigError."""
        import datasets

        try:
            with cache_where_unreachable():
                found = datasets.load_dataset_builder(self.name, self.choice.subset, revision=self.choice.revision)
        except Exception as error:  # of dozens of kinds; each means that this source gives no text
            raise ConfigError(
                [f"data source {self.name!r} cannot be reached as a Hub data set ({_with_key(reason(error))})"]
            ) from error
        there = list(found.info.splits or ())
        for name in self.split.split("+"):
            if there and name.partition("[")[0] not in there:
                raise ConfigError(
                    [f"{self.choice.key} = {self.split!r}: {self.name!r} has the splits {', '.join(there)}"]
                )

    @cached_property
    def _data(self) -> Any:
        import datasets
        from datasets import packaged_modules

        if self.name in {module.name for module in pkgutil.iter_modules(packaged_modules.__path__)}:
            # load_dataset would read whatever files of this kind are in the current directory
            raise ConfigError([f"data source {self.name!r} is a kind of file, not the name of one; {_WAYS_OUT}"])
        try:
            with cache_where_unreachable():
                return datasets.load_dataset(
                    self.name, self.choice.subset, split=self.split, revision=self.choice.revision, **self._how
                )
        except Exception as error:  # of dozens of kinds; each means that this source gives no text
            raise ConfigError(
                [
                    f"data source {self.name!r} is no local path and cannot be reached as a Hub data set "
                    f"({_with_key(reason(error))}); {_WAYS_OUT}"
                ]
            ) from error


@dataclass(frozen=True)
class HubStream(HubData):
    """The same over the network, no more of it than is used."""

    _how: ClassVar[dict[str, Any]] = {"streaming": True}

    def signature(self, part: Part) -> Any:
        """Of what is said of it and of its beginning: all of it is not here to be looked at."""
        info, texts = self._data.info, hashlib.sha256()
        for value in islice(self._values(self._data), _ROWS_OF_SIGNATURE):
            texts.update(f"{len(value or '')} {value}".encode(errors="replace"))
        about = [self.name, self.column, *self.choice[:3], str(info.version), info.dataset_size]
        return ["streamed", *about, texts.hexdigest()]

    def columns(self, _part: Part) -> list[str]:
        """Those of the first row: a stream may not know them before."""
        return list(next(self._read(), {}))

    def _values(self, data: Any) -> Iterator[Any]:
        assert self.column is not None  # what has rows that are read whole is not streamed
        for number, row in enumerate(self._read()):
            if number == 0 and self.column not in row:
                raise no_column(self.column, self.name, row)
            if self.column not in row:
                raise lacks_column(self.column, f"{self.name}, row {number}", row)
            yield row[self.column]

    def _read(self) -> Iterator[dict[str, Any]]:
        read, stream = 0, self._data
        try:
            for row in stream:
                yield row
                read += 1
        except Exception as error:  # of the network, of its files, of dozens of kinds
            raise ConfigError(
                [f"data source {self.name!r} cannot be read on after {read} rows ({reason(error)})"]
            ) from error


def _with_key(said: str) -> str:
    """What ``datasets`` says, and the key that it is about."""
    if "BuilderConfig" in said or "Config name" in said:
        return f"{said}: data.subset"
    return f"{said}: data.split, data.eval_split" if "split" in said else said


Source = LocalFiles | SavedData | HubData


_NO_CHOICE = Choice()


def open_source(name: str, column: str, choice: Choice = _NO_CHOICE, streaming: bool = False) -> Source:
    """A source by its name in the config; ``streaming`` counts for Hub data. Reads no text and asks no network yet.

    Raises:
        ConfigError: where the name is neither stdlib, nor a path, nor can be a Hub data set's; for a folder without
            files that can be read; for a subset, a split or a revision of what has none.
    """
    if name == "stdlib":
        choice.refuse("the standard library has none", "subset", "split", "revision")
        return _standard_library()
    if (path := _local(name)) is not None:
        return _local_source(name, path, column, choice)
    endings = {*KINDS, ".gz", ".zst"}
    suffix = Path(name).suffix.lower()
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{,95}(/[\w.-]{1,96})?", name, re.ASCII) or suffix in endings:
        raise ConfigError([f"data source {name!r} is no file or folder here, and no Hub data set is named so"])
    return (HubStream if streaming else HubData)(name, column, choice)


def whole_rows(source: Source) -> Source:
    """The same source, of whose tables rows are read whole (``Record``)."""
    return replace(source, column=None)


def training_source(data: DataConfig) -> Source:
    """What a config trains on, by its part "training". Raises as ``open_source`` does."""
    return open_source(data.source, data.text_column, Choice(data.subset, data.split, data.revision), data.streaming)


def held_out_source(data: DataConfig) -> tuple[Source, Part]:
    """What a config measures, and which part of it. Raises as ``open_source`` does."""
    if data.eval_source is None and data.eval_split is None:
        return training_source(data), "held-out"
    name = data.source if data.eval_source is None else data.eval_source
    subset, revision = (data.subset, data.revision) if name == data.source else (None, None)
    choice = Choice(subset, data.eval_split, revision, "data.eval_split")
    return open_source(name, data.text_column, choice, data.streaming), "all"


def check_apart(data: DataConfig) -> None:
    """Raises ConfigError where evaluation text is among the files or is the split of the data set that a config trains
    on."""
    try:
        trained, (measured, part) = training_source(data), held_out_source(data)
        if part == "held-out" or not _overlap(trained.identities("training"), measured.identities(part)):
            return
    except ConfigError:  # which will be said where it is read
        return
    given = " and ".join(
        f"data.{key} = {value!r}"
        for key, value in (("eval_source", data.eval_source), ("eval_split", data.eval_split))
        if value is not None
    )
    raise ConfigError(
        [
            f"{given} is text that data.source = {data.source!r} trains on; leave it out (a part of data.source is "
            "always kept out of training), or name other text"
        ]
    )


def _bounds(name: str) -> tuple[str, str, tuple[float, float]] | None:
    """("train", "%", (10, 20)) of "train[10%:20%]"; None of what is not a split and a slice of it."""
    told = re.fullmatch(r"([^\[]*)(?:\[(\d*)(%?):(\d*)(%?)\])?", name)
    if told is None:
        return None
    split, begin, of_begin, end, of_end = told.groups()
    return split, of_begin or of_end or "", (float(begin or 0), float(end or "inf"))


def _overlap(trained: set[Any], measured: set[Any]) -> bool:
    """Two parts of a split do not where one ends before the other begins."""
    for a in trained:
        for b in measured:
            if a == b:
                return True
            if len(a) == len(b) == 3 and a[:2] == b[:2]:
                one, two = _bounds(a[2]), _bounds(b[2])
                if one is None or two is None:
                    return True
                apart = one[1] == two[1] and max(one[2][0], two[2][0]) >= min(one[2][1], two[2][1])
                if one[0] == two[0] and not apart:
                    return True
    return False


def _local(name: str) -> Path | None:
    """The path that a name is, with ~ for the home directory; None where nothing is there."""
    return next((Path(n) for n in (name, os.path.expanduser(name)) if name and os.path.lexists(n)), None)


def _file_signature(path: Path) -> Any:
    """Changes with the file, even where it keeps size and modification time: the change time cannot be set, and where
    it is coarse the beginning tells."""
    try:
        stat = path.stat()
        with path.open("rb") as file:
            head = hashlib.sha256(file.read(_HEAD)).hexdigest()
    except OSError as error:
        raise ConfigError([f"data file {str(path)!r} cannot be read ({error.strerror})"]) from error
    return [os.path.realpath(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, head]


def _standard_library() -> LocalFiles:
    """The standard library's modules as documents, without tests and without what was installed beside them."""
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    files = []
    for directory, below, names in os.walk(sysconfig.get_paths()["stdlib"]):
        below[:] = set(below) - left_out
        files += [Path(directory, name) for name in names if name.endswith(".py")]
    files.sort()
    return LocalFiles("stdlib", "text", files, errors="replace", as_text=True)


def _local_source(name: str, path: Path, column: str, choice: Choice) -> Source:
    choice.refuse(f"{name!r} is here, and only a Hub data set has subsets and revisions", "subset", "revision")
    if path.is_dir():
        if any((path / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
            return SavedData(name, column, path, choice)
        files, kinds = readable_within(name, path)
        return LocalFiles(name, column, *by_split(name, path, files, choice.split, choice.key), kinds)
    if not path.is_file():
        raise ConfigError([f"data source {name!r} is no file and no folder (or a link that leads to none)"])
    choice.refuse(f"{name!r} is one file, and has no splits", "split")
    if kind_of(path) is None:
        if suffix_of(path) == ".parquet":
            raise ConfigError([f"data source {name!r}: Parquet is compressed within; unpack the file"])
        readable = ", ".join(KINDS)
        raise ConfigError(
            [f"data source {name!r}: files of {readable} (also .gz, .zst) are read; found {path.suffix or path.name}"]
        )
    return LocalFiles(name, column, [path])
