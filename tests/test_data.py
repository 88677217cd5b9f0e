import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flipproof.config import ConfigError, DataConfig
from flipproof.data import load_held_out, load_text, training_indices
from flipproof.model import byte_tokenizer

DOCUMENTS = [f"document {i}: " + "abcdefghij\n" * (20 + i) for i in range(12)]


@pytest.fixture
def sources(tmp_path):
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(DOCUMENTS):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t, "n": 1}) + "\n" for t in DOCUMENTS))
    pq.write_table(pa.table({"text": DOCUMENTS}), tmp_path / "a.parquet")
    return {"txt": tmp_path / "texts", "jsonl": tmp_path / "a.jsonl", "parquet": tmp_path / "a.parquet"}


def test_every_format_gives_the_same_packed_sequences(sources):
    tokenizer = byte_tokenizer()
    packed = {kind: load_text(DataConfig(source=str(path)), tokenizer, 64) for kind, path in sources.items()}
    for train, held_out in packed.values():
        np.testing.assert_array_equal(train.sequences, packed["txt"][0].sequences)
        np.testing.assert_array_equal(held_out.sequences, packed["txt"][1].sequences)


def test_packing_loses_and_invents_nothing(sources):
    tokenizer = byte_tokenizer()
    train, held_out = load_text(DataConfig(source=str(sources["txt"])), tokenizer, 64)
    flat = np.concatenate([held_out.sequences, train.sequences]).reshape(-1)
    ends = np.flatnonzero(flat == tokenizer.eos_token_id)
    documents = [tokenizer.decode(ids[ids != 256]) for ids in np.split(flat, ends + 1)]
    assert set(documents[:-1]) <= set(DOCUMENTS)
    assert len(documents) == len(set(documents)) == len(DOCUMENTS)
    total = sum(len(d.encode()) + 1 for d in DOCUMENTS)
    assert total - 64 < flat.size <= total


def test_held_out_text_does_not_depend_on_the_length_of_the_run(sources):
    config = DataConfig(source=str(sources["txt"]), held_out_tokens=128)
    train, held_out = load_text(config, byte_tokenizer(), 64)
    assert len(held_out) == 2
    for needed in (0, 1, 7, 1000):
        part, same = load_text(config, byte_tokenizer(), 64, needed)
        np.testing.assert_array_equal(same.sequences, held_out.sequences)
        np.testing.assert_array_equal(part.sequences, train.sequences[: len(part)])
        assert min(needed, len(train)) <= len(part)
    assert len(load_text(config, byte_tokenizer(), 64, 30)[0]) == 30
    np.testing.assert_array_equal(load_held_out(config, byte_tokenizer(), 64).sequences, held_out.sequences)


def test_no_more_than_a_tenth_is_held_out(sources):
    train, held_out = load_text(DataConfig(source=str(sources["txt"])), byte_tokenizer(), 64)
    assert len(held_out) == (len(train) + len(held_out)) * 64 // 10 // 64


def test_evaluation_text_of_its_own_leaves_the_source_whole(sources, tmp_path):
    (tmp_path / "eval.txt").write_text("something else " * 50)
    whole = DataConfig(source=str(sources["txt"]), eval_source=str(tmp_path / "eval.txt"))
    train, held_out = load_text(whole, byte_tokenizer(), 64)
    split_train, split_held_out = load_text(DataConfig(source=str(sources["txt"])), byte_tokenizer(), 64)
    assert len(train) == len(split_train) + len(split_held_out)
    assert byte_tokenizer().decode(held_out.sequences[0]).startswith("something else")


def test_max_tokens_is_kept():
    train, held_out = load_text(DataConfig(source="stdlib", max_tokens=10_000), byte_tokenizer(), 100)
    assert (len(train) + len(held_out)) * 100 == 10_000


def test_the_standard_library_is_source_code():
    train, _ = load_text(DataConfig(source="stdlib", max_tokens=200_000), byte_tokenizer(), 256)
    text = byte_tokenizer().decode(train.sequences.reshape(-1))
    assert text.count("def ") > 100
    assert text.count("self.") > 100


def test_each_epoch_shows_every_sequence_once_in_an_order_of_its_own():
    first, second = training_indices(10, 0, 0, 10), training_indices(10, 0, 10, 10)
    assert sorted(first) == sorted(second) == list(range(10))
    assert list(first) != list(second)
    assert list(training_indices(10, 1, 0, 10)) != list(first)


def test_any_part_of_the_order_can_be_asked_for_alone():
    whole = training_indices(7, 3, 0, 30)
    for start, count in ((0, 1), (5, 4), (13, 17)):
        np.testing.assert_array_equal(training_indices(7, 3, start, count), whole[start : start + count])


def bad(words, tokenizer=None, seq_len=64, **config):
    with pytest.raises(ConfigError) as error:
        load_text(DataConfig(**config), tokenizer or byte_tokenizer(), seq_len)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_bad_sources_are_named(tmp_path, sources):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    (tmp_path / "short.txt").write_text("hello")
    (tmp_path / "one.txt").write_text("x" * 100)
    (tmp_path / "odd.csv").write_text("a,b")
    (tmp_path / "broken.parquet").write_text("no parquet")
    bad(["empty.txt", "no text"], source=str(tmp_path / "empty.txt"))
    bad(["blank.jsonl", "no text"], source=str(tmp_path / "blank.jsonl"))
    bad(["short.txt", "6 tokens", "training.seq_len = 64"], source=str(tmp_path / "short.txt"))
    bad(["one.txt", "does not divide", "data.eval_source"], source=str(tmp_path / "one.txt"))
    bad(["odd.csv", ".txt, .jsonl or .parquet", ".csv"], source=str(tmp_path / "odd.csv"))
    bad(["broken.parquet", "cannot be read"], source=str(tmp_path / "broken.parquet"))
    bad(["text_column = 'body'", "text, n"], source=str(sources["jsonl"]), text_column="body")
    bad(["'no/such-data'", "local file or folder", "stdlib"], source="no/such-data")
