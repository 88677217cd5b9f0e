"""What a name in the config stands for: text files, tables, a Hub data set, the standard library's source.

A local name is a path, whatever characters it holds, and wins over a Hub data set of the same name. Of a folder all
files of one kind are read, in the order of their paths, each once however many links lead to it; hidden ones are not.
Tables are read a row at a time, and no more of a row than its text column.

**Splits.** Where a folder's files or subfolders are called train, validation or test, as ``datasets`` knows them, the
first are trained on and the held-out text is the validation files, or the test files where there are none.
"""

import hashlib
import os
import pkgutil
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from flipproof.data.document import Document, Part, Row, Span, TextFile, spans
from flipproof.data.tables import json_rows, no_column, parquet_rows, reason, rows
from flipproof.errors import ConfigError

_KINDS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_WAYS_OUT = "give a local file or folder as data.source, or data.source = 'stdlib', which needs no network"
_ABOUT_DATA = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""Files beside the data of a data set."""
_SPLITS = {
    "training": {"train", "training"},
    "validation": {"validation", "valid", "dev", "val"},
    "test": {"test", "testing", "eval", "evaluation"},
}
_HEAD = 2**16  # bytes of a file that are part of its signature
_ROWS_OF_SIGNATURE = 64  # of a stream
_ROWS_TO_SEE = 1000  # of JSON, before a column is said not to be there


@dataclass(frozen=True)
class LocalFiles:
    """Files of one kind."""

    name: str
    kind: str
    column: str
    training: list[Path]
    held_out: list[Path] | None = None
    """None where the files have no splits."""
    splits: str | None = None
    """What is to be said of them."""
    errors: str = "strict"
    """As in ``TextFile``."""

    remote = False
    """Whether asking for anything may use the network, and write into the cache of ``datasets``."""

    def of(self, part: Part) -> list[Path]:
        """The files that a part is in."""
        return self.training if self.held_out is None or part == "training" else self.held_out

    def spans(self, part: Part) -> Iterator[Span]:
        """What belongs to a part, in the order of packing. Raises ConfigError where it cannot be read."""
        if part == "training" and not self.training:
            raise ConfigError(
                [f"data source {self.name!r} holds validation or test files alone: it can be data.eval_source"]
            )
        if self.kind == "json":
            self._check_column(part)
        return spans(self._documents(part), part if self.held_out is None else "all")

    def signature(self, part: Part) -> Any:
        """JSON that changes when the documents of a part do."""
        column = None if self.kind == "text" else self.column
        return [self.kind, column, self.errors, [_file_signature(path) for path in self.of(part)]]

    def _documents(self, part: Part) -> Iterator[Document]:
        for path in self.of(part):
            try:
                if self.kind == "text":
                    yield TextFile(path, path.stat().st_size, self.errors)
                else:
                    yield from (json_rows if self.kind == "json" else parquet_rows)(path, self.column)
            except OSError as error:
                raise ConfigError(
                    [f"data source {self.name!r}: {path} cannot be read ({error.strerror or error})"]
                ) from error

    def _check_column(self, part: Part) -> None:
        columns: dict[str, None] = {}
        for row in islice(self._documents(part), _ROWS_TO_SEE):
            assert isinstance(row, Row)
            item = row.item()
            if self.column in item:
                return
            columns |= dict.fromkeys(item)
        if columns:
            raise no_column(self.column, self.name, columns)


@dataclass(frozen=True)
class HubData:
    """The train split of a Hub data set."""

    name: str
    column: str

    remote = True
    splits = None
    _how: ClassVar[dict[str, Any]] = {}
    """How it is loaded."""

    def spans(self, part: Part) -> Iterator[Span]:
        return spans(self._rows(), part)

    def signature(self, part: Part) -> Any:
        files = [file["filename"] for file in self._data.cache_files]
        if not files:  # it is in memory alone
            texts = hashlib.sha256()
            for value in self._values():
                texts.update(f"{len(value or '')} {value}".encode(errors="replace"))
            return [self.column, texts.hexdigest()]
        return [self.column, [[name, os.stat(name).st_size, os.stat(name).st_mtime_ns] for name in files]]

    @cached_property
    def _data(self) -> Any:
        import datasets
        from datasets import packaged_modules

        if self.name in {module.name for module in pkgutil.iter_modules(packaged_modules.__path__)}:
            # load_dataset would read whatever files of this kind are in the current directory
            raise ConfigError([f"data source {self.name!r} is a kind of file, not the name of one; {_WAYS_OUT}"])
        try:
            data = datasets.load_dataset(self.name, split="train", **self._how)
        except Exception as error:  # of dozens of kinds; each means that this source gives no text
            raise ConfigError(
                [
                    f"data source {self.name!r} is no local path and cannot be reached as a Hub data set "
                    f"({reason(error)}); {_WAYS_OUT}"
                ]
            ) from error
        if data.column_names is not None and self.column not in data.column_names:  # a stream may not know them
            raise no_column(self.column, self.name, data.column_names)
        return data

    def _values(self) -> Iterator[Any]:
        column = self._data.data.column(self.column)
        for start in range(0, len(column), 256):
            yield from column.slice(start, 256).to_pylist()

    def _rows(self) -> Iterator[Row]:
        return rows(self._values(), self.name, self.column)


@dataclass(frozen=True)
class HubStream(HubData):
    """The same over the network, no more of it than is used."""

    _how: ClassVar[dict[str, Any]] = {"streaming": True}

    def signature(self, part: Part) -> Any:
        """Of what is said of it and of its beginning: all of it is not here to be looked at."""
        info, texts = self._data.info, hashlib.sha256()
        for value in islice(self._values(), _ROWS_OF_SIGNATURE):
            texts.update(f"{len(value or '')} {value}".encode(errors="replace"))
        return ["streamed", self.name, self.column, str(info.version), info.dataset_size, texts.hexdigest()]

    def _values(self) -> Iterator[Any]:
        number = 0
        try:
            for number, row in enumerate(self._data):
                if number == 0 and self.column not in row:
                    raise no_column(self.column, self.name, row)
                yield row.get(self.column)
        except ConfigError:
            raise
        except Exception as error:  # of the network, of its files, of dozens of kinds
            raise ConfigError(
                [f"data source {self.name!r} cannot be read on after row {number} ({reason(error)})"]
            ) from error


Source = LocalFiles | HubData


def open_source(name: str, column: str, streaming: bool = False) -> Source:
    """A source by its name in the config; ``streaming`` counts for Hub data. Reads no text and asks no network yet.

    Raises:
        ConfigError: where the name is neither stdlib, nor a path, nor can be a Hub data set's; for a folder without
            files of one kind.
    """
    if name == "stdlib":
        return _standard_library()
    if (path := _local(name)) is not None:
        return _local_source(name, path, column)
    suffix = Path(name).suffix.lower()
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{,95}(/[\w.-]{1,96})?", name, re.ASCII) or suffix in {*_KINDS, ".csv"}:
        raise ConfigError([f"data source {name!r} is no file or folder here, and no Hub data set is named so"])
    return (HubStream if streaming else HubData)(name, column)


def check_apart(source: str, eval_source: str, column: str) -> None:
    """Raises ConfigError where evaluation text is among the files or is the Hub data set that a config trains on."""
    try:
        trained, measured = open_source(source, column), open_source(eval_source, column)
    except ConfigError:  # which will be said where it is read
        return
    if isinstance(trained, LocalFiles) and isinstance(measured, LocalFiles):
        same = bool({_identity(f) for f in trained.of("training")} & {_identity(f) for f in measured.of("all")})
    else:
        same = trained.name.lower() == measured.name.lower()
    if same:
        raise ConfigError(
            [
                f"data.eval_source = {eval_source!r} is text that data.source = {source!r} trains on; leave it out (a "
                "part of data.source is always kept out of training), or name other text"
            ]
        )


def _local(name: str) -> Path | None:
    """The path that a name is, with ~ for the home directory; None where nothing is there."""
    return next((Path(n) for n in (name, os.path.expanduser(name)) if name and os.path.lexists(n)), None)


def _identity(path: Path) -> tuple[int, int]:
    """Equal for two names of one file."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino


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
    return LocalFiles("stdlib", "text", "text", files, errors="replace")


