"""Streamed text against the packed one, and what it does when things go wrong."""

import itertools
import json
import os
import time
from collections import Counter

import datasets
import numpy as np
import pytest
from texts import sentences

from flipproof.config import DataConfig
from flipproof.data import shards as shards_module
from flipproof.data import stream as stream_module
from flipproof.data.document import Row, spans
from flipproof.data.sequences import PackedText, load_held_out, load_text
from flipproof.data.shards import AHEAD, Place, Reader
from flipproof.data.source import Choice, HubStream, LocalFiles, training_source
from flipproof.data.stream import open_stream
from flipproof.errors import ConfigError
from flipproof.models.load import byte_tokenizer

LENGTH, SIZE = 32, 8
NOTHING = PackedText(np.empty((0, LENGTH), dtype=np.int32), "nothing")


def rows(path, count=200):
    lines = sentences(60 * count).splitlines()
    path.write_text("".join(json.dumps({"text": f"{i} {lines[i % len(lines)]}"}) + "\n" for i in range(count)))
    return str(path)


def config(source, **more):
    return DataConfig(source=source, streaming=True, buffer_size=SIZE, **more)


def opened(source, tokenizer=None, packs=None, length=LENGTH, **more):
    found = config(source, **more)
    return open_stream(found, tokenizer or byte_tokenizer(), length, NOTHING, packs or os.getpid())


def taken(text, count, first=0, seed=0):
    return text.batch(seed, first, count).ids.numpy()


def as_packed(source, tokenizer=None, length=LENGTH, **more):
    return load_text(DataConfig(source=source, **more), tokenizer or byte_tokenizer(), length)[0].sequences


def multiset(sequences):
    return Counter(row.astype(np.int64).tobytes() for row in sequences)


def start_with_bos(tokenizer):
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    return tokenizer


# -- which sequences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [None, True])
def test_the_sequences_are_those_of_packed_text_shard_by_shard(tmp_path, bos):
    source = rows(tmp_path / "a.jsonl")
    tokenizer = start_with_bos(byte_tokenizer()) if bos else byte_tokenizer()
    expected = as_packed(source, tokenizer, bos=bos)
    count = len(expected)
    assert count > 10 * SIZE
    assert count % SIZE
    with opened(source, tokenizer, bos=bos) as text:
        whole = taken(text, count)
        for first in range(0, count, SIZE):
            assert multiset(whole[first : first + SIZE]) == multiset(expected[first : first + SIZE])
        assert not (whole == expected).all()
        again = taken(text, 2 * count, count)
        assert text.total == count
    assert multiset(again[:count]) == multiset(again[count:]) == multiset(expected)
    assert len({order.tobytes() for order in (whole, again[:count], again[count:])}) == 3
    assert multiset(again[:SIZE]) != multiset(whole[:SIZE])  # shards too are in another order


def test_a_sequence_is_a_function_of_seed_and_place(tmp_path):
    source = rows(tmp_path / "a.jsonl")
    with opened(source) as text:
        whole = taken(text, 500)
    with opened(source) as text:
        for first, count in ((333, 7), (0, 3), (77, 20), (490, 10)):
            np.testing.assert_array_equal(taken(text, count, first), whole[first : first + count])
        assert not (taken(text, SIZE, seed=1) == whole[:SIZE]).all()


def test_two_processes_see_nothing_twice(tmp_path):
    """Rows of their own in each micro-batch, as ``train/step.py`` takes them."""
    source = rows(tmp_path / "a.jsonl")
    with opened(source) as first, opened(source, packs=os.getpid()) as second:
        mine = np.concatenate([taken(first, 4, start) for start in range(0, 160, 8)])
        others = np.concatenate([taken(second, 4, start + 4) for start in range(0, 160, 8)])
    assert not multiset(mine) & multiset(others)
    assert max((multiset(mine) + multiset(others)).values()) == 1


def test_max_tokens_end_a_stream(tmp_path):
    source = rows(tmp_path / "a.jsonl")
    for sequences in (SIZE, 2 * SIZE + 3):
        with opened(source, max_tokens=sequences * LENGTH + 5) as text:
            got = taken(text, 3 * SIZE)
            assert text.total == sequences
        assert multiset(got[:sequences]) == multiset(as_packed(source)[:sequences])


def test_a_last_sequence_that_is_whole_by_its_beginning_alone_counts(tmp_path):
    """``packing`` puts a beginning before the last tokens, too."""
    tokenizer = start_with_bos(byte_tokenizer())
    for letters in range(70, 76):
        source = tmp_path / f"{letters}.jsonl"
        source.write_text("".join(json.dumps({"text": "x" * letters}) + "\n" for _ in range(20)))
        expected = as_packed(str(source), tokenizer, bos=True)
        with opened(str(source), tokenizer, bos=True) as text:
            assert multiset(taken(text, len(expected))) == multiset(expected)
            taken(text, 1, len(expected) + SIZE)
            assert text.total == len(expected)


