import itertools
import json
import os
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers.processors import TemplateProcessing

from flipproof.config import DataConfig
from flipproof.data import document, packing
from flipproof.data.sequences import load_held_out, load_text, training_indices
from flipproof.errors import ConfigError
from flipproof.models.load import byte_tokenizer

DOCUMENTS = [f"document {i}: " + "abcdefghij\n" * (20 + i) for i in range(12)]


@pytest.fixture
def sources(tmp_path):
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(DOCUMENTS):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t, "n": 1}) + "\n" for t in DOCUMENTS))
    pq.write_table(pa.table({"text": DOCUMENTS}), tmp_path / "a.parquet")
    return {"txt": tmp_path / "texts", "jsonl": tmp_path / "a.jsonl", "parquet": tmp_path / "a.parquet"}


def whole(path, **more):
    """All tokens of a source, in the order of packing."""
    text = load_held_out(DataConfig(eval_source=str(path), **more), byte_tokenizer(), 1)
    return text.sequences.reshape(-1).tolist()


def test_every_format_gives_the_same_tokens_in_the_order_of_a_fixed_seed(sources, monkeypatch, tokenised):
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 700)
    order = np.random.Generator(np.random.Philox(key=0)).permutation(len(DOCUMENTS))
    expected = [token for i in order for token in [*byte_tokenizer().encode(DOCUMENTS[i]), 256]]
    for path in sources.values():
        tokenised.clear()
        assert whole(path) == expected
        assert len(tokenised) >= 4
        assert whole(path, max_tokens=900) == expected[:900]


def test_packing_loses_and_invents_nothing(sources):
    tokenizer = byte_tokenizer()
    for path in sources.values():
        train, held_out = load_text(DataConfig(source=str(path)), tokenizer, 1)
        flat = np.concatenate([held_out.sequences, train.sequences]).reshape(-1)
        documents = tokenizer.decode(flat).split("<|endoftext|>")
        assert sorted(documents) == sorted([*DOCUMENTS, ""])


def words(document, first, last):
    """Text in which each word tells where it is."""
    return "".join(f"d{document:02}w{k:04}" + ("\n" if k % 7 == 6 else " ") for k in range(first, last))


def found(text, tokenizer):
    ids = text.sequences.reshape(-1)
    return set(re.findall(r"d\d\dw\d{4}(?!\d)", tokenizer.decode(ids, skip_special_tokens=True)))


def lengths(kind):
    return {"alone": [900], "few": [40, 2500, 300, 300], "many": [30 + 17 * i % 90 for i in range(43)]}[kind]