def _local_source(name: str, path: Path, column: str) -> LocalFiles:
    if path.is_dir():
        files = _files_within(name, path)
    elif path.is_file():
        files = [path]
    else:
        raise ConfigError([f"data source {name!r} is no file and no folder (or a link that leads to none)"])
    kinds: dict[str, list[Path]] = {}
    for file in files:
        if (kind := _KINDS.get(file.suffix.lower())) and (file == path or file.name not in _ABOUT_DATA):
            kinds.setdefault(kind, []).append(file)
    if len(kinds) != 1:
        found = ", ".join(sorted({file.suffix or file.name for file in files})) or "nothing"
        hint = "; write a data set of save_to_disk as parquet (Dataset.to_parquet)" if ".arrow" in found else ""
        raise ConfigError(
            [f"data source {name!r}: files of one kind (.txt, .jsonl or .parquet) are read; found {found}{hint}"]
        )
    ((kind, files),) = kinds.items()
    if files == [path]:
        return LocalFiles(name, kind, column, files)
    return LocalFiles(name, kind, column, *_by_split(path, files))


def _files_within(name: str, folder: Path) -> list[Path]:
    """Files of a folder and of those in it, sorted; each file and each folder once, whatever links lead to it."""
    found: list[Path] = []
    folders: set[tuple[int, int]] = set()

    def failed(error: OSError) -> None:
        raise ConfigError([f"data source {name!r}: {error.filename} cannot be read ({error.strerror})"]) from error

    for directory, below, names in os.walk(folder, followlinks=True, onerror=failed):
        if (identity := _identity(Path(directory))) in folders:
            below.clear()
            continue
        folders.add(identity)
        below[:] = sorted(n for n in below if not n.startswith("."))
        found += [Path(directory, n) for n in names if not n.startswith(".")]
    files = {_identity(path): path for path in sorted(found, reverse=True) if path.is_file()}
    return sorted(files.values())


