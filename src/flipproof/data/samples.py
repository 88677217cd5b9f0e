"""Samples of instruction data into sequences of ``seq_len`` tokens, in a file, once for all processes and runs.

``seq_len`` is the most that a sample may have: what is longer is cut, and left out where no token with a loss remains.
With ``packing`` samples lie one after the other in a sequence, none across two; else each has one of its own. The end
of a sequence is padded. A sample goes into the first sequence with room among the last ones begun, so that the order is
the source's but for a few sequences, memory is bounded, and fewer sequences are the beginning of more.

Beside the ids are **marks**: which tokens have a loss, and where samples begin. Labels and positions follow from these:
where positions begin anew, ``transformers`` lets no token attend to the sample before.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from flipproof.config import DataConfig
from flipproof.data.document import Part, Record
from flipproof.data.instruct import Encoder, Format, Sample, recognised
from flipproof.data.packing import cache_path, packed_file
from flipproof.data.source import Source, whole_rows
from flipproof.data.tokens import beginning
from flipproof.errors import ConfigError
from flipproof.log import logger
from flipproof.records import read_record, write_record

HAS_LOSS, BEGINS = np.uint8(1), np.uint8(2)
"""Bits of a token's mark."""
_TOKEN = np.dtype([("id", "<i4"), ("mark", "u1")])
_FILLING = 3  # part of every key: to be raised when the same rows make other sequences, or are counted otherwise
_OPEN = 64  # sequences that a sample may go into
_BATCH = 2**20  # characters that are tokenised at a time, about


@dataclass(frozen=True)
class About:
    """What a source's samples are, and what was left of them."""

    format: Format
    packing: bool
    samples: int = 0
    """In the sequences."""
    trained_tokens: int = 0
    """Those that have a loss."""
    cut: int = 0
    """Samples that were longer than a sequence, ..."""
    cut_tokens: int = 0
    """... and by how much together."""
    beyond: int = 0
    """Samples left out since their answer begins where a sequence ends, ..."""
    unanswered: int = 0
    """... or since they have no answer; of a limited source those before the last sample that is in."""


def instruction_format(config: DataConfig, source: Source, part: Part) -> Format | None:
    """What ``data.format`` means for a source; None is text.

    Raises:
        ConfigError: for a format of tables where the source is text, and for instruction data that is to be streamed.
    """
    found = _format(config, source, part)
    if found is not None and config.streaming:
        raise ConfigError([f"data.streaming = True: {source.name!r} is instruction data, which is not streamed"])
    return found


def _format(config: DataConfig, source: Source, part: Part) -> Format | None:
    if config.format == "text":
        return None
    columns = source.columns(part)
    if config.format != "auto":
        if columns is None:
            raise ConfigError([f"data.format = {config.format!r}: {source.name!r} is text, and has no columns"])
        return config.format
    if columns is None:
        return None
    found = recognised(columns)
    if found is not None and config.text_column in columns:
        logger.info("data source %r: its column %r is what is read; data.format = %r reads the others as instructions",
                    source.name, config.text_column, found)  # fmt: skip
        return None
    return found


def encoder(config: DataConfig, format: Format, tokenizer: Any) -> Encoder:
    """How rows become samples. Raises ConfigError for chats where the tokenizer has no template."""
    made = Encoder(format, tokenizer, tuple(beginning(config.bos, tokenizer)), config.bos, config.mask_prompt)
    made.check()
    return made


def filled(
    source: Source, part: Part, config: DataConfig, encoder: Encoder, seq_len: int, limit: int | None
) -> tuple[np.ndarray, np.ndarray, About]:
    """The first ``limit`` sequences of a part of a source (None: all), from the cache; whoever finds none there makes
    them: ids, int32, and marks, uint8, both of shape (sequences, seq_len), and what they are.

    Raises:
        ConfigError: for rows that are not of the format, a part without samples, a cache that cannot be written.
    """
    source, tokenizer = whole_rows(source), encoder.tokenizer
    depends_on = {
        "filling": _FILLING,
        "format": encoder.format,
        "mask_prompt": encoder.mask_prompt,
        "bos": encoder.bos,
        "chat": [tokenizer.chat_template, tokenizer.special_tokens_map] if encoder.format == "chat" else None,
        "first": tokenizer.bos_token_id,
        "packing": config.packing,
        "seq_len": seq_len,
        "padding": _padding(tokenizer),
    }
    path = cache_path(source, part, tokenizer, list(encoder.start), seq_len, limit, depends_on)
    said = path.with_suffix(".json")

    def make() -> Iterator[np.ndarray]:
        maker = _Maker(encoder, seq_len, About(encoder.format, config.packing))
        yield from islice(maker.sequences(read(source, part, encoder)), limit)
        if maker.about.samples:
            write_record(said, asdict(maker.about))
        elif maker.about.beyond:
            what = f"the answers of all {maker.about.beyond:,} samples of {source.name!r} begin beyond it"
            raise ConfigError([f"training.seq_len = {seq_len}: {what}"])

    for _ in range(2):
        flat = packed_file(path, source, part, make, what="sample with an answer", dtype=_TOKEN)
        try:
            about = About(**read_record(said))
            break
        except (OSError, ValueError, TypeError):  # gone or damaged: all is made anew
            path.unlink(missing_ok=True)
    else:
        raise ConfigError([f"data source {source.name!r}: {said}, which was written a moment ago, cannot be read"])
    tokens = flat.reshape(-1, seq_len)
    _say(source.name, part, about, len(tokens), seq_len, encoder.mask_prompt)
    return tokens["id"], tokens["mark"], about


