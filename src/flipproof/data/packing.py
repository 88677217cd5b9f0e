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
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock

from flipproof.data.document import Part, Piece, pieces
from flipproof.data.source import Source
from flipproof.errors import ConfigError
from flipproof.files import clear_dead, replace_file, temporary_name
from flipproof.log import logger

_PACKING = 3  # part of every key: to be raised when other tokens are made of the same text
_BATCH_CHARACTERS = 2**20  # enough pieces for the tokenizer's threads, and about 0.15 GB while it works
_CONTEXT = "a"  # stands before a piece that does not begin its text: see _tokens


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
    import datasets

    directory = Path(datasets.config.HF_DATASETS_CACHE) / "flipproof"
    if source.remote:
        _check_cache(directory)
    path = directory / f"{_key(source, part, tokenizer, start, seq_len, limit)}.npy"
    if (tokens := _finished(path)) is not None:
        return tokens
    _check_cache(directory)
    logger.info("data source %r is tokenised into %s", source.name, path)
    try:
        with _lock(path):
            if (tokens := _finished(path)) is None:
                texts = (piece for span in source.spans(part) for piece in pieces(span))
                # a token has a few characters: for a few tokens few are tokenised
                characters = _BATCH_CHARACTERS if limit is None else min(_BATCH_CHARACTERS, 8 * limit)
                stream = _tokens(_batches(texts, characters), tokenizer, start)
                if start:
                    stream = _sequences(stream, start, seq_len)
                if not _write(path, stream, limit):
                    which = "" if part == "all" else f" in its {part} part"
                    raise ConfigError([f"data source {source.name!r} holds no text{which}"])
                tokens = np.load(path, mmap_mode="r")
    except OSError as error:  # of the source there are none: those are ConfigErrors
        raise _cache_error(directory, error) from error
    return tokens


def _check_cache(directory: Path) -> None:
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


def _key(source: Source, part: Part, tokenizer: Any, start: list[int], seq_len: int, limit: int | None) -> str:
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


def _write(path: Path, stream: Iterable[np.ndarray], limit: int | None) -> int:
    """Write the first ``limit`` tokens into a file that appears when it is complete, and say how many they are; without
    any, no file."""
    total, digest = 0, hashlib.blake2b(digest_size=_DIGEST)
    stream = (tokens for tokens in stream if len(tokens))
    if (first := next(stream, None)) is None:
        return 0
    with replace_file(path) as file:
        _write_header(file, 0)
        for tokens in chain([first], stream):
            part = tokens if limit is None else tokens[: limit - total]
            digest.update(part.tobytes())
            file.write(part.tobytes())
            total += len(part)
            if total == limit:
                break
        file.write(digest.digest())
        file.seek(0)
        _write_header(file, total)
    return total


def _write_header(file: BinaryIO, total: int) -> None:
    # NumPy leaves room for the first axis to grow: the header is as long for any total.
    np.lib.format.write_array_header_1_0(file, {"descr": "<i4", "fortran_order": False, "shape": (total,)})


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


def _tokens(
    batches: Iterable[list[Piece]], tokenizer: Any, start: list[int], before: Iterable[int] = ()
) -> Iterator[np.ndarray]:
    """The tokens of texts, each between ``start`` and the end-of-text token; neither is put beside its like, nor beside
    the last tokens ``before``."""

    def encode(texts: list[str]) -> list[list[int]]:
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    end = tokenizer.eos_token_id
    before = list(before)  # the last tokens of the batch before
    for batch in batches:
        tokens = list(before)
        # Some tokenizers put a space, or its mark, before each text. A piece from the middle is given a letter to come
        # after, whose tokens are then taken off.
        encoded = encode([piece.text if piece.begins else _CONTEXT + piece.text for piece in batch])
        context = [] if all(piece.begins for piece in batch) else encode([_CONTEXT])[0]
        for piece, ids in zip(batch, encoded, strict=True):
            if not piece.begins:
                ids = ids[len(context) :] if ids[: len(context)] == context else encode([piece.text])[0]
            elif start and ids[: len(start)] != start and tokens[-len(start) :] != start:
                tokens += start
            tokens += ids
            if piece.ends and end is not None and tokens[-1:] != [end]:
                tokens.append(end)
        yield np.array(tokens[len(before) :], dtype="<i4")
        before = tokens[-max(1, len(start)) :]


def _sequences(stream: Iterable[np.ndarray], start: list[int], seq_len: int) -> Iterator[np.ndarray]:
    """The same tokens, with ``start`` at the beginning of each ``seq_len`` where they do not have it there."""
    rest = np.empty(0, dtype="<i4")
    for tokens in stream:
        rest = np.concatenate([rest, tokens])
        sequences, taken = _cut(rest, start, seq_len)
        yield sequences
        rest = rest[taken:]
    if len(rest):
        yield _begun(rest, start)


def _cut(tokens: np.ndarray, start: list[int], seq_len: int, most: int | None = None) -> tuple[np.ndarray, int]:
    """(sequences that tokens are enough for, one after the other; how many tokens they took); ``most``: sequences."""
    if not start:
        count = len(tokens) // seq_len
        taken = seq_len * (count if most is None else min(count, most))
        return tokens[:taken], taken
    parts, at = [tokens[:0]], 0
    while len(tokens) - at >= seq_len and (most is None or len(parts) <= most):
        parts.append(_begun(tokens[at : at + seq_len], start)[:seq_len])
        at += seq_len - (0 if _begins(tokens[at:], start) else len(start))
    return np.concatenate(parts), at


def _begun(tokens: np.ndarray, start: list[int]) -> np.ndarray:
    """``tokens`` with ``start`` before them, if they do not begin so."""
    return tokens if _begins(tokens, start) else np.concatenate([np.array(start, dtype="<i4"), tokens])


def _begins(tokens: np.ndarray, start: list[int]) -> bool:
    return len(tokens) >= len(start) and bool((tokens[: len(start)] == start).all())
