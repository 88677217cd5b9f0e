"""Tokens of texts from those of their chunks, each of which is tokenised once.

Most of a text is words that came before, and a tokenizer spends most of its time on finding them. So a text is cut
where no token of a byte-pair vocabulary lies across, and the tokens of a chunk are kept. A cut is

- before a space that follows no white space, and
- between a letter or digit of ASCII and a space, a tab, the end of a line, or punctuation other than an apostrophe.

There GPT-2's, Llama 3's and Qwen's patterns part, and so do the vocabularies of SentencePiece. Neither is taken on
trust: no token of the vocabulary may hold such a place, what else a tokenizer may do across it is asked for (see
``_cuts_apart``), a text that holds an added token with such a place is tokenised as it is, and ``tokens`` compares all
tokens of its first batch. Where anything differs the tokenizer makes all tokens, at its own speed.
"""

import json
import re
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

CONTEXT = "a"
"""Some tokenizers put a space, or its mark, before each text. What does not begin its text is given this letter to come
after, whose tokens are then taken off."""
_PUNCTUATION = r"!-&(-/:-@\[-`{-~"  # of ASCII, without the apostrophe, which GPT-2 reads together with "don"
_CHUNK = re.compile(
    r"\s*+(?:"
    r"[^\s0-9A-Za-z]++(?:(?! )\s++)?|"  # other than letters and digits goes on over white space that is no space,
    rf"[0-9A-Za-z]++(?:(?![ \n\r\t])\s++|(?=[^\s{_PUNCTUATION}]))"  # these where something else follows
    r")*+(?:[0-9A-Za-z]++)?"
)
_CUT = re.compile(rf"\S(?= )|[0-9A-Za-z](?=[ \n\r\t{_PUNCTUATION}])")
_AS_TEXT = {"Ġ": " ", "▁": " ", "Ċ": "\n", "č": "\r", "ĉ": "\t"}  # what byte-level vocabularies and SentencePiece write
_KEPT = 2**23  # characters of chunks, with their tokens about 0.2 GB


class Chunks:
    """The tokens of chunks of text, by one tokenizer (``tokenizers.Tokenizer``)."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._watched = _watched(self._backend)
        self._context = self._ids([CONTEXT])[0]
        self._tokens: dict[str, bytes] = {}
        self._held = 0

    def encode(self, texts: Sequence[str], begins: Sequence[bool]) -> list[np.ndarray]:
        """The token ids of each text, int32, which ``begins`` or comes after another."""
        chunks = [self._chunks(text) for text in texts]
        first = [parts.pop(0) if here and parts else "" for parts, here in zip(chunks, begins, strict=True)]
        if self._held > _KEPT:
            self._tokens.clear()
            self._held = 0
        new = list({chunk for parts in chunks for chunk in parts}.difference(self._tokens))
        self._tokens.update(zip(new, self._after_context(new), strict=True))
        self._held += sum(map(len, new))
        begun = (array("i", ids).tobytes() for ids in self._ids(first))
        known = self._tokens.__getitem__
        return [
            np.frombuffer(head + b"".join(map(known, parts)), dtype="i4")
            for head, parts in zip(begun, chunks, strict=True)
        ]

    def _chunks(self, text: str) -> list[str]:
        if self._watched is not None and self._watched.search(text):
            return [text]
        return _CHUNK.findall(text)[:-1]  # the last is empty

    def _after_context(self, chunks: list[str]) -> Iterator[bytes]:
        context = self._context
        for chunk, ids in zip(chunks, self._ids([CONTEXT + chunk for chunk in chunks]), strict=True):
            apart = ids[: len(context)] == context
            yield array("i", ids[len(context) :] if apart else self._ids([chunk])[0]).tobytes()

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]


def chunks_of(tokenizer: Any) -> Chunks | None:
    """None where the tokens of a text may be others than those of its chunks."""
    backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
    return Chunks(backend) if backend is not None and _cuts_apart(backend) else None


def _cuts_apart(backend: Any) -> bool:
    """Whether a tokenizer merges pairs of tokens, with nothing that depends on what is further away, and none of its
    tokens lies across a cut."""
    state = json.loads(backend.to_str())
    model = state["model"]
    if model["type"] != "BPE" or any(
        [
            model["dropout"],
            model["continuing_subword_prefix"],
            model["end_of_word_suffix"],
            model["fuse_unk"] and not model["byte_fallback"],  # unknown neighbours become one
            model["ignore_merges"] and state["pre_tokenizer"] is None,  # a whole text may be a token
        ]
    ):
        return False
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    as_text = str.maketrans(_AS_TEXT)
    return not any(
        _CUT.search(token.translate(as_text))
        for token in model["vocab"]
        if token not in added and not re.fullmatch("<0x[0-9A-F]{2}>", token)
    )


def _watched(backend: Any) -> re.Pattern[str] | None:
    """Finds the added tokens of which a cut might make something else."""
    watched = [
        token.content
        for token in backend.get_added_tokens_decoder().values()
        if _CUT.search(token.content) or token.rstrip or token.single_word
    ]
    return re.compile("|".join(map(re.escape, watched)), re.IGNORECASE) if watched else None
