"""Files of every kind, compressed or not, beside each other: each against the same text in a plain file."""

import gzip
import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_texts import read, refused, write_rows

from flipproof.config import DataConfig
from flipproof.data.document import CompressedText, pieces
from flipproof.data.sequences import load_text
from flipproof.data.source import open_source
from flipproof.models.load import byte_tokenizer

TEXTS = ["plain", "two\nlines", 'a "quoted", word', "", "é 汉字", "\ttab", *(f"row {i}" for i in range(40))]


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACK = {".gz": gzip.compress, ".zst": zstd}


def quoted(cell, separator):
    return '"' + cell.replace('"', '""') + '"' if set(cell) & {'"', "\n", separator} else cell


def table(separator, end="\n"):
    """As RFC 4180 writes it, by hand."""
    lines = [
        separator.join(("id", "text", "more")),
        *(f"{i}{separator}{quoted(text, separator)}{separator}x" for i, text in enumerate(TEXTS)),
    ]
    return (end.join(lines) + end).encode()


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".csv", table(",")),
        (".csv", b"\xef\xbb\xbf" + table(",", "\r\n")),
        (".tsv", table("\t")),
        (".json", json.dumps([{"text": text} for text in TEXTS]).encode()),
        (".ndjson.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()),
    ],
)
def test_the_rows_of_a_table_whatever_it_is_written_in(tmp_path, suffix, content, packed):
    plain = write_rows(tmp_path / "plain.jsonl", [{"text": text} for text in TEXTS])
    path = tmp_path / f"a{suffix}{packed}"
    path.write_bytes(PACK[packed](content) if packed else content)
    for part in ("all", "training", "held-out"):
        assert read(path, part) == read(plain, part)


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("lines", [3, 40_000])  # a small document, and one of more than 1 MiB
def test_a_compressed_text_is_that_text(tmp_path, packed, lines):
    text = "".join(f"line {i}: some words of é text, and more\n" for i in range(lines)).encode()
    (tmp_path / "a.md").write_bytes(text)
    path = tmp_path / f"b.txt{packed}"
    path.write_bytes(PACK[packed](text))
    seen = []
    for name in (tmp_path / "a.md", path):
        parts = [open_source(str(name), "text").spans(part) for part in ("training", "held-out")]
        seen.append([[(s.start, s.end, "".join(p.text for p in pieces(s))) for s in spans] for spans in parts])
    assert seen[0] == seen[1]
    (whole,) = open_source(str(path), "text").spans("all")
    rng = np.random.default_rng(0)
    for start in rng.integers(0, len(text), 20):
        assert whole.document.read(start, start + 100) == text[start : start + 100]
    assert whole.document.read(len(text), len(text) + 9) == b""


def test_a_compressed_text_is_never_held_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(b"some words of a long text\n" * 10_000)
    asked, opened, reading = [], [], gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, size=-1: asked.append(size) or reading(self, size))
    opening = gzip.open
    monkeypatch.setattr(gzip, "open", lambda *a: opened.append(a) or opening(*a))
    (training,) = open_source(str(path), "text").spans("training")
    assert sum(len(piece.text) for piece in pieces(training)) == training.end > 14_000_000
    assert max(asked) <= 2**20
    assert min(asked) >= 0
    assert len(opened) == 3  # its size, where its held-out part begins, and once from end to end


