from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from instructed import CHAT_TEMPLATE, rows_of, samples_in, tokenizer_with, write_rows

from flipproof.config import DataConfig
from flipproof.data.instruct import Encoder
from flipproof.data.samples import read, whole_rows
from flipproof.data.sequences import PackedText, load_held_out, load_text
from flipproof.data.source import open_source
from flipproof.errors import ConfigError

LENGTH = 48


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "flipproof"


def loaded(path, part="all", **config):
    config = DataConfig(source=str(path), eval_source=str(path) if part == "all" else None, **config)
    if part == "all":
        return load_held_out(replace(config, source="other.jsonl"), tokenizer_with(), LENGTH)
    return load_text(config, tokenizer_with(), LENGTH)


def as_lists(samples):
    return [(sample.ids.tolist(), sample.counts.tolist()) for sample in samples]


def source_samples(path, format="prompt_completion"):
    encoder = Encoder(format, tokenizer_with(), (), None, True)
    return as_lists(read(whole_rows(open_source(str(path), "text")), "all", encoder))


def without_padding(samples, of):
    """Packed samples as long as they are in the source; what is behind is padding, which counts for nothing."""
    sizes = {tuple(ids): len(ids) for ids, _ in of}
    out = []
    for ids, counts in samples:
        size = next(n for n in range(len(ids), 0, -1) if tuple(ids[:n]) in sizes)
        assert set(ids[size:]) <= {257}
        assert not any(counts[size:])
        out.append((ids[:size], counts[:size]))
    return out


@pytest.mark.parametrize("packing", [True, False])
def test_every_sample_is_whole_in_one_sequence(tmp_path, packing):
    path = write_rows(tmp_path / "rows.jsonl", rows_of("prompt_completion", 300))
    text, of = loaded(path, packing=packing), source_samples(path)
    found = without_padding(samples_in(text), of)
    assert sorted(found) == sorted(of)
    if packing:
        used = sum(len(ids) for ids, _ in of)
        assert len(text) < 1.1 * used / LENGTH
        places = [of.index(sample) for sample in found]
        assert max(abs(place - at) for at, place in enumerate(places)) < 300
    else:
        assert found == of
        assert len(text) == 300
    assert text.about.samples == 300
    assert text.about.trained_tokens == sum(sum(counts) for _, counts in of)
    assert text.trained_tokens(np.arange(len(text))).sum() == text.about.trained_tokens


def test_labels_and_positions_follow_from_the_marks(tmp_path):
    text = loaded(write_rows(tmp_path / "rows.jsonl", rows_of("prompt_completion", 40)))
    ids, labels, positions = text.batch(np.arange(len(text)))
    for row in range(len(text)):
        at = -1
        for i in range(LENGTH):
            at = 0 if text.marks[row, i] & 2 else at + 1
            assert positions[row, i] == at
            assert labels[row, i] == (ids[row, i] if text.marks[row, i] & 1 else -100)
    assert torch.equal(ids, torch.from_numpy(text.sequences.astype(np.int64)))
    assert loaded(tmp_path / "rows.jsonl", packing=False).batch(np.arange(2)).positions is None


@pytest.mark.parametrize("packing", [True, False])
def test_rows_without_their_padding(tmp_path, packing):
    """The token that pads is in no sample here."""
    text = loaded(write_rows(tmp_path / "rows.jsonl", rows_of("prompt_completion", 40)), packing=packing)
    every = np.arange(len(text))
    expected = (text.sequences != 257).sum(1)
    assert (text.sizes(every) == expected).all()
    assert expected.sum() < text.sequences.size
    for rows in (every[:1], every[2:5], every):
        whole, cut = text.batch(rows), text.without_padding(rows)
        for one, other in zip(whole, cut, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one[:, : expected[rows].max()], other)
    plain = PackedText(np.full((2, 8), 257, dtype=np.int32), "text of one token, which is no padding")
    assert plain.sizes(np.arange(2)).tolist() == [8, 8]
    assert plain.without_padding(np.arange(2)).ids.shape == (2, 8)