def make(tmp_path, kind, form):
    """A source of so many documents, and its words."""
    texts = [words(i, 0, n) for i, n in enumerate(lengths(kind))]
    path = tmp_path / kind
    # other columns hold the same documents, in other words or in part
    rows = [{"text": t, "reversed": " ".join(t.split()[::-1]), "half": t[: len(t) // 2]} for t in texts]
    if form == "txt":
        path.mkdir()
        for i, text in enumerate(texts):
            (path / f"{i:02}.txt").write_text(text)
    elif form == "jsonl":
        path.mkdir()
        for name, part in (("a.jsonl", rows[:2]), ("b.jsonl", rows[2:])):
            (path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    elif form == "json":
        path = path.with_suffix(".json")
        path.write_text(json.dumps(rows, indent=1))
    else:
        path = path.with_suffix(".parquet")
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=16)
    return path, set(" ".join(texts).split())


def pairs_of_words():
    """A tokenizer of other tokens than bytes, and one with a beginning-of-text token."""
    pairs, beginning = byte_tokenizer(), byte_tokenizer()
    pairs.add_tokens([f"w{i:04}" for i in range(300)])
    beginning.add_special_tokens({"bos_token": "<bos>"})
    start = [("<bos>", beginning.bos_token_id)]
    beginning.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=start)
    return pairs, beginning


@pytest.mark.parametrize(
    ("kind", "form"),
    [("alone", "txt"), ("alone", "jsonl"), ("few", "txt"), ("few", "json"), ("many", "txt"), ("many", "jsonl"),
     ("many", "parquet")],
)  # fmt: skip
def test_no_config_trains_on_what_another_measures(tmp_path, kind, form, monkeypatch):
    monkeypatch.setattr(document, "_WINDOW", 6000)  # several of them
    path, everything = make(tmp_path, kind, form)
    (tmp_path / "other.txt").write_text("other text " * 100)
    columns = ["text"] if form == "txt" or kind == "alone" else ["text", "reversed", "half"]
    trained, measured = {}, {}
    for tokenizer in (byte_tokenizer(), *pairs_of_words()):
        for column, (seq_len, max_tokens, held_out_tokens) in itertools.product(
            columns, ((8, None, 100), (8, 700, 10**6), (64, None, 10**6), (64, 700, 100))
        ):
            keys = {"text_column": column, "max_tokens": max_tokens, "held_out_tokens": held_out_tokens}
            case = (id(tokenizer), seq_len, *keys.values())
            config = DataConfig(source=str(path), **keys)
            train, held_out = load_text(config, tokenizer, seq_len, 3 if seq_len == 64 else None)
            trained[case], measured[case] = found(train, tokenizer), found(held_out, tokenizer)
            again = load_held_out(config, tokenizer, seq_len)
            np.testing.assert_array_equal(again.sequences, held_out.sequences)
            apart = DataConfig(source=str(path), eval_source=str(tmp_path / "other.txt"), **keys)
            trained[(*case, "apart")] = found(load_text(apart, tokenizer, seq_len)[0], tokenizer)
    assert all(trained.values())
    assert all(measured.values())
    for (a, training), (b, held_out) in itertools.product(trained.items(), measured.items()):
        assert not training & held_out, (a, b)
    # and between them all text is used, but for what is cut at sequences' ends
    missing = everything - set().union(*trained.values(), *measured.values())
    assert len(missing) <= 2 * 8


def test_what_is_held_out_stays_so_when_documents_are_added(tmp_path):
    def write(number):
        rows = [{"text": words(i, 0, 40)} for i in range(number)]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        train, held_out = load_text(DataConfig(source=str(tmp_path / "a.jsonl")), byte_tokenizer(), 8)
        return found(train, byte_tokenizer()), found(held_out, byte_tokenizer())

    shorter, longer = write(34), write(97)
    assert not shorter[0] & longer[1]
    assert shorter[1] <= longer[1]


def test_held_out_text_does_not_depend_on_the_length_of_the_run(sources):
    config = DataConfig(source=str(sources["txt"]), held_out_tokens=128)
    train, held_out = load_text(config, byte_tokenizer(), 64)
    assert len(held_out) == 2
    for needed in (1, 7, 1000):
        part, same = load_text(config, byte_tokenizer(), 64, needed)
        np.testing.assert_array_equal(same.sequences, held_out.sequences)
        np.testing.assert_array_equal(part.sequences, train.sequences[: len(part)])
        assert len(part) == min(needed, len(train))


def test_about_a_tenth_is_held_out(tmp_path):
    for kind, form in (("alone", "txt"), ("alone", "parquet"), ("few", "txt"), ("many", "txt"), ("many", "parquet")):
        (tmp_path / form).mkdir(exist_ok=True)
        path, _ = make(tmp_path / form, kind, form)
        train, held_out = (text.sequences.size for text in load_text(DataConfig(source=str(path)), byte_tokenizer(), 8))
        assert 0.05 < held_out / (train + held_out) < 0.5


def test_the_held_out_part_stays_out_where_evaluation_text_is_given(sources, tmp_path):
    (tmp_path / "eval.txt").write_text("something else " * 50)
    apart = DataConfig(source=str(sources["txt"]), eval_source=str(tmp_path / "eval.txt"))
    train, held_out = load_text(apart, byte_tokenizer(), 64)
    np.testing.assert_array_equal(
        train.sequences, load_text(DataConfig(source=str(sources["txt"])), byte_tokenizer(), 64)[0].sequences
    )
    flat = held_out.sequences.reshape(-1)
    assert byte_tokenizer().decode(flat) == ("something else " * 50)[: flat.size]


def test_evaluation_text_that_is_trained_on_is_refused(sources, tmp_path, monkeypatch):
    os.symlink(sources["jsonl"], tmp_path / "link.jsonl")
    for source, eval_source in (
        (sources["txt"], sources["txt"]), (sources["txt"], sources["txt"] / "03.txt"),
        (sources["txt"] / "03.txt", sources["txt"]),
        (sources["jsonl"], tmp_path / "link.jsonl"), ("stdlib", "stdlib"), ("org/Data", "org/data"),
    ):  # fmt: skip
        for load in (load_text, load_held_out):
            with pytest.raises(ConfigError) as error:
                load(DataConfig(source=str(source), eval_source=str(eval_source)), byte_tokenizer(), 64)
            assert f"data.eval_source = {str(eval_source)!r}" in str(error.value)
            assert f"data.source = {str(source)!r}" in str(error.value)
    # a source that is not there is no matter to evaluation
    load_held_out(DataConfig(source="gone.txt", eval_source=str(sources["txt"])), byte_tokenizer(), 64)


def test_max_tokens_is_kept():
    train, held_out = load_text(DataConfig(source="stdlib", max_tokens=10_000), byte_tokenizer(), 100)
    assert len(held_out) * 100 == 1000
    assert len(train) * 100 == 9000


def test_a_text_that_will_be_repeated_is_said_so(sources, caplog):
    config = DataConfig(source=str(sources["txt"]))
    train, _ = load_text(config, byte_tokenizer(), 64)
    load_text(config, byte_tokenizer(), 64, len(train))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    load_text(config, byte_tokenizer(), 64, 5 * len(train))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    for words in (repr(str(sources["txt"])), f"{len(train)} sequences", f"takes {5 * len(train)}", "5.0 times"):
        assert words in warning


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
    (tmp_path / "odd.csv").write_text("a,b\n1,2\n")
    (tmp_path / "odd.png").write_text("")
    (tmp_path / "broken.parquet").write_text("no parquet")
    bad(["empty.txt", "no text"], source=str(tmp_path / "empty.txt"))
    bad(["blank.jsonl", "no text"], source=str(tmp_path / "blank.jsonl"))
    bad(["short.txt", "3 tokens", "held-out part", "training.seq_len = 64"], source=str(tmp_path / "short.txt"))
    bad(["one.txt", "51 tokens", "does not divide", "data.eval_source"], source=str(tmp_path / "one.txt"))
    bad(["max_tokens = 100", "does not divide"], source=str(sources["txt"]), max_tokens=100)
    bad(["bos = True", "no beginning-of-text token"], source=str(sources["txt"]), bos=True)
    bad(["odd.csv", "has the columns a, b"], source=str(tmp_path / "odd.csv"))
    bad(["odd.png", ".txt", ".jsonl", ".parquet", "found .png"], source=str(tmp_path / "odd.png"))
    bad(["broken.parquet", "cannot be read"], source=str(tmp_path / "broken.parquet"))
    bad(["text_column = 'body'", "text, n"], source=str(sources["jsonl"]), text_column="body")
    bad(["'no/such-data'", "local file or folder", "stdlib"], source="no/such-data")


def test_the_column_is_of_no_matter_to_text_files(sources):
    train, _ = load_text(DataConfig(source=str(sources["txt"]), text_column="body"), byte_tokenizer(), 64)
    np.testing.assert_array_equal(
        train.sequences, load_text(DataConfig(source=str(sources["txt"])), byte_tokenizer(), 64)[0].sequences
    )
