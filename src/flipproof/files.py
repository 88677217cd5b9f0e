"""Files that are whole or not there, whoever else writes them at the same time.

A file is written under a temporary name of its own in its directory and then renamed: a reader never sees half of it,
two writers never meet in one temporary file, and after a crash of the machine the name does not lead to nothing.
"""

import json
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from flipproof.errors import ConfigError

OTHER_LETTERS = "not in this locale's letters; set PYTHONUTF8=1"
"""What is wrong with a path that has no name in bytes."""
_OLD_S = 60.0
"""What is temporary and younger than this may belong to somebody who has not claimed it yet."""


def temporary_name(path: Path) -> Path:
    """What a file or directory is called until it is whole: another name at every call, hidden, and never too long."""
    return path.with_name(f".{path.name[:_SHOWN]}.{uuid.uuid4().hex}.tmp")


_SHOWN = 40
"""Letters of a name in its temporary ones: names have at most 255 bytes."""


def is_temporary(name: str, of: str) -> bool:
    """Whether ``name`` is what ``temporary_name`` calls the file ``of``: what a killed process leaves of it."""
    return re.fullmatch(rf"\.{re.escape(of[:_SHOWN])}\.[0-9a-f]{{32}}\.tmp", name) is not None


def leftovers(path: Path) -> list[Path]:
    """What is there under temporary names of a file or directory, its writers being dead or alive."""
    with suppress(OSError):
        return [each for each in path.parent.iterdir() if is_temporary(each.name, path.name)]
    return []


def clear_dead(path: Path, age_s: float | None = None) -> None:
    """Delete what dead processes left of a file or directory: what is temporary, claimed by nobody, and older than
    ``age_s``, which is a minute: 0 for who holds a lock on its place.

    Links are left alone, and so is what cannot be deleted.
    """
    age_s = _OLD_S if age_s is None else age_s
    for temporary in leftovers(path):
        with suppress(OSError):
            descriptor = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                if time.time() - os.fstat(descriptor).st_mtime > age_s and _lock(descriptor):
                    shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()
            finally:
                os.close(descriptor)


@contextmanager
def claimed(temporary: Path) -> Iterator[None]:
    """Within the block nobody takes a new file or directory for a dead process's: a lock of the kernel is on it, which
    goes with this process."""
    descriptor = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        _lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Whether a file is this process's alone now; False where another has it, or there are no locks."""
    try:
        import fcntl  # which Windows lacks

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (ImportError, OSError):
        return False


@contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """A new file, which has its name when the block has ended without an error, and else is gone."""
    clear_dead(path)
    temporary = temporary_name(path)
    try:
        with temporary.open("xb") as file, claimed(temporary):
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a crash of the machine could leave the name without what it is of
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a whole UTF-8 file or nothing. Raises OSError, and then leaves nothing behind."""
    with named(path), replace_file(path) as file:
        file.write(text.encode())


def put_in_place(new: Path, final: Path, replace: bool = True) -> None:
    """Give a directory its name when all of it is on the disk. To ``replace``, the one that has the name goes, after
    that; else OSError is raised where there is one with something in it."""
    for file in (*(file for file in new.rglob("*") if file.is_file()), new):
        sync(file)
    old = _set_aside(final) if replace else None
    os.rename(new, final)
    sync(final.parent)
    if old:
        shutil.rmtree(old, ignore_errors=True)


def discard(directory: Path) -> None:
    """Delete a directory that is there; it loses its name first, so that none is ever half there."""
    if old := _set_aside(directory):
        shutil.rmtree(old)


def _set_aside(directory: Path) -> Path | None:
    if not directory.exists():
        return None
    old = temporary_name(directory)
    os.rename(directory, old)
    return old


@contextmanager
def named(path: Path) -> Iterator[None]:
    """What fails in the block fails at ``path``: a full disk names none, and nobody knows a temporary name."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def sync(path: Path) -> None:
    """Until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def share(path: Path) -> None:
    """Give a file the permissions of any new one; ``safetensors`` leaves its files to their owner alone."""
    mask = os.umask(0o077)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically. Infinity and NaN, which JSON does not have, become null."""
    write_atomically(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """The value with None in the place of numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def is_path(name: str) -> bool:
    """Whether a text is meant as a path, and cannot be a name on the Hub, of which the longest are owner/name."""
    return name.startswith(("/", "~", "./", "../")) or name.count("/") > 1 or name.endswith(".gguf")


def check_writable(path: Path, what: str) -> None:
    """Raises ConfigError where ``path`` could not be made, or written into where it is a directory. Writes nothing.

    For everything that a verb writes, before it begins: ``what`` is the flag or key that names the path.
    """
    if not os.fspath(path):
        raise ConfigError([f"{what}: the path is empty"])
    try:
        os.fsencode(path)
        for there in (path, *path.parents):
            if not (there.exists() or there.is_symlink()):
                continue
            if not there.is_dir() and there != path:
                raise ConfigError([f"{what} = {str(path)!r}: {there} is not a directory"])
            if not os.access(there, os.W_OK | os.X_OK if there.is_dir() else os.W_OK):
                raise ConfigError([f"{what} = {str(path)!r}: {there} cannot be written"])
            longest = os.pathconf(there, "PC_NAME_MAX") if there.is_dir() else 255
            for name in path.relative_to(there).parts:
                if len(os.fsencode(name)) > longest:
                    raise ConfigError([f"{what} = {str(path)!r}: a name has at most {longest} bytes there"])
            return
    except UnicodeEncodeError as error:
        raise ConfigError([f"{what} = {str(path)!a}: {OTHER_LETTERS}"]) from error
    except OSError as error:  # a name too long to ask about, a directory that may not be looked into
        raise ConfigError([f"{what} = {str(path)!r}: {error.strerror}"]) from error


def check_new(path: Path, what: str, kind: str = "directory") -> None:
    """Raises ConfigError where ``path`` is there already, or ``check_writable`` finds that it could not be.

    ``kind`` is what ``what`` names: the file, or the directory that it will be in.
    """
    if path.exists() or path.is_symlink():
        raise ConfigError([f"{path} exists already; name another {kind} with {what}"])
    check_writable(path, what)
