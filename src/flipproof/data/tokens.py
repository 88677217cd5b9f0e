"""Pieces of text to tokens, and these to sequences.

Each document is followed by the end-of-text token, and begins with what the tokenizer begins a text with (a BOS, for
most that have one). Where there is such a beginning, each sequence begins with it too: a model that was never without
it (Gemma) predicts nothing of use from the middle of a text, lm-eval puts one before each window of a long text for the
same reason, and training sees what evaluation does. Neither token is ever doubled.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from flipproof.data.chunks import CONTEXT, Chunks, chunks_of
from flipproof.data.document import Piece
from flipproof.data.workers import encoded_by_workers, workers_here
from flipproof.errors import ConfigError

BATCH_CHARACTERS = 2**20
"""Enough pieces for the tokenizer's threads, and about 0.15 GB while it works."""
_LEARN = 2**19  # characters of a batch by which the quicker way to the same tokens is tried
_ALONE = 8  # batches that one process tokenises by itself: others take a second to start


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


def batches(texts: Iterable[Piece], characters: int) -> Iterator[list[Piece]]:
    """Of so many characters, or somewhat more, each."""
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


class Tokens:
    """How texts become tokens, each between ``start`` and the end-of-text token."""

    def __init__(self, tokenizer: Any, start: list[int]) -> None:
        self._tokenizer, self._start, self._end = tokenizer, start, tokenizer.eos_token_id
        self._chunks: Chunks | None = None
        self._compared = False

    def of(self, batches: Iterable[list[Piece]], before: Iterable[int] = ()) -> Iterator[np.ndarray]:
        """Those of each batch, int32; neither ``start`` nor end is put beside its like, nor beside the last tokens
        ``before``."""
        start, keep = self._start, max(1, len(self._start))
        end = [] if self._end is None else [self._end]
        last = list(before)
        for batch, encoded in self._encoded(batches):
            parts = []
            for piece, ids in zip(batch, encoded, strict=True):
                if piece.begins and start and ids[: len(start)].tolist() != start and last[-len(start) :] != start:
                    parts.append(np.array(start, dtype="<i4"))
                    last = start
                parts.append(ids)
                last = [*last, *ids[-keep:].tolist()][-keep:]
                if piece.ends and end and last[-1:] != end:
                    parts.append(np.array(end, dtype="<i4"))
                    last = [*last, *end][-keep:]
            yield np.concatenate(parts)

    def _encoded(self, batches: Iterable[list[Piece]]) -> Iterator[tuple[list[Piece], list[np.ndarray]]]:
        """Each batch, and the ids of each of its pieces, int32."""
        unread = iter(batches)
        for number, batch in enumerate(unread, 1):
            if self._chunks is None:
                yield batch, self._by_pieces(batch)
            else:
                yield batch, self._by_chunks(self._chunks, batch)
                if number >= _ALONE and (count := workers_here()):
                    break
        else:
            return
        yield from encoded_by_workers(self._tokenizer.backend_tokenizer, unread, count)

    def _by_chunks(self, chunks: Chunks, batch: list[Piece]) -> list[np.ndarray]:
        return chunks.encode([piece.text for piece in batch], [piece.begins for piece in batch])

    def _by_pieces(self, batch: list[Piece]) -> list[np.ndarray]:
        # Some tokenizers put a space, or its mark, before each text. A piece from the middle is given a letter to come
        # after, whose tokens are then taken off.
        encoded = self._ids([piece.text if piece.begins else CONTEXT + piece.text for piece in batch])
        context = [] if all(piece.begins for piece in batch) else self._ids([CONTEXT])[0]
        for k, (piece, ids) in enumerate(zip(batch, encoded, strict=True)):
            if not piece.begins:
                encoded[k] = ids[len(context) :] if ids[: len(context)] == context else self._ids([piece.text])[0]
        made = [np.array(ids, dtype="<i4") for ids in encoded]
        if not self._compared and sum(len(piece.text) for piece in batch) >= _LEARN:
            self._compared, chunks = True, chunks_of(self._tokenizer)
            if chunks is not None and all(map(np.array_equal, self._by_chunks(chunks, batch), made)):
                self._chunks = chunks
        return made

    def _ids(self, texts: list[str]) -> list[list[int]]:
        encoded = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids


def in_sequences(stream: Iterable[np.ndarray], start: list[int], seq_len: int) -> Iterator[np.ndarray]:
    """The same tokens, with ``start`` at the beginning of each ``seq_len`` where they do not have it there."""
    rest = np.empty(0, dtype="<i4")
    for tokens in stream:
        rest = np.concatenate([rest, tokens])
        sequences, taken = cut(rest, start, seq_len)
        yield sequences
        rest = rest[taken:]
    if len(rest):
        yield begun(rest, start)


def cut(tokens: np.ndarray, start: list[int], seq_len: int, most: int | None = None) -> tuple[np.ndarray, int]:
    """(sequences that tokens are enough for, one after the other; how many tokens they took); ``most``: sequences."""
    if not start:
        count = len(tokens) // seq_len
        taken = seq_len * (count if most is None else min(count, most))
        return tokens[:taken], taken
    parts, at = [tokens[:0]], 0
    while len(tokens) - at >= seq_len and (most is None or len(parts) <= most):
        parts.append(begun(tokens[at : at + seq_len], start)[:seq_len])
        at += seq_len - (0 if _begins(tokens[at:], start) else len(start))
    return np.concatenate(parts), at


def begun(tokens: np.ndarray, start: list[int]) -> np.ndarray:
    """``tokens`` with ``start`` before them, if they do not begin so."""
    return tokens if _begins(tokens, start) else np.concatenate([np.array(start, dtype="<i4"), tokens])


def _begins(tokens: np.ndarray, start: list[int]) -> bool:
    return len(tokens) >= len(start) and bool((tokens[: len(start)] == start).all())
