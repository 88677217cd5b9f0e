"""Processes that make tokens of a long text's chunks, beside the one that asks: what is not the tokenizer's own code is
Python, which uses one core.

Each is a Python of its own that knows the tokenizer and nothing else. Not a fork, since who asks may hold a GPU and
threads; and nothing of ``multiprocessing`` that runs the user's script again.
"""

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import IO, Any

import numpy as np

from flipproof.data.chunks import Chunks
from flipproof.data.document import Piece
from flipproof.errors import ConfigError

_MOST = 8


def workers_here() -> int:
    """How many there are to be: one for each core that this process may use; 0 where one alone would win nothing."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return min(cores, _MOST) if cores > 1 else 0


def encoded_by_workers(
    backend: Any, batches: Iterable[list[Piece]], count: int
) -> Iterator[tuple[list[Piece], list[np.ndarray]]]:
    """(batch, the token ids of each of its pieces, int32) in the order of batches, a few of which are under way.

    Args:
        backend: a ``tokenizers.Tokenizer``.
        count: processes.

    Raises:
        ConfigError: where one of them ends.
    """
    workers = [_Worker(backend.to_str()) for _ in range(count)]
    idle: SimpleQueue[_Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def encode(batch: list[Piece]) -> list[np.ndarray]:
        worker = idle.get()
        try:
            return worker.encode([piece.text for piece in batch], [piece.begins for piece in batch])
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(count)
    under_way: deque[tuple[list[Piece], Future[list[np.ndarray]]]] = deque()
    try:
        for batch in batches:
            under_way.append((batch, threads.submit(encode, batch)))
            if len(under_way) > 2 * count:
                batch, ids = under_way.popleft()
                yield batch, ids.result()
        while under_way:
            batch, ids = under_way.popleft()
            yield batch, ids.result()
    finally:
        for worker in workers:
            worker.end()
        threads.shutdown(cancel_futures=True)


class _Worker:
    """One process."""

    def __init__(self, state: str) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", f"from {__name__} import main; main()"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        self._send(state)

    def encode(self, texts: list[str], begins: list[bool]) -> list[np.ndarray]:
        self._send((texts, begins))
        lengths = _read(self._from, len(texts))
        if lengths is None or (ids := _read(self._from, int(lengths.sum()))) is None:
            raise self._ended()
        return np.split(ids, lengths.cumsum()[:-1])

    def _send(self, what: Any) -> None:
        try:
            pickle.dump(what, self._to)
            self._to.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def _ended(self) -> ConfigError:
        return ConfigError([f"a process that tokenises text has ended (exit code {self._process.wait()})"])

    def end(self) -> None:
        self._process.kill()  # it holds nothing that could be lost
        self._process.wait()
        self._from.close()
        with suppress(BrokenPipeError):
            self._to.close()


def _read(stream: IO[bytes], count: int) -> np.ndarray | None:
    """So many int32; None where the stream ends before."""
    data = stream.read(4 * count)
    return np.frombuffer(data, dtype="<i4") if len(data) == 4 * count else None


def main() -> None:
    """Answer with tokens what comes on standard input, until it ends: first the tokenizer, then texts."""
    from tokenizers import Tokenizer

    chunks = Chunks(Tokenizer.from_str(pickle.load(sys.stdin.buffer)))
    while True:
        try:
            texts, begins = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        ids = chunks.encode(texts, begins)
        sys.stdout.buffer.write(np.array([len(each) for each in ids], dtype="<i4").tobytes())
        sys.stdout.buffer.write(np.concatenate(ids).tobytes())
        sys.stdout.buffer.flush()
