import json
import os
import subprocess
import sys

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from flipproof.config import DataConfig
from flipproof.data import packing
from flipproof.data.document import TextFile
from flipproof.data.sequences import load_held_out, load_text
from flipproof.data.source import LocalFiles
from flipproof.data.tokens import beginning
from flipproof.errors import ConfigError
from flipproof.models.load import byte_tokenizer

DOCUMENTS = [f"document {i}: " + "abcdefghij\n" * (20 + i) for i in range(12)]


@pytest.fixture
def source(tmp_path):
    """A folder of text files."""
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(DOCUMENTS):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(text)
    return str(tmp_path / "texts")


def whole(source, tokenizer=None, seq_len=1, **config):
    """All tokens of a source."""
    config = DataConfig(eval_source=str(source), **config)
    return load_held_out(config, tokenizer or byte_tokenizer(), seq_len).sequences.reshape(-1).tolist()


def bad(words, tokenizer=None, seq_len=64, **config):
    with pytest.raises(ConfigError) as error:
        load_text(DataConfig(**config), tokenizer or byte_tokenizer(), seq_len)
    assert all(word in str(error.value) for word in words), str(error.value)


def files(cache):
    return sorted(path for path in cache.glob("*") if path.suffix != ".lock")


def test_tokens_are_packed_once_and_mapped_read_only(source, cache, tokenised):
    config = DataConfig(source=source)
    first = load_text(config, byte_tokenizer(), 64)
    assert sum(tokenised) == len(DOCUMENTS)
    second = load_text(config, byte_tokenizer(), 64)
    other_length = load_text(config, byte_tokenizer(), 32)
    assert sum(tokenised) == len(DOCUMENTS)
    assert len(files(cache)) == 2
    for text, again in zip(first, second, strict=True):
        np.testing.assert_array_equal(text.sequences, again.sequences)
        assert isinstance(again.sequences, np.memmap)
        assert again.sequences.dtype == np.int32
        assert not again.sequences.flags.writeable
    for text, other in zip(first, other_length, strict=True):
        flat = text.sequences.reshape(-1)
        np.testing.assert_array_equal(flat, other.sequences.reshape(-1)[: flat.size])


def test_what_a_tokenizer_was_last_called_with_is_not_part_of_the_key(source, cache):
    tokenizer = byte_tokenizer()
    load_text(DataConfig(source=source), tokenizer, 64)
    tokenizer(["ab", "c"], padding=True, truncation=True, max_length=1)
    load_text(DataConfig(source=source), tokenizer, 64)
    assert len(files(cache)) == 2


def test_a_tokenizer_in_python_has_a_key_too(source, cache):
    from transformers import ByT5Tokenizer

    first, second = (whole(source, ByT5Tokenizer()) for _ in range(2))
    assert len(files(cache)) == 1
    assert first == second
    # it ends a text by itself: an end-of-text token all the same is there once
    assert sorted(ByT5Tokenizer().decode(first).split("</s>")) == sorted([*DOCUMENTS, ""])


def test_whatever_the_tokens_depend_on_gives_other_tokens(tmp_path, cache):
    path = tmp_path / "a.jsonl"

    def write(text):
        before = path.stat() if path.exists() else None
        path.write_text(json.dumps({"text": text, "other": "x" * 400}) + "\n")
        if before:  # as rsync and cp -p keep it
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    def ids(text):
        return byte_tokenizer().encode(text)

    write("a" * 400)
    assert whole(path) == [*ids("a" * 400), 256]
    write("b" * 400)
    assert whole(path) == [*ids("b" * 400), 256]
    assert whole(path, text_column="other") == [*ids("x" * 400), 256]
    assert whole(path, max_tokens=100) == ids("b" * 100)
    assert whole(path, max_tokens=101) == ids("b" * 101)
    endless, other_end, merging = byte_tokenizer(), byte_tokenizer(), byte_tokenizer()
    endless.eos_token = None
    assert whole(path, endless) == ids("b" * 400)
    other_end.eos_token = "<|pad|>"
    assert whole(path, other_end) == [*ids("b" * 400), 257]
    merging.add_tokens("bb")
    assert whole(path, merging) == [258] * 200 + [256]
    assert whole(path) == [*ids("b" * 400), 256]
    assert len(files(cache)) == 8


