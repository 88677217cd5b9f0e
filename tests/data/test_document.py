import re

import pytest
from small_tokenizers import text, trained

from flipproof.data import document
from flipproof.data.document import Row, Span, TextFile, blocks, pieces, spans
from flipproof.data.tokens import Tokens, batches
from flipproof.errors import ConfigError
from flipproof.models.load import byte_tokenizer


def whole(path):
    return Span(TextFile(path, path.stat().st_size), 0, path.stat().st_size)


KINDS = ("gpt2", "gpt2-prefix", "llama3", "llama2", "metaspace-first", "gemma", "t5", "wordpiece")


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_have_the_tokens_of_the_whole(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(document, "_PIECE", 300)
    tokenizer, path = trained(kind), tmp_path / "a.txt"
    path.write_text(text())
    parts = list(pieces(whole(path)))
    assert len(parts) > 40
    assert "".join(part.text for part in parts) == text()
    (tokens,) = Tokens(tokenizer, []).of(batches(parts, 2**20))
    expected = tokenizer(text(), add_special_tokens=False)["input_ids"]
    assert len(set(expected)) > 40
    assert tokens.tolist() == [*expected, tokenizer.eos_token_id]


def test_a_text_without_any_place_to_cut_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(document, "_PIECE", 300)
    path = tmp_path / "a.txt"
    for content in ("汉字。" * 1000, "acgt" * 1000, "a " + "x" * 5000, "。\n" * 900, " " * 700 + "a" + " " * 700):
        path.write_text(content)
        (tokens,) = Tokens(byte_tokenizer(), []).of(batches(pieces(whole(path)), 2**20))
        without = content[600:] if content.startswith(" ") else content  # blank pieces before a text are no text
        assert byte_tokenizer().decode(tokens[:-1]) == without
        assert tokens[-1] == 256
        assert (tokens == 256).sum() == 1


def test_a_text_is_never_held_as_a_whole(tmp_path, monkeypatch):
    """What is alive of a text at any time is a few pieces."""
    monkeypatch.setattr(document, "_PIECE", 2**10)
    path = tmp_path / "a.txt"
    path.write_text(text(20_000))
    assert path.stat().st_size > 400 * 2**10
    sizes, read = [], TextFile.read
    monkeypatch.setattr(TextFile, "read", lambda self, a, b: sizes.append(b - a) or read(self, a, b))
    assert max(len(piece.text) for piece in pieces(whole(path))) <= 2**10
    assert max(sizes) <= 2**10
    sizes.clear()
    next(pieces(whole(path)))
    assert sum(sizes) <= 2**12


@pytest.mark.parametrize("size", [1, 2, 3, 7, 300])
def test_blocks_part_no_character_and_no_line_end(tmp_path, monkeypatch, size):
    monkeypatch.setattr(document, "_PIECE", size)
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text(30).replace("\n", "\r\n").encode() + b"old\rend")
    assert "".join(blocks(whole(path))) == text(30) + "old\nend"


@pytest.mark.parametrize("size", [1, 5, 2**16])
def test_bytes_that_are_not_utf_8_are_named_by_their_place(tmp_path, monkeypatch, size):
    monkeypatch.setattr(document, "_PIECE", size)
    path = tmp_path / "a.txt"
    for content, where in (
        (("aé" * 9).encode("latin-1"), "byte 1 (0xe9)"),
        (b"\xef\xbb\xbfab\xc3", "byte 5 (0xc3)"),
        (b"ok \xf0\x9f\x98 no", "byte 3 (0xf0)"),
        ("text".encode("utf-16"), "byte 0 (0xff)"),
    ):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(ConfigError) as error:
            list(blocks(whole(path)))
        assert where in str(error.value)
        assert str(path) in str(error.value)
        assert f"iconv -f {'UTF-16' if where.startswith('byte 0') else 'LATIN1'}" in str(error.value)
        assert "\n" not in str(error.value)


def row(value):
    return Row("t, row 0", "text", lambda: {"text": value}, 0)


def test_a_row_is_text_or_says_what_it_is():
    def read(value):
        document = row(value)
        return "".join(blocks(Span(document, 0, document.size)))

    assert read("a\r\nb") == "a\r\nb"  # a table's text is as it is
    assert read("é".encode()) == "é"
    assert read(None) == ""
    assert read("a\ud83d\ude00b\ud83dc") == "a😀b\ufffdc"
    for value, kind in (
        (3, "int"), (0.5, "float"), (True, "bool"), ([], "list"), ([1], "list of int"), ({}, "dict"),
        ([{"role": "user"}], "list of dict"),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as error:
            read(value)
        assert f"data.text_column = 'text': t, row 0 holds a value of type {kind}, not text" in str(error.value)
        assert ("data.format = 'chat'" in str(error.value)) == isinstance(value, list)
    with pytest.raises(ConfigError, match=r"row 0 holds bytes that are not UTF-8 \(byte 1 of them\)"):
        read(b"a\xe9")


def held(number_of_rows):
    rows = [Row(str(i), "text", lambda: {"text": "abc"}, 0) for i in range(number_of_rows)]
    found = {part: [int(span.document.where) for span in spans(rows, part)] for part in ("all", "training", "held-out")}
    assert sorted(found["training"] + found["held-out"]) == sorted(found["all"]) == list(range(number_of_rows))
    return set(found["held-out"])


def test_of_each_ten_rows_one_is_held_out_whatever_comes_after():
    assert all(len(held(n)) == 1 for n in range(2, 10))
    assert sorted(i // 10 for i in held(500)) == list(range(50))
    assert len({i % 10 for i in held(500)}) == 10
    for n in (10, 14, 233):
        assert held(n) == {i for i in held(500) if i < n}


@pytest.mark.parametrize("content", ["line {}\n", "word{} ", "é", "x", "y\r\n"])
@pytest.mark.parametrize("size", [1, 10, 3000, 60_000, 2_000_000])
def test_a_file_is_divided_at_a_line_a_word_or_a_character(tmp_path, content, size):
    path = tmp_path / "a.txt"
    path.write_bytes("".join(content.format(i) for i in range(size // len(content) + 1)).encode()[: size // 2 * 2])
    document = TextFile(path, path.stat().st_size)
    (first,), (second,) = spans([document], "training"), spans([document], "held-out")
    assert (first.start, first.end, second.end) == (0, second.start, document.size)
    assert first.end == second.start
    data = path.read_bytes()
    data[: first.end].decode()  # no character is cut
    share = second.end - second.start
    if size >= 3000:
        if "\n" in content:
            assert data[first.end - 1 :].startswith(b"\n")
        elif " " in content:
            assert re.fullmatch(rb"(?s).* ", data[first.end - 10 : first.end])
        assert max(size // 10, min(size // 2, 4096)) / 2 <= share <= max(size // 10, min(size // 2, 4096))


def test_large_files_are_divided_among_small_ones(tmp_path):
    sizes = [100] * 5 + [2**20 + 1] + [100] * 20
    files = []
    for i, size in enumerate(sizes):
        (tmp_path / f"{i:02}.txt").write_bytes(b"abc\n" * (size // 4) + b"a" * (size % 4))
        files.append(TextFile(tmp_path / f"{i:02}.txt", size))
    held_out = {span.document.path.name: span for span in spans(files, "held-out")}
    training = {span.document.path.name: span for span in spans(files, "training")}
    assert held_out.keys() & training.keys() == {"05.txt"}
    assert held_out["05.txt"].start == training["05.txt"].end == (2**20 + 1 - (2**20 + 1) // 10) // 4 * 4 + 4
    assert len(held_out) in (3, 4)