def read(source: Source, part: Part, encoder: Encoder) -> Iterator[Sample | None]:
    """The samples of a part of a source of whole rows; None for each that has no answer."""
    rows: list[Record] = []
    held = 0
    for span in source.spans(part):
        assert isinstance(span.document, Record)
        if span.start == span.end:  # of a single row, which is not divided
            continue
        rows.append(span.document)
        held += span.document.held_in_memory
        if held >= _BATCH:
            yield from encoder.samples(rows)
            rows, held = [], 0
    yield from encoder.samples(rows)


class _Fitting(NamedTuple):
    """A sample that has a place in sequences."""

    sample: Sample
    """As long as a sequence at most."""
    over: int
    """Tokens that were cut."""
    beyond: int
    """Samples left out before it, as in ``About``."""
    unanswered: int


class _Maker:
    """Samples to sequences, and the count of what becomes of them. Samples are read ahead of the sequences that they go
    into, so what is counted with a sequence is what it holds, and what was left out before that."""

    def __init__(self, encoder: Encoder, seq_len: int, about: About) -> None:
        self.seq_len, self.about = seq_len, about
        self.padding = _padding(encoder.tokenizer)
        self._beyond = self._unanswered = 0

    def sequences(self, samples: Iterable[Sample | None]) -> Iterator[np.ndarray]:
        """Each of shape (seq_len,)."""
        for row in self._rows(self._that_fit(samples)):
            made = np.zeros(self.seq_len, dtype=_TOKEN)
            made["id"] = self.padding
            at = 0
            for (ids, counts), *_ in row:
                here = made[at : at + len(ids)]
                here["id"], here["mark"] = ids, counts * HAS_LOSS
                here["mark"][0] |= BEGINS
                at += len(ids)
            self._count(row)
            yield made
        # all were read, so those that were left out behind the last sample count as well
        self.about = replace(self.about, beyond=self._beyond, unanswered=self._unanswered)

    def _count(self, row: list[_Fitting]) -> None:
        about = self.about
        self.about = replace(
            about,
            samples=about.samples + len(row),
            trained_tokens=about.trained_tokens + sum(int(each.sample.counts.sum()) for each in row),
            cut=about.cut + sum(each.over > 0 for each in row),
            cut_tokens=about.cut_tokens + sum(each.over for each in row),
            beyond=max(about.beyond, *(each.beyond for each in row)),
            unanswered=max(about.unanswered, *(each.unanswered for each in row)),
        )

    def _that_fit(self, samples: Iterable[Sample | None]) -> Iterator[_Fitting]:
        for sample in samples:
            if sample is None:
                self._unanswered += 1
            elif not sample.counts[: self.seq_len].any():
                self._beyond += 1
            else:
                fits = Sample(sample.ids[: self.seq_len], sample.counts[: self.seq_len])
                over = max(0, len(sample.ids) - self.seq_len)
                yield _Fitting(fits, over, self._beyond, self._unanswered)

    def _rows(self, samples: Iterable[_Fitting]) -> Iterator[list[_Fitting]]:
        if not self.about.packing:
            yield from ([sample] for sample in samples)
            return
        rows: list[list[_Fitting]] = []
        rooms: list[int] = []
        for fitting in samples:
            size = len(fitting.sample.ids)
            at = next((i for i, room in enumerate(rooms) if room >= size), None)
            if at is None:
                if len(rows) == _OPEN:
                    del rooms[0]
                    yield rows.pop(0)
                at = len(rows)
                rows.append([])
                rooms.append(self.seq_len)
            rows[at].append(fitting)
            rooms[at] -= size
        yield from rows


def _padding(tokenizer: Any) -> int:
    """A token that nothing is learnt of and nothing attends to."""
    return next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)


def _say(name: str, part: Part, about: About, sequences: int, seq_len: int, masked: bool) -> None:
    lost = []
    if about.cut:
        lost.append(f"{about.cut:,} cut at training.seq_len = {seq_len} by {about.cut_tokens:,} tokens together")
    if about.beyond:
        lost.append(f"{about.beyond:,} left out whose answer begins beyond it")
    if about.unanswered:
        lost.append(f"{about.unanswered:,} left out without an answer")
    logger.info(
        "data source %r%s: %s, %s samples in %s sequences%s; %s tokens have a loss%s%s",
        name, "" if part == "all" else f", its {part} part", about.format, f"{about.samples:,}", f"{sequences:,}",
        "" if about.packing else ", one in each (data.packing = false)", f"{about.trained_tokens:,}",
        ", prompts have none" if masked else "", "; " + ", ".join(lost) if lost else "",
    )  # fmt: skip
