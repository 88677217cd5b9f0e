"""A table of a report: its CSV, which has all digits, and cells, in which numbers of one kind look alike."""

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flipproof.report.analyse import is_power_of_two, p_text


@dataclass(frozen=True)
class Table:
    """Rows of text, numbers and None. ``file`` is its CSV, which has all columns; the page leaves out ``only_csv``."""

    file: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""
    shown: bool = True
    only_csv: frozenset[str] = frozenset()
    by_row: bool = False
    """Whether the numbers of a row are of one kind, not those of a column."""

    @property
    def _places(self) -> list[tuple[int, bool]]:
        """(place of a column on the page, whether it holds numbers)."""
        return [
            (i, any(isinstance(row[i], int | float) and not isinstance(row[i], bool) for row in self.rows))
            for i, name in enumerate(self.columns)
            if name not in self.only_csv
        ]

    @property
    def head(self) -> list[tuple[str, bool]]:
        return [(self.columns[i], numeric) for i, numeric in self._places]

    @property
    def body(self) -> list[list[tuple[str, bool]]]:
        columns = [_shown(column) for column in zip(*self.rows, strict=True)]
        rows = [_shown(row) for row in self.rows] if self.by_row else list(zip(*columns, strict=True))
        return [[(row[i], numeric) for i, numeric in self._places] for row in rows]

    def to_csv(self) -> bytes:
        buffer = io.StringIO(newline="")
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerows([_no_formula(cell) for cell in row] for row in (self.columns, *self.rows))
        return buffer.getvalue().encode()


def _no_formula(cell: Any) -> Any:
    """A name that a spreadsheet would run, with an apostrophe before it, which spreadsheets take for "this is text"."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def _shown(values: Sequence[Any]) -> Sequence[str]:
    """What is of one kind as text, its numbers all in one format."""
    floats = [value for value in values if isinstance(value, float) and math.isfinite(value) and value]
    sizes = [abs(value) for value in floats] or [1.0]
    if all(map(is_power_of_two, floats)) and min(sizes) < 2**-6:
        number: Callable[[float], str] = p_text
    else:
        number = _plain if min(sizes) >= 1e-4 and max(sizes) < 1e9 else _with_exponent

    def text(value: Any) -> str:
        if value is None:
            return "–"
        if isinstance(value, bool):
            return str(value).lower()  # as TOML has it
        if isinstance(value, float):
            return number(value) if math.isfinite(value) else "∞" if math.isinf(value) else "nan"
        return f"{value:,}" if isinstance(value, int) else str(value)

    return [text(value) for value in values]


def _plain(value: float) -> str:
    return f"{value:.5g}" if abs(value) < 99999.5 else f"{value:,.0f}"


def _with_exponent(value: float) -> str:
    digits, exponent = f"{value:.4e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{exponent}" if value else "0"