PROCESS = """
import hashlib, logging, sys
from flipproof.config import DataConfig
from flipproof.data.sequences import load_text
from flipproof.models.load import byte_tokenizer
from flipproof.log import logger

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


def test_processes_at_once_pack_once(source, cache):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, source],
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
    # each once, by whichever comes first to the file of the training part and to that of the held-out one
    assert sum(int(texts) for (texts, _), _ in got) == len(DOCUMENTS)
    assert [path.suffix for path in files(cache)] == [".npy"] * 4


def cut_to(size):
    return lambda file, length: file.truncate(size if size >= 0 else length + size)


def longer(file, length):
    file.truncate(length + 4)


def flip_a_bit(file, length):
    file.seek(length // 2)
    byte = file.read(1)[0]
    file.seek(length // 2)
    file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("damage", [*map(cut_to, (0, 10, 128, 1000, -4)), longer, flip_a_bit])
def test_a_damaged_file_is_packed_anew(source, cache, tokenised, caplog, damage):
    config = DataConfig(source=source)
    expected = np.array(load_text(config, byte_tokenizer(), 64)[0].sequences)
    paths = files(cache)
    before = [path.read_bytes() for path in paths]
    for path, content in zip(paths, before, strict=True):
        with path.open("r+b") as file:
            damage(file, len(content))
    np.testing.assert_array_equal(load_text(config, byte_tokenizer(), 64)[0].sequences, expected)
    assert sum(tokenised) == 2 * len(DOCUMENTS)
    assert caplog.text.count("is damaged: its text is tokenised anew") >= len(paths)
    assert files(cache) == paths
    assert [path.read_bytes() for path in paths] == before


def test_what_fails_leaves_no_file_and_is_not_remembered(tmp_path, source, cache, monkeypatch):
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
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 700)
    with pytest.raises(RuntimeError, match="third"):
        load_text(DataConfig(source=source), byte_tokenizer(), 64)
    assert [path.suffix for path in files(cache)] == [".npy"]  # the held-out part, which was one batch
    assert len(load_text(DataConfig(source=source), byte_tokenizer(), 64)[0]) > 1


def test_a_cache_that_cannot_be_written_is_named(tmp_path, source, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    bad([str(tmp_path / "file" / "flipproof"), "HF_DATASETS_CACHE"], source=source)
    bad([str(tmp_path / "file" / "flipproof"), "HF_DATASETS_CACHE"], source="stdlib")


def with_template(template, **special):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(special)
    tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|endoftext|>", *special.values())]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=tokens)
    return tokenizer


def texts(tmp_path, *found):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in found))
    return path


def test_each_document_and_each_sequence_begins_as_the_tokenizer_begins_a_text(tmp_path, caplog):
    tokenizer = with_template("<bos> $A", bos_token="<bos>")
    path = texts(tmp_path, "abcdefg" * 3, "hij", "k" * 50)
    order = np.random.Generator(np.random.Philox(key=0)).permutation(3)
    documents = [(["abcdefg" * 3, "hij", "k" * 50])[i] for i in order]
    # an independent packing, by string
    stream, expected = "".join(f"^{document}$" for document in documents), []
    while stream:
        expected.append(stream[:16] if stream.startswith("^") else "^" + stream[:15])
        stream = stream[len(expected[-1]) - (not stream.startswith("^")) :]
    expected = [sequence for sequence in expected if len(sequence) == 16]
    with caplog.at_level("INFO", "flipproof"):
        sequences = load_held_out(DataConfig(eval_source=str(path)), tokenizer, 16).sequences
    decoded = [tokenizer.decode(ids).replace("<bos>", "^").replace("<|endoftext|>", "$") for ids in sequences]
    assert decoded == expected
    assert len(expected) >= 4
    assert [r.getMessage() for r in caplog.records if "data.bos" in r.getMessage()] == [
        "data.bos: each document and each sequence begins with <bos>"
    ]
    # as many sequences as are asked for, and a cache that knows of the length
    assert [len(load_held_out(DataConfig(eval_source=str(path)), tokenizer, n).sequences) for n in (16, 8)] == [
        len(expected), len(whole(path, tokenizer, 8)) // 8
    ]  # fmt: skip


def test_both_parts_begin_so_in_any_batches(source, monkeypatch):
    tokenizer = with_template("<bos> $A", bos_token="<bos>")
    parts = load_text(DataConfig(source=source), tokenizer, 32, 40)
    assert len(parts[0]) == 40
    for part in parts:
        assert (part.sequences[:, 0] == 258).all()
        assert not ((part.sequences[:, 1:] == 258) & (part.sequences[:, :-1] == 258)).any()
        after_ends = part.sequences[:, 1:][part.sequences[:, :-1] == 256]
        assert (after_ends == 258).all()
    monkeypatch.setattr(packing, "_PACKING", "another key")
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 100)
    for part, other in zip(parts, load_text(DataConfig(source=source), tokenizer, 32, 40), strict=True):
        np.testing.assert_array_equal(part.sequences, other.sequences)


def test_bos_can_be_asked_for_and_left_out(tmp_path):
    path = texts(tmp_path, "abc")
    adds, has = with_template("<bos> $A", bos_token="<bos>"), with_template("$A", bos_token="<bos>")
    a, b, c = byte_tokenizer().encode("abc")
    assert (
        whole(path, adds, 5) == whole(path, adds, 5, bos=True) == whole(path, has, 5, bos=True) == [258, a, b, c, 256]
    )
    assert whole(path, adds, bos=False) == whole(path, has) == whole(path, has, bos=False) == [a, b, c, 256]
    assert whole(path, byte_tokenizer(), bos=False) == whole(path) == [a, b, c, 256]


def test_a_vocabulary_without_letters_has_a_beginning_too():
    def tokenizer(**special):
        model = models.BPE({"A": 0, "C": 1, "G": 2, "T": 3, "</s>": 4, "<s>": 5}, [])
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="</s>", **special)

    begins = tokenizer(bos_token="<s>")
    special = [("<s>", 5), ("</s>", 4)]
    begins.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    assert beginning(None, begins) == [5]
    assert beginning(None, tokenizer()) == beginning(None, tokenizer(bos_token="<s>")) == []


def test_no_token_of_a_beginning_or_an_end_is_doubled(tmp_path):
    a, b = byte_tokenizer().encode("ab")
    for template, special, text, expected in (
        ("<bos> $A <|endoftext|>", {"bos_token": "<bos>"}, "ab", [258, a, b, 256]),
        ("$A <|endoftext|>", {}, "ab", [a, b, 256]),
        ("<bos> $A", {"bos_token": "<bos>"}, "<bos>ab<|endoftext|>", [258, a, b, 256]),
        ("$A", {}, "ab<|endoftext|>", [a, b, 256]),
        ("<|endoftext|> $A", {"bos_token": "<|endoftext|>"}, "ab", [256, a, b, 256]),  # as OPT
        ("<mask> <sop> $A", {"bos_token": "<sop>", "mask_token": "<mask>"}, "ab", [259, 258, a, b, 256]),  # as GLM
    ):
        tokenizer = with_template(template, **special)
        assert whole(texts(tmp_path, text), tokenizer, len(expected)) == expected
        if template.startswith("<|end"):
            expected = [*expected, a, b, 256]
            assert whole(texts(tmp_path, text, text), tokenizer, len(expected)) == expected


def test_a_sequence_longer_than_its_beginning_is_asked_for(tmp_path):
    tokenizer = with_template("<mask> <sop> $A", bos_token="<sop>", mask_token="<mask>")
    with pytest.raises(ConfigError, match=r"training.seq_len = 2: each sequence begins with 2 tokens \(data.bos\)"):
        whole(texts(tmp_path, "abcdef"), tokenizer, 2)


def test_a_file_system_without_locks_packs_all_the_same(source, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise NotImplementedError("no flock here")

    monkeypatch.setattr(packing.FileLock, "acquire", refuse)
    assert len(whole(source)) == sum(len(text) + 1 for text in DOCUMENTS)


def test_the_cache_is_tried_before_any_text_is_read(tmp_path, source, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    monkeypatch.setattr(LocalFiles, "spans", None)
    monkeypatch.setattr(datasets, "load_dataset", None)
    for name in (source, "org/data"):
        bad([str(tmp_path / "file" / "flipproof"), "HF_DATASETS_CACHE"], source=name)


def test_a_text_that_cannot_be_read_is_not_the_cache_s_fault(tmp_path, source, monkeypatch):
    def refuse(self, start, end):
        raise ConfigError([f"{self.path.name} cannot be read"])

    monkeypatch.setattr(TextFile, "read", refuse)
    bad(["txt cannot be read"], source=source)


def test_a_full_disk_is_named_and_leaves_nothing(source, cache, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    bad(["No space left on device", str(cache), "HF_DATASETS_CACHE"], source=source)
    assert [path for path in cache.iterdir() if path.suffix != ".lock"] == []
