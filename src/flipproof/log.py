"""Log lines for people: on stderr from one process of all, and in the directory of a run."""

import logging
import os
import sys
from pathlib import Path
from typing import Any

logger = logging.getLogger("flipproof")


class _Screen(logging.StreamHandler):
    """Lines on stderr, each with the time of day, above the progress bars there."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm  # when there is something to say

        with tqdm.external_write_mode(self.stream):
            super().emit(record)


def set_up_logging() -> None:
    """Log lines to stderr, from rank 0 alone."""
    handler = _Screen(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    logger.propagate = False


class RunLog(logging.Handler):
    """Within its block what is logged is kept, and from ``begin`` on appended to a file: a start that comes to nothing
    leaves none. Last comes the error that ends the block.

    Kept is what the ``flipproof`` logger lets through: warnings alone, where a program calls ``train`` without a log.

    A disk that takes no more lines is told once. That costs the log, and not the run.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self._path, self._begun, self._lines = path, False, ""

    def __enter__(self) -> "RunLog":
        logger.addHandler(self)
        return self

    def begin(self) -> None:
        """From now on there is a file; a blank line parts this start from the one before."""
        self._begun = True
        if self._path.exists():
            self._lines = f"\n{self._lines}"
        self._append()

    def emit(self, record: logging.LogRecord) -> None:
        self._lines += f"{self.format(record)}\n"
        if self._begun:
            self._append()

    def _append(self) -> None:
        try:
            with self._path.open("ab", buffering=0) as file:
                file.write(self._lines.encode(errors="backslashreplace"))
        except OSError as error:
            logger.removeHandler(self)
            logger.warning("%s: %s; this run is no longer logged there", self._path, error.strerror)
        self._lines = ""

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is not None and self in logger.handlers:
            self.handle(
                logger.makeRecord(logger.name, logging.ERROR, "", 0, f"{type(error).__name__}: {error}", (), None)
            )
        logger.removeHandler(self)


def bar(total: int | None, unit: str, first: bool = True, **more: Any) -> Any:
    """tqdm's bar on stderr, where that is a terminal and this is the ``first`` process. It is gone when it is closed,
    since what it was about is printed then, unless ``more`` (tqdm's options) says that it stays."""
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, disable=None if first else True, **{"leave": False, **more})
