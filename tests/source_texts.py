"""What a source gives, and what it refuses."""

import json

import pytest

from flipproof.data.source import open_source
from flipproof.errors import ConfigError


def read(source, part="all", column="text"):
    """The texts of a part of a source, sorted."""
    spans = open_source(str(source), column).spans(part)
    return sorted(document.read(start, end).decode() for document, start, end in spans)


def refused(words, source, column="text", part="all"):
    with pytest.raises(ConfigError) as error:
        read(source, part, column)
    (line,) = error.value.problems
    assert "\n" not in line
    assert all(word in line for word in words), line


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