def test_documents_of_several_pieces_are_cut_as_packed_ones(tmp_path, monkeypatch):
    """Text files are divided, and their pieces stand in several batches."""
    (tmp_path / "a.txt").write_text(sentences(400_000))
    source = str(tmp_path / "a.txt")
    expected = as_packed(source, length=512)
    with opened(source, length=512) as text:
        assert multiset(taken(text, len(expected))) == multiset(expected)


# -- restarts ----------------------------------------------------------------------------------------------------------


def directory_of(text):
    return text.shards.directory


def test_what_is_packed_again_has_the_same_bits(tmp_path):
    source = rows(tmp_path / "a.jsonl", 2000)
    with opened(source) as text:
        first = taken(text, SIZE)
        assert taken(text, 1, 40 * SIZE).shape == (1, LENGTH)
        directory = directory_of(text)
        heads = [text.shards.head(n) for n in range(40)]
    places = [head.next for head in heads]
    assert places == sorted(places)
    assert all(isinstance(place, Place) for place in places)
    files = {path: path.read_bytes() for path in directory.glob("0*")}
    for gone in (range(20, 60), range(25)):  # the end; the beginning, and some that are there
        for number in gone:
            for path in directory.glob(f"{number:06d}.*"):
                path.unlink()
        with opened(source) as text:
            taken(text, 1, gone[-1] * SIZE if gone[0] == 0 else 40 * SIZE)
            taken(text, SIZE)
        there = {path: path.read_bytes() for path in files if path.exists()}
        assert there == {path: files[path] for path in there}
        assert directory / "000040.json" in there if gone[0] else directory / "000000.json" in there
    with opened(source) as text:
        np.testing.assert_array_equal(taken(text, SIZE), first)


def test_a_reader_that_begins_at_a_place_is_asked_for_no_text_before(tmp_path, tokenised):
    source = rows(tmp_path / "a.jsonl", 2000)
    with opened(source) as text:
        taken(text, 1, 30 * SIZE)
    tokens_of_all = sum(tokenised)
    for path in directory_of(text).glob("0000[3-9]*"):
        path.unlink()
    tokenised.clear()
    with opened(source) as text:
        taken(text, 1, 30 * SIZE)
    assert 0 < sum(tokenised) < tokens_of_all / 2


@pytest.mark.parametrize("kind", ["npy", "json"])
def test_a_damaged_shard_is_packed_again(tmp_path, caplog, kind):
    source = rows(tmp_path / "a.jsonl")
    with opened(source) as text:
        expected = taken(text, 40)
    file = directory_of(text) / f"000002.{kind}"
    content = file.read_bytes()
    file.write_bytes(content[:-20] + b"?" * 20)
    with opened(source) as text:
        np.testing.assert_array_equal(taken(text, 40), expected)
    assert file.read_bytes() == content
    assert "is damaged: its text is tokenised anew" in caplog.text


def test_an_early_shard_that_is_gone_is_packed_again_when_a_later_pass_needs_it(tmp_path):
    source = rows(tmp_path / "a.jsonl")
    count = len(as_packed(source))
    with opened(source) as text:
        expected = taken(text, count, count)
    (directory_of(text) / "000000.json").unlink()
    with opened(source) as text:
        np.testing.assert_array_equal(taken(text, count, count), expected)


