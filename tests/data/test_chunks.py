"""Tokens from chunks are those of the whole text, or there are none."""

import os
import random
import signal
import subprocess

import numpy as np
import pytest
from small_tokenizers import GPT2, LINES, text, trained
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from flipproof.data import chunks, workers
from flipproof.data import tokens as tokens_module
from flipproof.data.chunks import _CHUNK, _CUT, Chunks, chunks_of
from flipproof.data.document import Piece
from flipproof.data.tokens import Tokens
from flipproof.errors import ConfigError
from flipproof.models.load import byte_tokenizer

ODD = [*" \n\taB9é文.,'_(<’", "  ", "\r\n", "12", "\u00a0", "\u2028", "\u0301"]


def mixed(seed, pieces=3000):
    """White space, letters and punctuation in every order."""
    return "".join(random.Random(seed).choices([*ODD, *LINES], [4] * len(ODD) + [1] * len(LINES), k=pieces))


def test_chunks_are_the_text_cut_wherever_two_characters_are_a_cut():
    for seed in range(20):
        whole = mixed(seed)
        expected, last = [], 0
        for at in range(1, len(whole)):
            if _CUT.match(whole[at - 1 : at + 1]):
                expected.append(whole[last:at])
                last = at
        assert _CHUNK.findall(whole) == [*expected, whole[last:], ""]
    letters, ends = "az09AZ", ' \n\r\t!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~'
    assert all(_CUT.fullmatch(a) is None and _CUT.match(a + b) for a in letters for b in ends)
    assert [a + b for a in "az.é文'" for b in "'b é\u0301\u00a0" if _CUT.match(a + b)] == [a + " " for a in "az.é文'"]


def encoded(known, texts, begin):
    return [ids.tolist() for ids in known.encode(texts, [begin] * len(texts))]


@pytest.mark.parametrize("kind", ["gpt2", "gpt2-prefix", "llama3", "llama2", "metaspace-first", "gemma", "bytes"])
def test_chunks_have_the_tokens_of_the_whole(kind):
    tokenizer = byte_tokenizer() if kind == "bytes" else trained(kind, apart=True)
    known = chunks_of(tokenizer)
    assert known is not None
    for seed in range(5):
        texts = [text(200, seed), mixed(seed), "", "word"]
        expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
        assert encoded(known, texts, True) == expected
        middle = [" " + t for t in texts]
        context = tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = tokenizer(["a" + t for t in middle], add_special_tokens=False)["input_ids"]
        assert [context + ids for ids in encoded(known, middle, False)] == whole


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(chunks, "_KEPT", 500)
    tokenizer = trained("gpt2")
    known, sizes = Chunks(tokenizer.backend_tokenizer), []
    for seed in range(30):
        whole = text(10, seed)
        assert encoded(known, [whole], True) == [tokenizer(whole, add_special_tokens=False)["input_ids"]]
        sizes.append(sum(map(len, known._tokens)))
    assert max(sizes) < 500 + 2 * len(text(10))
    assert sizes != sorted(sizes)


def byte_level(pattern, lines, **trainer):
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, **trainer))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_added_tokens_are_found_in_chunks_too():
    tokenizer = byte_level(GPT2, LINES)
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True), AddedToken("two words"), AddedToken("\n\n")])
    tokenizer.add_tokens([AddedToken("right", rstrip=True), AddedToken("<left>", lstrip=True)])
    tokenizer.add_tokens([AddedToken("foo", single_word=True)])
    texts = ["a <|im_start|>user\n\nsays two words", "go right  on <left> foo_bar foo.bar foo", "a b, c"]
    known = chunks_of(tokenizer)
    assert encoded(known, texts, True) == tokenizer(texts, add_special_tokens=False)["input_ids"]


def test_a_vocabulary_that_lies_across_has_no_chunks():
    lines = ["the cat sat on the mat. the cat sat. " * 20]
    assert chunks_of(byte_level(r"\w+ ?|\W", lines)) is None  # tokens such as "the "
    assert chunks_of(byte_level(r"[^ ]+| ", lines)) is None  # "mat."
    for kind in ("llama2", "gemma", "t5"):
        assert chunks_of(trained(kind)) is None
    assert chunks_of(trained("wordpiece")) is None
    assert chunks_of(ByT5Tokenizer()) is None
    dropout = trained("gpt2")
    dropout.backend_tokenizer.model.dropout = 0.5
    assert chunks_of(dropout) is None


def pieces_of(whole):
    cut = len(whole) // 3
    at = whole.index(" ", cut)
    return [[Piece(whole[:at], True, False)], [Piece(whole[at:], False, True)], [Piece(whole, True, True)]]


@pytest.mark.parametrize("kind", ["gpt2", "llama2", "t5"])
def test_packing_gives_the_same_tokens_by_chunks(monkeypatch, kind):
    tokenizer, batches = trained(kind, apart=True), pieces_of(text(600))
    start = tokenizer("<s>", add_special_tokens=False)["input_ids"]
    expected = np.concatenate(list(Tokens(tokenizer, start).of(batches)))
    used, encode = [], Chunks.encode
    monkeypatch.setattr(Chunks, "encode", lambda self, *a: used.append(1) or encode(self, *a))
    monkeypatch.setattr(tokens_module, "_LEARN", 1000)
    got = np.concatenate(list(Tokens(tokenizer, start).of(batches)))
    np.testing.assert_array_equal(got, expected)
    assert len(used) == (0 if kind == "t5" else 3)  # the first batch compared, the others taken


def test_a_first_batch_that_comes_out_otherwise_is_the_last_by_chunks(monkeypatch):
    tokenizer, batches = trained("gpt2"), pieces_of(text(600))
    expected = np.concatenate(list(Tokens(tokenizer, []).of(batches)))
    used = []
    monkeypatch.setattr(Chunks, "encode", lambda self, texts, begins: used.append(1) or [np.array([7])] * len(texts))
    monkeypatch.setattr(tokens_module, "_LEARN", 1000)
    np.testing.assert_array_equal(np.concatenate(list(Tokens(tokenizer, []).of(batches))), expected)
    assert len(used) == 1


def test_workers_give_the_same_tokens_in_order(monkeypatch):
    tokenizer = trained("gpt2")
    batches = [batch for seed in range(6) for batch in pieces_of(text(200, seed))]
    start = tokenizer("<s>", add_special_tokens=False)["input_ids"]
    expected = list(Tokens(tokenizer, start).of(batches))
    by_workers, encode = [], workers.encoded_by_workers
    for name, value in (("_LEARN", 100), ("_ALONE", 2), ("workers_here", lambda: 2)):
        monkeypatch.setattr(tokens_module, name, value)
    monkeypatch.setattr(tokens_module, "encoded_by_workers", lambda *a: by_workers.append(a[2]) or encode(*a))
    got = list(Tokens(tokenizer, start).of(batches))
    assert by_workers == [2]
    assert [ids.tolist() for ids in got] == [ids.tolist() for ids in expected]


def test_a_worker_that_is_killed_is_one_line(monkeypatch):
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    batches = (batch for _ in range(4) for batch in pieces_of(text(200)))
    done = workers.encoded_by_workers(trained("gpt2").backend_tokenizer, batches, 1)
    next(done)
    os.kill(started[0].pid, signal.SIGKILL)
    with pytest.raises(ConfigError, match=r"process that tokenises text has ended \(exit code -9\)"):
        list(done)
