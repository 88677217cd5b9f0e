"""Documents to tokens in a file, once for all processes and runs.

The tokens are a file ``flipproof/KEY.npy`` in the cache directory of ``datasets``, which every process maps into
memory: the processes of a node share its pages, and a resumed run tokenises nothing. KEY is a hash of all that the
tokens depend on, so a file is never out of date, only unused; between runs any may be deleted. Whoever first takes
the lock of a key packs, and the others wait for the lock and find the file. A file gets its name when it is complete,
so even where a file system has no locks the worst is that two processes do the same work.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock

from flipproof.data.document import Part, RowCount, pieces
from flipproof.data.source import Source
from flipproof.data.tokens import BATCH_CHARACTERS, Tokens, batches, in_sequences
from flipproof.errors import ConfigError
from flipproof.files import clear_dead, replace_file, temporary_name
from flipproof.log import bar, logger

_TOKEN = np.dtype("<i4")
_PACKING = 3  # part of every key: to be raised when other tokens are made of the same text


def packed_tokens(
    source: Source, part: Part, tokenizer: Any, start: list[int], seq_len: int, limit: int | None
) -> np.memmap:
    """The first ``limit`` tokens of a part of a source (None: all), int32, from the cache; whoever finds none there
    packs them. Where texts have a ``start``, each ``seq_len`` of them begin with it.

    Raises:
        ConfigError: for text that cannot be read, a part without text, a cache that cannot be written.
    """
    rows = RowCount()

    def make() -> Iterator[np.ndarray]:
        texts = (piece for span in rows.of(source.spans(part)) for piece in pieces(span))
        # a token has a few characters: for a few tokens few are tokenised
        characters = BATCH_CHARACTERS if limit is None else min(BATCH_CHARACTERS, 8 * limit)
        stream = Tokens(tokenizer, start).of(batches(texts, characters))
        return in_sequences(stream, start, seq_len) if start else stream

    tokens = packed_file(cache_path(source, part, tokenizer, start, seq_len, limit), source, part, make, limit)
    rows.say(source.name, part)
    return tokens


def cache_path(
    source: Source,
    part: Part,
    tokenizer: Any,
    start: list[int],
    seq_len: int,
    limit: int | None,
    more: dict[str, Any] | None = None,
) -> Path:
    """The file that these tokens are in, or will be: equal in every process, another one wherever the tokens might be
    others. ``more``: what else they depend on, as JSON."""
    if source.remote:
        check_cache()
    depends_on = {
        "packing": _PACKING,
        "source": source.signature(part),
        "part": part,
        "tokenizer": [type(tokenizer).__qualname__, _tokenizer_state(tokenizer)],
        "versions": [version("tokenizers"), version("transformers")],
        "start": [start, seq_len] if start else None,
        "end": tokenizer.eos_token_id,
        "limit": limit,
        **({} if more is None else {"more": more}),
    }
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:32]
    return _directory() / f"{key}.npy"


def packed_file(
    path: Path,
    source: Source,
    part: Part,
    make: Callable[[], Iterable[np.ndarray]],
    limit: int | None = None,
    what: str = "text",
    dtype: np.dtype = _TOKEN,
) -> np.memmap:
    """What ``make`` gives, its first ``limit`` elements, from a file that whoever finds none writes.

    Raises:
        ConfigError: where it gives nothing, naming ``what`` is missing; where the cache cannot be written.
    """
    if (tokens := finished(path)) is not None:
        return tokens
    check_cache()
    logger.info("data source %r is tokenised into %s", source.name, path)
    try:
        with _lock(path):
            if (tokens := finished(path)) is None:
                with bar(limit, "token", unit_scale=True) as shown:
                    written = write(path, _counted(make(), shown), limit, dtype)
                if not written:
                    raise holds_no(what, source.name, part)
                tokens = np.load(path, mmap_mode="r")
    except OSError as error:  # of the source there are none: those are ConfigErrors
        raise cache_error(path.parent, error) from error
    return tokens


def holds_no(what: str, name: str, part: Part) -> ConfigError:
    which = "" if part == "all" else f" in its {part} part"
    return ConfigError([f"data source {name!r} holds no {what}{which}"])


def _directory() -> Path:
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "flipproof"


def check_cache() -> None:
    """Raises ConfigError where the cache cannot be written."""
    directory = _directory()
    probe = temporary_name(directory / "probe")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        clear_dead(directory / "probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise cache_error(directory, error) from error


def cache_error(directory: Path, error: OSError) -> ConfigError:
    return ConfigError(
        [
            f"the cache directory {directory} cannot be written ({error}); "
            "name another one in the environment variable HF_DATASETS_CACHE"
        ]
    )


def _lock(path: Path) -> AbstractContextManager[Any]:
    """The lock of a key, taken; nothing where there can be none: on a file system without locks, or where another
    user's file is in the way."""
    try:
        return FileLock(path.with_suffix(".lock")).acquire()
    except (OSError, NotImplementedError):
        return nullcontext()


def _tokenizer_state(tokenizer: Any) -> Any:
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # Each call of a tokenizer sets these two anew: here they only tell what its last call was.
        del state["truncation"], state["padding"]
        return state | {"split_special_tokens": tokenizer.split_special_tokens}
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        files = sorted(path for path in Path(directory).rglob("*") if path.is_file())
        return [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in files]


def finished(path: Path) -> np.memmap | None:
    """The tokens of a packed file; None where there is none, or, with a warning, a damaged one."""
    try:
        tokens = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError):  # empty; shorter than the shape in its header says
        tokens = None
    if tokens is not None and path.stat().st_size == (end := tokens.offset + tokens.nbytes) + _DIGEST:
        digest = hashlib.blake2b(digest_size=_DIGEST)
        with path.open("rb") as file:
            file.seek(tokens.offset)
            while (left := end - file.tell()) > 0:
                digest.update(file.read(min(left, 2**24)))
            if file.read() == digest.digest():
                return tokens
    logger.warning("%s is damaged: its text is tokenised anew", path)
    return None


_DIGEST = 16
"""Bytes at the end of a packed file, behind what NumPy reads: the BLAKE2b hash of its tokens."""


def write(path: Path, stream: Iterable[np.ndarray], limit: int | None, dtype: np.dtype = _TOKEN) -> int:
    """Write the first ``limit`` tokens into a file that appears when it is complete, and say how many they are; without
    any, no file."""
    total, digest = 0, hashlib.blake2b(digest_size=_DIGEST)
    stream = (tokens for tokens in stream if len(tokens))
    if (first := next(stream, None)) is None:
        return 0
    with replace_file(path) as file:
        _write_header(file, 0, dtype)
        for tokens in chain([first], stream):
            part = tokens if limit is None else tokens[: limit - total]
            digest.update(part.tobytes())
            file.write(part.tobytes())
            total += len(part)
            if total == limit:
                break
        file.write(digest.digest())
        file.seek(0)
        _write_header(file, total, dtype)
    return total


def _write_header(file: BinaryIO, total: int, dtype: np.dtype) -> None:
    # NumPy leaves room for the first axis to grow: the header is as long for any total.
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": (total,)})


def _counted(stream: Iterable[np.ndarray], shown: Any) -> Iterator[np.ndarray]:
    for tokens in stream:
        shown.update(len(tokens))
        yield tokens
