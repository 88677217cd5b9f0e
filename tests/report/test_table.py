import csv
import math

from flipproof.report.table import Table


def test_a_name_in_a_csv_is_no_formula():
    rows = [["=1+1", -0.5], ["+a", 1e-9], ["-a", None], ["@a", True], ["\t=a", 1], ["a=b", 1]]
    cells = list(csv.reader(Table("a.csv", ["run", "=p"], rows).to_csv().decode().splitlines()))
    assert cells[0] == ["run", "'=p"]
    assert [row[0] for row in cells[1:]] == ["'=1+1", "'+a", "'-a", "'@a", "'\t=a", "a=b"]
    assert [row[1] for row in cells[1:]] == ["-0.5", "1e-09", "", "True", "1", "1"]


def test_the_numbers_of_a_column_are_written_alike():
    """And those of a row, where a row is a thing and its columns are runs."""
    columns = {
        (-3.799e-4, -0.0012867, 0.0): ("-0.0003799", "-0.0012867", "0"),
        (1e-6, 1e-3, 0.5): ("1e-06", "1e-03", "5e-01"),
        (2.0**-10, 0.5, 2.0**-12): ("2⁻¹⁰", "2⁻¹", "2⁻¹²"),
        (0.5, 2.0, 4.0): ("0.5", "2", "4"),
        (7.389, 260147.25, math.inf): ("7.389", "260,147", "∞"),
        (7.389, 3.2e40, None): ("7.389e+00", "3.2e+40", "–"),
        (1234, 1e-5, True): ("1,234", "1e-05", "true"),
        (False, None, True): ("false", "–", "true"),
    }
    rows = list(zip(*columns, strict=True))
    names = [str(i) for i in range(len(columns))]
    shown = Table("a.csv", names, rows)
    assert [[cell for cell, _ in row] for row in shown.body] == [
        list(row) for row in zip(*columns.values(), strict=True)
    ]
    assert [numeric for _, numeric in shown.head] == [True] * 7 + [False]
    by_row = Table("a.csv", ["0", "1", "2"], list(columns), by_row=True)
    assert [tuple(cell for cell, _ in row) for row in by_row.body] == list(columns.values())
