import json
import os
import subprocess
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flipproof import data
from flipproof.config import DataConfig
from flipproof.data import load_held_out, load_text, training_indices
from flipproof.errors import ConfigError
from flipproof.model import byte_tokenizer

DOCUMENTS = [f"document {i}: " + "abcdefghij\n" * (20 + i) for i in range(12)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for each test; where the packed files of this one are."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "flipproof"


@pytest.fixture
def tokenised(monkeypatch):
    """How many texts each call of a tokenizer was given."""
    calls = []
    kind = type(byte_tokenizer())
    call = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, texts, **kw: calls.append(len(texts)) or call(self, texts, **kw))
    return calls


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


@pytest.mark.parametrize("limit", [None, 900])
def test_tokens_are_those_of_each_text_in_the_order_of_a_fixed_seed(sources, monkeypatch, tokenised, limit):
    monkeypatch.setattr(data, "_BATCH_CHARACTERS", 700)
    config = DataConfig(source=str(sources["txt"]), eval_source=str(sources["jsonl"]), max_tokens=limit)
    train, held_out = load_text(config, byte_tokenizer(), 1)
    assert len(tokenised) >= 4  # two batches or more of each source
    order = np.random.Generator(np.random.Philox(key=0)).permutation(len(DOCUMENTS))
    expected = [token for i in order for token in [*byte_tokenizer().encode(DOCUMENTS[i]), 256]][:limit]
    assert train.sequences.reshape(-1).tolist() == held_out.sequences.reshape(-1).tolist() == expected


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


def files(cache):
    return sorted(path for path in cache.iterdir() if path.suffix != ".lock")


def test_tokens_are_packed_once_and_mapped_read_only(sources, cache, tokenised):
    config = DataConfig(source=str(sources["txt"]))
    first = load_text(config, byte_tokenizer(), 64)
    assert sum(tokenised) == len(DOCUMENTS)
    second = load_text(config, byte_tokenizer(), 64)
    other_length = load_text(config, byte_tokenizer(), 32)
    assert sum(tokenised) == len(DOCUMENTS)
    assert len(files(cache)) == 1
    for text, again in zip(first, second, strict=True):
        np.testing.assert_array_equal(text.sequences, again.sequences)
        assert isinstance(again.sequences, np.memmap)
        assert again.sequences.dtype == np.int32
        assert not again.sequences.flags.writeable
    flat = np.concatenate([text.sequences.reshape(-1) for text in reversed(first)])
    shorter = np.concatenate([text.sequences.reshape(-1) for text in reversed(other_length)])
    np.testing.assert_array_equal(flat, shorter[: flat.size])


def test_what_a_tokenizer_was_last_called_with_is_not_part_of_the_key(sources, cache):
    tokenizer = byte_tokenizer()
    load_text(DataConfig(source=str(sources["txt"])), tokenizer, 64)
    tokenizer(["ab", "c"], padding=True, truncation=True, max_length=1)
    load_text(DataConfig(source=str(sources["txt"])), tokenizer, 64)
    assert len(files(cache)) == 1


def test_a_tokenizer_in_python_has_a_key_too(sources, cache):
    from transformers import ByT5Tokenizer

    first, second = (load_text(DataConfig(source=str(sources["txt"])), ByT5Tokenizer(), 64)[0] for _ in range(2))
    assert len(files(cache)) == 1
    np.testing.assert_array_equal(first.sequences, second.sequences)
    assert ByT5Tokenizer().decode(second.sequences[0]).count("abcdefghij") > 3


def test_whatever_the_tokens_depend_on_gives_other_tokens(tmp_path, cache):
    def write(text):
        (tmp_path / "a.jsonl").write_text(json.dumps({"text": text, "other": "x" * 400}) + "\n")

    def tokens(tokenizer=None, **config):
        config = DataConfig(source=str(tmp_path / "a.jsonl"), eval_source=str(tmp_path / "a.jsonl"), **config)
        return load_text(config, tokenizer or byte_tokenizer(), 1)[0].sequences.reshape(-1).tolist()

    def ids(text):
        return byte_tokenizer().encode(text)

    write("a" * 400)
    assert tokens() == [*ids("a" * 400), 256]
    write("b" * 400)
    assert tokens() == [*ids("b" * 400), 256]
    assert tokens(text_column="other") == [*ids("x" * 400), 256]
    assert tokens(max_tokens=100) == ids("b" * 100)
    assert tokens(max_tokens=101) == ids("b" * 101)
    endless, other_end, merging = byte_tokenizer(), byte_tokenizer(), byte_tokenizer()
    endless.eos_token = None
    assert tokens(endless) == ids("b" * 400)
    other_end.eos_token = "<|pad|>"
    assert tokens(other_end) == [*ids("b" * 400), 257]
    merging.add_tokens("bb")
    assert tokens(merging) == [258] * 200 + [256]
    assert tokens() == [*ids("b" * 400), 256]
    assert len(files(cache)) == 8


