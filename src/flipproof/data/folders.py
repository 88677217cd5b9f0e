"""Files that make up a source: of which kind each is, and of which split its name tells.

**Kinds.** Text (.txt, .md) is a document a file; JSON (.jsonl, .json), CSV (.csv, .tsv) and Parquet are tables. All but
Parquet, which is compressed within, may be compressed as .gz or .zst.

**Splits.** Where a folder's files or subfolders are called train, validation or test, as ``datasets`` knows them, the
first are trained on and the held-out text is the validation files, or the test files where there are none.
"""

import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from flipproof.data.document import COMPRESSED
from flipproof.data.tables import suffix_of
from flipproof.errors import ConfigError

KINDS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
_ABOUT_DATA = {
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "readme.md",
    "license.md",
}
"""Files beside the data of a data set."""
_SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "dev", "val"},
    "test": {"test", "testing", "eval", "evaluation"},
}


class Splits(NamedTuple):
    """A folder's files."""

    training: list[Path]
    held_out: list[Path] | None
    """None where it is a part of the others."""
    about: str | None
    """What is to be said of them."""


def kind_of(path: Path) -> str | None:
    """None where it is none that is read."""
    kind = KINDS.get(suffix_of(path))
    return None if kind == "parquet" and path.suffix.lower() in COMPRESSED else kind


def identity(path: Path) -> tuple[int, int]:
    """Equal for two names of one file."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def readable_within(name: str, folder: Path) -> tuple[list[Path], str | None]:
    """The files of a folder that can be read, and what is to be said of them where they are of several kinds or not
    all. Raises ConfigError where there are none."""
    files = _files_within(name, folder)
    read, left = [], Counter[str]()
    for path in files:
        if kind_of(path) and path.name.lower() not in _ABOUT_DATA:
            read.append(path)
        else:
            left[path.suffix or path.name] += 1
    alone = ", ".join(f"{count} {ending}" for ending, count in sorted(left.items()))
    if not read:
        endings = ", ".join(sorted({path.suffix or path.name for path in files})) or "nothing"
        raise ConfigError(
            [f"data source {name!r}: files of {', '.join(KINDS)} (also .gz, .zst) are read; found {endings}"]
        )
    kinds = Counter(kind_of(path) for path in read)
    if len(kinds) == 1 and not left:
        return read, None
    counts = ", ".join(f"{count} of {kind}" for kind, count in sorted(kinds.items(), key=str))
    return read, f"{len(read)} files are read ({counts})" + (f", left alone: {alone}" if left else "")


def _files_within(name: str, folder: Path) -> list[Path]:
    """Files of a folder and of those in it, sorted; each file and each folder once, whatever links lead to it."""
    found: list[Path] = []
    folders: set[tuple[int, int]] = set()

    def failed(error: OSError) -> None:
        raise ConfigError([f"data source {name!r}: {error.filename} cannot be read ({error.strerror})"]) from error

    for directory, below, names in os.walk(folder, followlinks=True, onerror=failed):
        if (this := identity(Path(directory))) in folders:
            below.clear()
            continue
        folders.add(this)
        below[:] = sorted(n for n in below if not n.startswith("."))
        found += [Path(directory, n) for n in names if not n.startswith(".")]
    files = {identity(path): path for path in sorted(found, reverse=True) if path.is_file()}
    return sorted(files.values())


def by_split(name: str, folder: Path, files: list[Path], split: str | None, key: str) -> Splits:
    """Files to train on and held-out ones. ``split``: that one alone, which the config's ``key`` names.

    Raises:
        ConfigError: where there is no such split.
    """

    def by_name(alone: bool) -> dict[str | None, list[Path]]:
        splits: dict[str | None, list[Path]] = {}
        for path in files:
            splits.setdefault(_split_of(path.relative_to(folder), alone), []).append(path)
        return splits

    splits = by_name(alone=False)
    if None in splits:  # a file of no split: then a word within another name may mean anything
        splits = by_name(alone=True)
    if split is not None:
        meant = next((known for known, words in _SPLITS.items() if split.lower() in words), split)
        if meant not in splits:
            there = ", ".join(known for known in _SPLITS if known in splits)
            what = f"has the splits {there}" if there else "has no splits by the names of its files"
            raise ConfigError([f"{key} = {split!r}: the folder {name!r} {what}"])
        if meant != "train" or key != "data.split":
            return Splits(splits[meant], None, None)
    held = next((known for known in ("validation", "test") if known in splits), None)
    if held is None:
        return Splits(files if split is None else splits["train"], None, None)
    training, held_out = splits.get("train") or splits.get(None, []), splits[held]
    left = len(files) - len(training) - len(held_out)
    about = f"{len(training)} files to train on, {len(held_out)} of its {held} split held out, {left} left alone"
    return Splits(training, held_out, about)


def _split_of(path: Path, alone: bool) -> str | None:
    """The split that a path within a folder names; ``alone``: by a name that says nothing else."""
    stem = path.name[: path.name.lower().rindex(suffix_of(path))]
    for part in (*path.parent.parts, stem):
        words = [word for word in re.split(r"[-._ 0-9]+", part.lower()) if word not in ("", "of")]
        for split, keywords in _SPLITS.items():
            if keywords & set(words) and (not alone or len(words) == 1):
                return split
    return None