def test_two_compressed_texts_in_turn(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt.gz").write_bytes(gzip.compress((name * 1000).encode()))
    a, b = (CompressedText(tmp_path / f"{name}.txt.gz") for name in "ab")
    for start in (0, 10, 5, 900):
        assert a.read(start, start + 10) == b"a" * 10
        assert b.read(start, start + 10) == b"b" * 10


def test_a_folder_of_several_kinds(tmp_path, caplog):
    folder = tmp_path / "all"
    folder.mkdir()
    (folder / "a.txt").write_text("a text")
    (folder / "b.md").write_text("# a page")
    write_rows(folder / "c.jsonl", [{"text": "of json"}, {"text": None}])
    (folder / "d.csv").write_text("text,n\nof csv,1\n")
    pq.write_table(pa.table({"text": ["of parquet"]}), folder / "e.parquet")
    (folder / "f.txt.gz").write_bytes(gzip.compress(b"a compressed text"))
    for name in ("README.md", "g.png", "h.png", "LICENSE"):
        (folder / name).write_text("left alone")
    expected = ["", "# a page", "a compressed text", "a text", "of csv", "of json", "of parquet"]
    assert read(folder) == expected
    source = open_source(str(folder), "text")
    assert source.said == [
        "6 files are read (1 of csv, 1 of json, 1 of parquet, 3 of text), left alone: 1 .md, 2 .png, 1 LICENSE"
    ]
    for name in ("c.jsonl", "d.csv", "e.parquet"):  # one table without the column is enough
        before = (folder / name).read_bytes()
        if name == "c.jsonl":
            write_rows(folder / name, [{"body": "x"}])
        elif name == "d.csv":
            (folder / name).write_text("body,n\nof csv,1\n")
        else:
            pq.write_table(pa.table({"body": ["x"]}), folder / name)
        refused(["data.text_column = 'text'", "has the columns body"], folder)
        (folder / name).write_bytes(before)
    (folder / "a.txt").write_text("words of a text " * 40)
    with caplog.at_level("INFO", "flipproof"):
        load_text(DataConfig(source=str(folder)), byte_tokenizer(), 8)
    assert caplog.text.count("6 files are read") == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"id,body\n1,x\n", ["data.text_column = 'text'", "has the columns id, body"]),
        (b'id,text\n1,"unfinished\nand on\n', ["a.csv, line 3 is not CSV", "unexpected end of data"]),
        (b'id,text\n1,"x"y\n', ["a.csv, line 2 is not CSV", "expected after"]),
        (b"id,text\n1,x\n2\n", ["a.csv, line 3 has 1 cells, and the first line 2"]),
        (b'id,text\n1,"x\ny"\n2,x,y\n', ["a.csv, line 4 has 3 cells, and the first line 2"]),
        (b"text,id,text\nx,1,y\n", ["a.csv: its first line names column 'text' more than once"]),
        (b"id,text\n1,\xe9\n", ["a.csv, line 2: byte 2 (0xe9) is not UTF-8", "iconv"]),
    ],
)
def test_what_is_wrong_with_csv_is_named_by_its_line(tmp_path, content, words):
    (tmp_path / "a.csv").write_bytes(content)
    refused(words, tmp_path / "a.csv")


def test_what_follows_a_json_array_is_refused(tmp_path):
    for more in ('[{"text": "b"}]', "garbage"):
        (tmp_path / "a.json").write_text(f'[{{"text": "a"}}]\n{more}\n')
        refused([f"a.json: {more[0]!r} follows the end of its JSON array"], tmp_path / "a.json")


def test_a_cell_of_any_usual_length(tmp_path):
    long = "many words " * 50_000
    (tmp_path / "a.csv").write_text(f"text\n{long}\n")
    assert read(tmp_path / "a.csv") == [long]
    (tmp_path / "a.csv").write_text("")
    assert read(tmp_path / "a.csv") == []


def test_what_is_damaged_is_named(tmp_path, monkeypatch):
    text = gzip.compress(np.random.default_rng(0).bytes(5000).hex().encode())
    rows = gzip.compress("".join(json.dumps({"text": str(i)}) + "\n" for i in range(5000)).encode())
    for name, whole in (("a.txt.gz", text), ("a.jsonl.gz", rows), ("a.csv.gz", gzip.compress(table(",") * 9))):
        for damage in (whole[:-100], b"no gzip", whole[:60] + b"\xff" * 60 + whole[120:], whole[:-8] + b"\0" * 8):
            (tmp_path / name).write_bytes(damage)
            refused([name, "is damaged, or not what .gz says"], tmp_path / name)
    (tmp_path / "a.txt.zst").write_bytes(b"no zstandard")
    refused(["a.txt.zst", "is damaged, or not what .zst says"], tmp_path / "a.txt.zst")
    shards = tmp_path / "shards"
    shards.mkdir()
    for i in range(3):
        pq.write_table(pa.table({"text": [f"shard {i}"] * 100}), shards / f"{i}.parquet")
    (shards / "1.parquet").write_bytes(b"PAR1" + b"\0" * 100 + b"PAR1")
    refused(["1.parquet", "cannot be read"], shards)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("txt", "5273885cd6f0b2b6"),
        ("lone.txt", "f8e3e1999b2f9c83"),
        ("jsonl", "5273885cd6f0b2b6"),
        ("parquet", "5273885cd6f0b2b6"),
    ],
)
def test_packed_tokens_are_what_they_always_were(tmp_path, kind, expected):
    """Of training and held-out text, as packed before other kinds could be read."""
    documents = [f"document {i}: " + "words and é, more\n" * (i % 7 + 1) for i in range(60)]
    path = tmp_path / f"a.{kind}"
    if kind == "txt":
        path.mkdir()
        for i, one in enumerate(documents):
            (path / f"{i:02}.txt").write_text(one)
    elif kind == "lone.txt":
        path.write_text("".join(documents))
    elif kind == "jsonl":
        write_rows(path, [{"text": one} for one in documents])
    else:
        pq.write_table(pa.table({"text": documents}), path)
    train, held_out = load_text(DataConfig(source=str(path)), byte_tokenizer(), 16)
    tokens = train.sequences.tobytes() + held_out.sequences.tobytes()
    assert hashlib.sha256(tokens).hexdigest()[:16] == expected
