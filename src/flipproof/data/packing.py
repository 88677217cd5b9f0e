"""Documents to tokens in a file, once for all processes and runs.

Each document is followed by the end-of-text token, and begins with what the tokenizer begins a text with (a BOS, for
most that have one). Where there is such a beginning, each sequence begins with it too: a model that was never without
it (Gemma) predicts nothing of use from the middle of a text, lm-eval puts one before each window of a long text for the
same reason, and training sees what evaluation does. Neither token is ever doubled.

**Packed once.** The tokens are a file ``flipproof/KEY.npy`` in the cache directory of ``datasets``, which every process
maps into memory: the processes of a node share its pages, and a resumed run tokenises nothing. KEY is a hash of all
that the tokens depend on, so a file is never out of date, only unused; between runs any may be deleted. Whoever first
takes the lock of a key packs, and the others wait for the lock and find the file. A file gets its name when it is
complete, so even where a file system has no locks the worst is that two processes do the same work.
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

from flipproof.data.chunks import CONTEXT, Chunks, chunks_of
from flipproof.data.document import Part, Piece, pieces
from flipproof.data.source import Source
from flipproof.errors import ConfigError
from flipproof.files import clear_dead, replace_file, temporary_name
from flipproof.log import bar, logger

_TOKEN = np.dtype("<i4")
_PACKING = 3  # part of every key: to be raised when other tokens are made of the same text
_BATCH_CHARACTERS = 2**20  # enough pieces for the tokenizer's threads, and about 0.15 GB while it works
_LEARN = 2**19  # characters of a batch by which the quicker way to the same tokens is tried


def beginning(bos: bool | None, tokenizer: Any) -> list[int]:
    """The tokens that a text begins with: as the tokenizer does where ``bos`` is None, none where it is False.

    Raises:
        ConfigError: where ``bos`` is True and the tokenizer has no such token.
    """
    if bos is False:
        return []
    bare, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    # the end of what stands before the bare tokens; these are not found where a vocabulary has no letters
    at = next((i for i in range(len(whole)) if bare and whole[i : i + len(bare)] == bare), None)
    start = [token for token in whole[:1] if token == tokenizer.bos_token_id] if at is None else whole[:at]
    if bos and not start:
        if tokenizer.bos_token_id is None:
            raise ConfigError(["data.bos = True: the tokenizer has no beginning-of-text token"])
        return [tokenizer.bos_token_id]
    return start


def packed_tokens(
    source: Source, part: Part, tokenizer: Any, start: list[int], seq_len: int, limit: int | None
) -> np.memmap:
    """The first ``limit`` tokens of a part of a source (None: all), int32, from the cache; whoever finds none there
    packs them. Where texts have a ``start``, each ``seq_len`` of them begin with it.

    Raises:
        ConfigError: for text that cannot be read, a part without text, a cache that cannot be written.
    """

    def make() -> Iterator[np.ndarray]:
        texts = (piece for span in source.spans(part) for piece in pieces(span))
        # a token has a few characters: for a few tokens few are tokenised
        characters = _BATCH_CHARACTERS if limit is None else min(_BATCH_CHARACTERS, 8 * limit)
        stream = _tokens(_batches(texts, characters), tokenizer, start)
        return _sequences(stream, start, seq_len) if start else stream

    return packed_file(cache_path(source, part, tokenizer, start, seq_len, limit), source, part, make, limit)


def cache_path(
    source: Source,
    part: Part,
    tokenizer: Any,
    start: list[int],
    seq_len: int,
    limit: int | None,
    more: dict[str, Any] | None = None,
) -> Path:
    """The file that these tokens are in, or will be. ``more``: what else they depend on, as JSON."""
    if source.remote:
        check_cache()
    return _directory() / f"{_key(source, part, tokenizer, start, seq_len, limit, more or {})}.npy"


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
    if (tokens := _finished(path)) is not None:
        return tokens
    check_cache()
    logger.info("data source %r is tokenised into %s", source.name, path)
    try:
        with _lock(path):
            if (tokens := _finished(path)) is None:
                with bar(limit, "token", unit_scale=True) as shown:
                    written = _write(path, _counted(make(), shown), limit, dtype)
                if not written:
                    raise holds_no(what, source.name, part)
                tokens = np.load(path, mmap_mode="r")
    except OSError as error:  # of the source there are none: those are ConfigErrors
        raise _cache_error(path.parent, error) from error
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
        raise _cache_error(directory, error) from error


def _cache_error(directory: Path, error: OSError) -> ConfigError:
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


def _key(
    source: Source,
    part: Part,
    tokenizer: Any,
    start: list[int],
    seq_len: int,
    limit: int | None,
    more: dict[str, Any],
) -> str:
    """Equal in every process for the same tokens; another one wherever the tokens might be others."""
    depends_on = {
        "packing": _PACKING,
        "source": source.signature(part),
        "part": part,
        "tokenizer": [type(tokenizer).__qualname__, _tokenizer_state(tokenizer)],
        "versions": [version("tokenizers"), version("transformers")],
        "start": [start, seq_len] if start else None,
        "end": tokenizer.eos_token_id,
        "limit": limit,
        **({"more": more} if more else {}),
    }
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:32]


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


def _finished(path: Path) -> np.memmap | None:
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


def _write(path: Path, stream: Iterable[np.ndarray], limit: int | None, dtype: np.dtype = _TOKEN) -> int:
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


def _batches(texts: Iterable[Piece], characters: int) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    held = 0
    for piece in texts:
        batch.append(piece)
        held += len(piece.text)
        if held >= characters:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _tokens(batches: Iterable[list[Piece]], tokenizer: Any, start: list[int]) -> Iterator[np.ndarray]:
    """The tokens of texts, each between ``start`` and the end-of-text token; neither is put beside its like."""

    def encode(texts: list[str]) -> list[list[int]]:
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def whole(batch: list[Piece]) -> list[list[int]]:
        encoded = encode([piece.text if piece.begins else CONTEXT + piece.text for piece in batch])
        context = [] if all(piece.begins for piece in batch) else encode([CONTEXT])[0]
        for k, (piece, ids) in enumerate(zip(batch, encoded, strict=True)):
            if not piece.begins:
                encoded[k] = ids[len(context) :] if ids[: len(context)] == context else encode([piece.text])[0]
        return encoded

    end = tokenizer.eos_token_id
    before: list[int] = []  # the last tokens of the batch before
    quick: Chunks | None = None
    learnt = False
    for batch in batches:
        tokens = list(before)
        encoded = whole(batch) if quick is None else _by_chunks(quick, batch)
        if not learnt and sum(len(piece.text) for piece in batch) >= _LEARN:
            learnt, quick = True, chunks_of(tokenizer)
            if quick is not None and _by_chunks(quick, batch) != encoded:
                quick = None
        for piece, ids in zip(batch, encoded, strict=True):
            if piece.begins and start and ids[: len(start)] != start and tokens[-len(start) :] != start:
                tokens += start
            tokens += ids
            if piece.ends and end is not None and tokens[-1:] != [end]:
                tokens.append(end)
        yield np.array(tokens[len(before) :], dtype="<i4")
        before = tokens[-max(1, len(start)) :]


def _by_chunks(chunks: Chunks, batch: list[Piece]) -> list[list[int]]:
    return chunks.encode([piece.text for piece in batch], [piece.begins for piece in batch])


def _sequences(stream: Iterable[np.ndarray], start: list[int], seq_len: int) -> Iterator[np.ndarray]:
    """The same tokens, with ``start`` at the beginning of each ``seq_len`` where they do not have it there."""
    first = np.array(start, dtype="<i4")
    rest = np.empty(0, dtype="<i4")
    for tokens in stream:
        rest = np.concatenate([rest, tokens])
        parts, at = [first[:0]], 0
        while len(rest) - at >= seq_len:
            begins = bool((rest[at : at + len(first)] == first).all())
            parts += [first[: 0 if begins else None], rest[at : (at := at + seq_len - (0 if begins else len(first)))]]
        yield np.concatenate(parts)
        rest = rest[at:]
    if len(rest):
        begins = len(rest) >= len(first) and bool((rest[: len(first)] == first).all())
        yield np.concatenate([first[: 0 if begins else None], rest])
