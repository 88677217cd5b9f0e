"""Log lines for people, from one process of all."""

import logging
import os
import sys

logger = logging.getLogger("flipproof")


def set_up_logging() -> None:
    """Log lines to stderr, from rank 0 alone."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    logger.propagate = False