def test_fewer_sequences_are_the_beginning_of_more(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", rows_of("prompt_completion", 400))
    config = DataConfig(source=str(path))
    some, _ = load_text(config, tokenizer_with(), LENGTH, needed=70)
    more, _ = load_text(config, tokenizer_with(), LENGTH, needed=90)
    assert (len(some), len(more)) == (70, 90)
    assert np.array_equal(some.sequences, more.sequences[:70])
    assert np.array_equal(some.marks, more.marks[:70])


def test_what_is_cut_and_left_out_is_counted_and_said(tmp_path, caplog):
    rows = [
        {"prompt": "p" * 40, "completion": "c" * 20},  # 61 tokens: 13 are cut
        {"prompt": "p" * 48, "completion": "c"},  # no answer within 48
        {"prompt": "p", "completion": "  "},
        *rows_of("prompt_completion", 20),
    ]
    caplog.set_level("INFO", "flipproof")
    for _ in range(2):  # made, and found
        caplog.clear()
        about = loaded(write_rows(tmp_path / "rows.json", rows)).about
        assert (about.samples, about.cut, about.cut_tokens, about.beyond, about.unanswered) == (21, 1, 13, 1, 1)
        assert "prompt_completion, 21 samples" in caplog.text
        assert "1 cut at training.seq_len = 48 by 13 tokens together, 1 left out whose answer" in caplog.text


@pytest.mark.parametrize(("trained", "measured"), [("text", "text"), ("rows", "text"), ("text", "rows")])
def test_keys_of_instruction_data_say_nothing_where_all_is_text(trained, measured, tmp_path, caplog):
    paths = {"text": tmp_path / "a.txt", "rows": write_rows(tmp_path / "b.jsonl", rows_of("prompt_completion", 40))}
    paths["text"].write_text("some words\n" * 100)
    (tmp_path / "c.txt").write_text("other words\n" * 100)
    held_out = tmp_path / "c.txt" if measured == "text" else paths["rows"]
    names = {"source": str(paths[trained]), "eval_source": str(held_out)}
    usual, asked = DataConfig(**names), DataConfig(**names, packing=False, mask_prompt=False)
    said = [
        f"data.{key} = False says nothing: this is text, and no instruction data" for key in ("mask_prompt", "packing")
    ]
    for load, in_vain in (
        (load_text, trained == measured == "text"),
        (load_held_out, measured == "text"),
    ):
        caplog.clear()
        load(usual, tokenizer_with(), LENGTH)
        assert not [line for line in caplog.messages if "says nothing" in line]
        load(asked, tokenizer_with(), LENGTH)
        assert [line for line in caplog.messages if "says nothing" in line] == said * in_vain


@pytest.mark.parametrize("packing", [True, False])
def test_of_a_limited_source_what_was_used_is_counted(tmp_path, packing):
    """Packing reads 64 samples on before it gives the first sequence away."""
    kinds = [("p" * 60, "c"), ("p", " "), ("p", "c" * 60), ("p" * 30, "c" * 4), ("p" * 40, "c")]
    rows = [{"prompt": f"{i} {kinds[i % 5][0]}", "completion": kinds[i % 5][1]} for i in range(300)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    encoder = Encoder("prompt_completion", tokenizer_with(), (), None, True)
    source = list(read(whole_rows(open_source(str(path), "text")), "all", encoder))
    for sequences in (2, 30, 10_000):
        text = loaded(path, packing=packing, max_tokens=sequences * LENGTH)
        assert len(text) == min(sequences, 180)
        heads = {tuple(ids[:6]) for ids, _ in samples_in(text)}  # each begins with a number of its own
        used = [i for i, sample in enumerate(source) if sample and tuple(sample.ids[:6].tolist()) in heads]
        fits = [sample is not None and sample.counts[:LENGTH].any() for sample in source]
        used = [i for i in used if fits[i]]
        until = len(source) if len(used) == sum(fits) else used[-1]
        over = [len(source[i].ids) - LENGTH for i in used if len(source[i].ids) > LENGTH]
        about = text.about
        assert (about.samples, about.cut, about.cut_tokens) == (len(used), len(over), sum(over))
        assert about.unanswered == sum(sample is None for sample in source[:until])
        assert about.beyond == sum(sample is not None and not fits[i] for i, sample in enumerate(source[:until]))


def test_files_of_all_kinds_hold_the_same(tmp_path):
    rows = rows_of("chat", 30)
    write_rows(tmp_path / "a.json", rows)
    write_rows(tmp_path / "b.jsonl", rows)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "c.parquet")
    first, *others = [sorted(samples_in(loaded(tmp_path / name))) for name in ("a.json", "b.jsonl", "c.parquet")]
    assert all(other == first for other in others)


def test_rows_of_the_hub(tmp_path, monkeypatch):
    rows = rows_of("alpaca", 30)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    text, _ = load_text(DataConfig(source="org/alpaca"), tokenizer_with(), 256)
    assert text.about.format == "alpaca"
    assert text.about.samples == 27


def test_one_of_ten_samples_is_held_out(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", rows_of("prompt_completion", 100))
    training, held_out = loaded(path, "training")
    of = source_samples(path)
    here, there = (without_padding(samples_in(text), of) for text in (training, held_out))
    assert (len(here), len(there)) == (90, 10)
    assert sorted(here + there) == sorted(of)


def test_a_column_of_text_is_text_and_a_format_can_be_named(tmp_path):
    rows = [row | {"text": "some text " * 20} for row in rows_of("prompt_completion", 20)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert loaded(path).marks is None
    assert loaded(path, format="prompt_completion").marks is not None
    chat = write_rows(tmp_path / "chat.jsonl", rows_of("chat", 5))
    for wrong, said in (
        ({"format": "text"}, "data.text_column = 'text'"),
        ({"format": "alpaca"}, "it has no instruction"),
    ):
        with pytest.raises(ConfigError, match=said):
            loaded(chat, **wrong)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match=r"data\.format = 'chat': .*is text, and has no columns"):
        loaded(tmp_path / "a.txt", format="chat")


@pytest.mark.parametrize("damaged", [".json", ".npy"])
def test_a_damaged_file_is_made_anew(tmp_path, cache, damaged):
    path = write_rows(tmp_path / "rows.jsonl", rows_of("prompt_completion", 20))
    text = loaded(path)
    before, about = text.sequences.copy(), text.about
    (file,) = cache.glob(f"*{damaged}")
    file.write_bytes(file.read_bytes()[:-5])
    again = loaded(path)
    assert np.array_equal(again.sequences, before)
    assert again.about == about


def test_all_that_tokens_depend_on_is_in_the_name(tmp_path, cache):
    path = write_rows(tmp_path / "rows.jsonl", rows_of("chat", 20))
    for config in ({}, {"mask_prompt": False}, {"packing": False}):
        loaded(path, **config)
    other = tokenizer_with(CHAT_TEMPLATE + "\n")
    load_held_out(DataConfig(source="other.jsonl", eval_source=str(path)), other, LENGTH)
    assert len(list(cache.glob("*.npy"))) == 4


def test_without_samples_there_is_nothing_to_do(tmp_path):
    for rows, said in (
        ([{"prompt": "p", "completion": ""}] * 3, "holds no sample with an answer"),
        (
            [{"prompt": "p" * 60, "completion": "c"}] * 2,
            r"seq_len = 48: the answers of all 2 samples of .* begin",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            loaded(write_rows(tmp_path / "rows.jsonl", rows))
    with pytest.raises(ConfigError, match="holds no sample with an answer in its held-out part"):
        loaded(write_rows(tmp_path / "rows.jsonl", rows_of("prompt_completion", 1)), "training")
