"""Log lines and progress for people, from one process of all."""

import logging
import os
import sys
from typing import Any

logger = logging.getLogger("flipproof")


def set_up_logging() -> None:
    """Log lines to stderr, from rank 0 alone."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    logger.propagate = False


def bar(total: int, unit: str, first: bool = True, **more: Any) -> Any:
    """tqdm's bar on stderr, where that is a terminal and this is the ``first`` process; it is gone when it is closed,
    and what it was about is printed."""
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, disable=None if first else True, leave=False, **more)