def _by_split(folder: Path, files: list[Path]) -> tuple[list[Path], list[Path] | None, str | None]:
    """(files to train on, held-out files, what is to be said of them); None where the names tell of no splits."""

    def by_name(alone: bool) -> dict[str | None, list[Path]]:
        splits: dict[str | None, list[Path]] = {}
        for path in files:
            splits.setdefault(_split_of(path.relative_to(folder), alone), []).append(path)
        return splits

    splits = by_name(alone=False)
    if None in splits:  # a file of no split: then a word within another name may mean anything
        splits = by_name(alone=True)
    split = next((name for name in ("validation", "test") if name in splits), None)
    if split is None:
        return files, None, None
    training, held_out = splits.get("training") or splits.get(None, []), splits[split]
    left = len(files) - len(training) - len(held_out)
    about = f"{len(training)} files to train on, {len(held_out)} of its {split} split held out, {left} left alone"
    return training, held_out, about


def _split_of(path: Path, alone: bool) -> str | None:
    """The split that a path within a folder names; ``alone``: by a name that says nothing else."""
    for part in (*path.parent.parts, path.stem):
        words = [word for word in re.split(r"[-._ 0-9]+", part.lower()) if word not in ("", "of")]
        for split, keywords in _SPLITS.items():
            if keywords & set(words) and (not alone or len(words) == 1):
                return split
    return None