PROCESS = """
import hashlib, logging, sys
from flipproof.config import DataConfig
from flipproof.data import load_text
from flipproof.model import byte_tokenizer
from flipproof.runlog import logger

tokenizer, texts = byte_tokenizer(), 0
call = type(tokenizer).__call__

def counted(self, batch, **kw):
    global texts
    if texts == 0:
        sys.stdin.readline()
    texts += len(batch)
    return call(self, batch, **kw)

type(tokenizer).__call__ = counted
logger.addHandler(logging.StreamHandler(sys.stdout))
logger.setLevel(logging.INFO)
for source in (sys.argv[1], "stdlib"):
    train, held_out = load_text(DataConfig(source=source, max_tokens=100_000), tokenizer, 64)
    digest = hashlib.sha256(held_out.sequences.tobytes() + train.sequences.tobytes()).hexdigest()
    print("got", texts, digest, flush=True)
"""


def test_processes_at_once_pack_once(sources, cache):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(sources["txt"])],
            # a key that depends on the process would show as another file
            env={**os.environ, "HF_DATASETS_CACHE": str(cache.parent), "PYTHONHASHSEED": str(seed)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in (1, 2)
    ]
    # No tokenizer goes on before both have found no file: without the lock both would pack.
    for process in processes:
        assert "is tokenised into" in process.stdout.readline()
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate()[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    got = [[line.split()[1:] for line in output if line.startswith("got")] for output in outputs]
    assert [digest for _, digest in got[0]] == [digest for _, digest in got[1]]
    assert sorted(int(texts) for (texts, _), _ in got) == [0, len(DOCUMENTS)]
    assert [path.suffix for path in files(cache)] == [".npy", ".npy"]


@pytest.mark.parametrize("size", [0, 10, 128, 1000, -4, +4])
def test_a_damaged_file_is_packed_anew(sources, cache, tokenised, size):
    config = DataConfig(source=str(sources["txt"]))
    expected = np.array(load_text(config, byte_tokenizer(), 64)[0].sequences)
    (path,) = files(cache)
    whole = path.read_bytes()
    os.truncate(path, size if size not in (-4, 4) else len(whole) + size)
    np.testing.assert_array_equal(load_text(config, byte_tokenizer(), 64)[0].sequences, expected)
    assert sum(tokenised) == 2 * len(DOCUMENTS)
    assert files(cache) == [path]
    assert path.read_bytes() == whole


def test_what_fails_leaves_no_file_and_is_not_remembered(tmp_path, sources, cache, monkeypatch):
    (tmp_path / "broken.parquet").write_text("no parquet")
    (tmp_path / "blank.txt").write_text(" \n")
    for name in ("broken.parquet", "blank.txt"):
        for _ in range(2):
            bad([name], source=str(tmp_path / name))
            assert files(cache) == []

    kind, calls = type(byte_tokenizer()), []
    call = kind.__call__

    def failing(self, texts, **kw):
        calls.append(texts)
        if len(calls) == 3:
            raise RuntimeError("the third batch")
        return call(self, texts, **kw)

    monkeypatch.setattr(kind, "__call__", failing)
    monkeypatch.setattr(data, "_BATCH_CHARACTERS", 700)
    with pytest.raises(RuntimeError, match="third"):
        load_text(DataConfig(source=str(sources["txt"])), byte_tokenizer(), 64)
    assert files(cache) == []
    assert len(load_text(DataConfig(source=str(sources["txt"])), byte_tokenizer(), 64)[0]) > 1


def test_a_cache_that_cannot_be_written_is_named(tmp_path, sources, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    bad([str(tmp_path / "file" / "flipproof"), "HF_DATASETS_CACHE"], source=str(sources["txt"]))
    bad([str(tmp_path / "file" / "flipproof"), "HF_DATASETS_CACHE"], source="stdlib")


def test_the_column_is_of_no_matter_to_text_files(sources):
    train, _ = load_text(DataConfig(source=str(sources["txt"]), text_column="body"), byte_tokenizer(), 64)
    np.testing.assert_array_equal(
        train.sequences, load_text(DataConfig(source=str(sources["txt"])), byte_tokenizer(), 64)[0].sequences
    )