@pytest.mark.parametrize("start", [[5, 6], [5, 6, 7]])
def test_a_reader_goes_on_anywhere_where_sequences_begin_with_several_tokens(tmp_path, start):
    """A sequence then takes fewer tokens than it has, and what is left over may be of two batches."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "x" * (n % 17)}) + "\n" for n in range(300)))
    source = training_source(config(str(tmp_path / "a.jsonl")))

    def reader(place):
        return Reader(source, byte_tokenizer(), start, 11, 8, place, lambda: None)

    whole = np.concatenate(list(reader(Place()).sequences(10_000)))
    one = reader(Place())
    for first in range(0, len(whole), 11):
        place = one.place
        assert place.used >= 0
        np.testing.assert_array_equal(next(reader(place).sequences(1)), whole[first : first + 11])
        next(one.sequences(1))


def test_runs_that_share_a_cache_take_turns(tmp_path):
    """One is far ahead and idle, the other goes on alone."""
    source = rows(tmp_path / "a.jsonl", 1000)
    with opened(source) as one, opened(source) as other:
        taken(one, SIZE)
        there = taken(other, 20 * SIZE)
        np.testing.assert_array_equal(taken(one, 20 * SIZE), there)


def test_the_fingerprint_is_of_the_text_that_was_used(tmp_path):
    source = rows(tmp_path / "a.jsonl")
    with opened(source) as text:
        used = [text.fingerprint(count) for count in (1, SIZE, SIZE + 1, 1000, 5000)]
    assert used[0] == used[1] != used[2] != used[3]
    assert used[3] == used[4]  # all of it
    whole = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "moved.jsonl").write_text(whole)
    (tmp_path / "other.jsonl").write_text(whole.replace("a", "o"))
    for name, same in (("moved", True), ("other", False)):
        with opened(str(tmp_path / f"{name}.jsonl")) as text:
            assert (text.fingerprint(1) == used[0], text.fingerprint(1000) == used[3]) == (same, same)


# -- endless and broken sources ----------------------------------------------------------------------------------------


@pytest.fixture
def endless(monkeypatch):
    """A source without end; how many of its rows were read."""
    read = []

    def documents():
        for number in itertools.count():
            read.append(number)
            yield Row("a row", "text", lambda n=number: {"text": f"{n} " + "word " * 2000}, 10_000)

    monkeypatch.setattr(LocalFiles, "spans", lambda self, part: spans(documents(), part))
    return read


def test_a_source_without_end_begins_after_a_bounded_part(tmp_path, endless):
    """A window of documents (32 MiB) for the first shards, and the same for the held-out text."""
    (tmp_path / "a.txt").write_text("never read")
    source, window = str(tmp_path / "a.txt"), 2**25 // 10_000 + 2
    load_held_out(config(source, held_out_tokens=4096), byte_tokenizer(), LENGTH)
    assert len(endless) <= window
    endless.clear()
    with opened(source) as text:
        assert taken(text, SIZE).shape == (SIZE, LENGTH)
        deadline = time.monotonic() + 60
        while text.shards.head(AHEAD) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        packed = len(list(directory_of(text).glob("*.npy")))
    assert packed == AHEAD + 1
    assert len(endless) <= window


def test_text_that_cannot_be_read_ends_what_needs_it_and_nothing_before(tmp_path):
    source = tmp_path / "a.jsonl"
    rows(source, 100)
    good = source.read_text()
    source.write_text(good + "{broken\n" + good)
    with opened(str(source)) as text:
        with pytest.raises(ConfigError, match=r"a.jsonl, line 101 is not one JSON object") as failed:
            text.need(0, 0, 1000)
        assert len(failed.value.problems) == 1
        last = len(list(directory_of(text).glob("*.json"))) - 3  # without two that say who packs
        assert taken(text, last * SIZE).shape == (last * SIZE, LENGTH)


def follower(text, monkeypatch, process):
    monkeypatch.setattr(stream_module, "POLL_S", 0.001)
    return stream_module.StreamedText("text", text.shards, process, None)


def test_who_waits_for_another_process_is_told_what_it_failed_of(tmp_path, monkeypatch):
    source = tmp_path / "a.jsonl"
    rows(source, 100)
    source.write_text(source.read_text() + "[1]\n" * 100)
    with opened(str(source)) as text:
        other = follower(text, monkeypatch, os.getpid())
        with pytest.raises(ConfigError, match=r"a.jsonl, line \d+ holds a list, not an object"):
            other.need(0, 0, 1000)


def test_a_process_that_packs_no_more_is_told(tmp_path, monkeypatch):
    with opened(rows(tmp_path / "a.jsonl")) as text:
        taken(text, 1)
        monkeypatch.setattr(stream_module, "is_alive", lambda process: False)
        with pytest.raises(
            ConfigError, match="is no longer packed: process 12345, which does so on this node, is gone"
        ):
            follower(text, monkeypatch, 12345).need(0, 10_000, 1)
        monkeypatch.setattr(stream_module, "is_alive", lambda process: True)
        monkeypatch.setattr(stream_module, "PATIENCE_S", 0.0)
        with pytest.raises(ConfigError, match="has said nothing for 0 minutes"):
            follower(text, monkeypatch, 12345).need(0, 10_000, 1)


def test_a_thread_that_fails_of_something_else_is_told(tmp_path, monkeypatch):
    def fails(*_):
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr(shards_module.Reader, "sequences", fails)
    with (
        opened(rows(tmp_path / "a.jsonl")) as text,
        pytest.raises(ConfigError, match="ZeroDivisionError: of all things"),
    ):
        text.need(0, 0, 1)


def test_too_little_text_is_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "few"}) + "\n")
    with (
        opened(str(tmp_path / "a.jsonl")) as text,
        pytest.raises(ConfigError, match="shorter than one sequence") as told,
    ):
        text.need(0, 0, 1)
    assert len(told.value.problems) == 1
    with pytest.raises(ConfigError, match=r"data\.max_tokens = 31"):
        opened(str(tmp_path / "a.jsonl"), max_tokens=31)


def test_each_shard_is_checked_before_it_is_used(tmp_path):
    checked = []
    with opened(rows(tmp_path / "a.jsonl")) as text:
        text.check = lambda sequences: checked.append(sequences.shape)
        taken(text, 20)
        taken(text, 20)
    assert checked == [(SIZE, LENGTH)] * 3


def empty_rows(path):
    """(40 rows, every fifth of them null, "" or white space, as a file; what is to be said of its training part)."""
    texts = [[None, "", " \n"][i // 5 % 3] if i % 5 == 0 else f"row {i} of text " * 9 for i in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    held_out = [span.document.data.decode() for span in training_source(config(str(path))).spans("held-out")]
    blank = sum(not text.strip() for text in held_out)
    return str(path), f"{8 - blank} of {40 - len(held_out)} rows are empty"


def test_empty_rows_are_counted_and_said_once(tmp_path, caplog):
    source, expected = empty_rows(tmp_path / "a.jsonl")
    caplog.set_level("INFO", "flipproof")
    with opened(source) as text:
        text.need(0, 0, 1000)  # all of it, more than once
        text.batch(0, 0, 1000)
    of_stream = [message for message in caplog.messages if "rows are empty" in message]
    assert of_stream == [f"data source {source!r}, its training part: {expected}"]
    caplog.clear()
    as_packed(source)
    assert [message for message in caplog.messages if expected in message] == of_stream
    caplog.clear()
    with opened(rows(tmp_path / "b.jsonl")) as text:
        text.need(0, 0, 1000)
    as_packed(str(tmp_path / "b.jsonl"))
    assert "rows are empty" not in caplog.text


def test_a_row_without_the_column_ends_a_stream(tmp_path):
    source = tmp_path / "a.jsonl"
    rows(source, 100)
    source.write_text(source.read_text() + '{"body": "b"}\n' * 20)
    with opened(str(source)) as text, pytest.raises(ConfigError) as told:
        text.need(0, 0, 10_000)
    (line,) = told.value.problems
    assert "a.jsonl, line 1" in line
    assert "has the columns body" in line


# -- the Hub -----------------------------------------------------------------------------------------------------------


def hub(monkeypatch, found):
    def load_dataset(name, subset, split, revision, streaming):
        assert (name, subset, split, revision, streaming) == ("org/data", None, "train", None, True)
        return found

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_hub_data_are_streamed(tmp_path, monkeypatch):
    source = rows(tmp_path / "a.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    hub(monkeypatch, datasets.Dataset.from_list(lines).to_iterable_dataset(num_shards=4))
    expected = as_packed(source)
    with opened("org/data") as text:
        assert multiset(taken(text, len(expected))) == multiset(expected)
    held_out = load_held_out(config("org/data"), byte_tokenizer(), LENGTH).sequences
    np.testing.assert_array_equal(
        held_out, load_held_out(DataConfig(source=source), byte_tokenizer(), LENGTH).sequences
    )
    other = datasets.Dataset.from_list(lines[1:]).to_iterable_dataset()
    signature = HubStream("org/data", "text", Choice()).signature("training")
    assert signature == HubStream("org/data", "text", Choice()).signature("training")
    hub(monkeypatch, other)
    assert signature != HubStream("org/data", "text", Choice()).signature("training")
    with pytest.raises(ConfigError, match="'org/data' has the columns text"):
        opened("org/data", text_column="body")


def test_a_row_of_the_hub_without_the_column_is_named(monkeypatch):
    lines = [{"text": f"row {number} " * 20} for number in range(100)] + [{"body": "b", "id": 1}]
    hub(monkeypatch, datasets.IterableDataset.from_generator(lambda: iter(lines)))
    with opened("org/data") as text, pytest.raises(ConfigError) as told:
        text.need(0, 0, 10_000)
    (line,) = told.value.problems
    assert line.startswith("data.text_column = 'text': org/data, row 100 has the columns body, id; ")


def test_a_network_that_goes_is_one_line(monkeypatch):
    def generate():
        for number in range(300):
            yield {"text": f"row {number} " * 20}
        raise ConnectionError("no route\nto host")

    hub(monkeypatch, datasets.IterableDataset.from_generator(generate))
    with opened("org/data") as text, pytest.raises(ConfigError) as told:
        text.need(0, 0, 10_000)
    assert told.value.problems == ["data source 'org/data' cannot be read on after 300 rows (no route to host)"]
