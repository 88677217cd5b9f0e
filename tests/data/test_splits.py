"""Which part of a data set is trained on and which is measured: subsets, splits and revisions."""

from types import SimpleNamespace

import datasets
import pyarrow as pa
import pytest
from source_texts import write_rows

from flipproof.config import DataConfig
from flipproof.data.sequences import load_held_out, load_text
from flipproof.data.source import Choice, check_apart, held_out_source, open_source, training_source
from flipproof.errors import ConfigError
from flipproof.models.load import byte_tokenizer

ROWS = 40


def texts(source, part):
    return sorted(document.read(start, end).decode() for document, start, end in source.spans(part))


def rows_of(name):
    return [f"{name} {i}" for i in range(ROWS)]


def table_of(name):
    return datasets.Dataset(datasets.table.InMemoryTable(pa.table({"text": rows_of(name)})))


@pytest.fixture
def asked(monkeypatch):
    """What ``load_dataset`` was asked for; it gives rows that say so."""
    calls = []

    def load_dataset(name, subset, split, revision):
        calls.append((name, subset, split, revision))
        return table_of(f"{subset} {split} {revision}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize(
    ("keys", "training", "held_out"),
    [
        ({}, ("org/a", None, "train", None), None),
        ({"subset": "en", "split": "fit", "revision": "v2"}, ("org/a", "en", "fit", "v2"), None),
        ({"subset": "en", "eval_split": "dev"}, ("org/a", "en", "train", None), ("org/a", "en", "dev", None)),
        ({"subset": "en", "revision": "v2", "eval_source": "org/a", "eval_split": "dev"},
         ("org/a", "en", "train", "v2"), ("org/a", "en", "dev", "v2")),
        ({"subset": "en", "split": "fit", "revision": "v2", "eval_source": "org/b", "eval_split": "dev"},
         ("org/a", "en", "fit", "v2"), ("org/b", None, "dev", None)),
        ({"subset": "en", "eval_source": "org/b"}, ("org/a", "en", "train", None), ("org/b", None, "train", None)),
        ({"split": "train[:90%]", "eval_split": "train[90%:]"},
         ("org/a", None, "train[:90%]", None), ("org/a", None, "train[90%:]", None)),
        ({"split": "train[200:]", "eval_split": "train[:100]"},
         ("org/a", None, "train[200:]", None), ("org/a", None, "train[:100]", None)),
    ],
)  # fmt: skip
def test_what_is_asked_of_the_hub(asked, keys, training, held_out):
    config = DataConfig(source="org/a", **keys)
    check_apart(config)
    said = ["{1} {2} {3}".format(*call) for call in (training, held_out or training)]
    trained = texts(training_source(config), "training")
    measured = texts(*held_out_source(config))
    assert asked == [training, held_out or training]
    if held_out is None:
        assert sorted(trained + measured) == sorted(rows_of(said[0]))
        assert len(measured) == ROWS // 10
    else:
        assert measured == sorted(rows_of(said[1]))
        assert len(trained) == ROWS - ROWS // 10
        assert set(trained) < set(rows_of(said[0]))


def test_packed_text_is_that_of_its_subset_split_and_revision(asked, cache):
    seen = set()
    for keys in ({}, {"subset": "en"}, {"split": "fit"}, {"revision": "v2"}, {"eval_split": "dev"}):
        train, held_out = load_text(DataConfig(source="org/a", **keys), byte_tokenizer(), 16)
        seen |= {train.sequences.tobytes(), held_out.sequences.tobytes()}
        again = load_held_out(DataConfig(source="org/a", **keys), byte_tokenizer(), 16)
        assert again.sequences.tobytes() == held_out.sequences.tobytes()
    assert held_out.source == "org/a, dev"
    assert len(seen) == len([path for path in cache.iterdir() if path.suffix == ".npy"]) == 9  # train twice
    # also where the files in the cache of datasets are the same ones
    one = open_source("org/a", "text", Choice(revision="v1")).signature("training")
    assert one != open_source("org/a", "text", Choice(revision="v2")).signature("training")


@pytest.mark.parametrize(
    "keys",
    [
        {"eval_split": "train"},
        {"eval_source": "ORG/a"},
        {"split": "fit", "eval_split": "fit", "subset": "en"},
        {"subset": "default", "eval_source": "Org/A", "eval_split": "train"},
        {"eval_split": "train[:10%]"},
        {"split": "train[:50%]", "eval_split": "train[:60%]"},
        {"split": "train[:100]", "eval_split": "train[90%:]"},
        {"split": "train[:-100]", "eval_split": "train[-100:]"},  # which nobody has worked out
        {"split": "train+dev", "eval_split": "dev"},
    ],
)
def test_a_split_that_is_trained_on_is_not_measured(asked, keys):
    with pytest.raises(ConfigError, match="trains on"):
        load_held_out(DataConfig(source="org/a", **keys), byte_tokenizer(), 16)
    assert asked == []


def test_what_there_is_is_named(monkeypatch):
    for error, words in (
        ("BuilderConfig 'fr' not found. Available: ['en', 'de']", ["['en', 'de']", "data.subset"]),
        ("Unknown split \"dev\". Should be one of ['train', 'test'].", ["['train', 'test']", "data.eval_split"]),
    ):

        def load_dataset(*_args, said=error, **_keys):
            raise ValueError(said)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(ConfigError) as raised:
            load_held_out(DataConfig(source="org/a", eval_split="dev"), byte_tokenizer(), 16)
        (line,) = raised.value.problems
        assert all(word in line for word in words), line

    builder = SimpleNamespace(info=SimpleNamespace(splits={"train": None, "test": None}))
    calls = []
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a, **k: calls.append((a, k)) or builder)
    source = open_source("org/a", "text", Choice("en", "dev[:5%]", "v2", "data.eval_split"))
    with pytest.raises(ConfigError, match=r"data.eval_split = 'dev\[:5%\]': 'org/a' has the splits train, test"):
        source.check()
    assert calls == [(("org/a", "en"), {"revision": "v2"})]
    open_source("org/a", "text", Choice("en", "test[:5%]")).check()


# -- on this machine ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=["folder", "saved"])
def local(request, tmp_path):
    """A function of split names: a folder or a directory of save_to_disk with them."""

    def make(*names):
        path = tmp_path / "-".join(names)
        if request.param == "saved":
            datasets.DatasetDict({name: table_of(name) for name in names}).save_to_disk(path)
        else:
            path.mkdir()
            for name in names:
                write_rows(path / f"{name}.jsonl", [{"text": text} for text in rows_of(name)])
        return str(path)

    return make


@pytest.mark.parametrize(
    ("names", "keys", "training", "held_out"),
    [
        (("train", "validation", "test"), {}, "train", "validation"),
        (("train", "test"), {}, "train", "test"),
        (("train", "validation", "test"), {"split": "train"}, "train", "validation"),
        (("train", "validation", "test"), {"eval_split": "test"}, "train", "test"),
        (("train", "validation", "test"), {"split": "test"}, "test", None),
        (("train",), {}, "train", None),
        (("train",), {"split": "train"}, "train", None),
    ],
)
def test_the_splits_of_what_is_here(local, names, keys, training, held_out):
    config = DataConfig(source=local(*names), **keys)
    check_apart(config)
    trained, measured = texts(training_source(config), "training"), texts(*held_out_source(config))
    if held_out is None:
        assert 0 < len(measured) < ROWS / 2
        if len(trained) + len(measured) == ROWS:  # else a line was cut
            assert sorted(trained + measured) == sorted(rows_of(training))
    else:
        assert trained == sorted(rows_of(training))
        assert measured == sorted(rows_of(held_out))


def test_what_one_config_measures_of_a_split_no_other_trains_on(local):
    path = local("train", "validation", "test")
    measured = texts(*held_out_source(DataConfig(source=path, split="test")))
    config = DataConfig(source=path, split="test", eval_split="train")
    assert texts(*held_out_source(config)) == sorted(rows_of("train"))
    trained = texts(training_source(config), "training")
    assert sorted(trained + measured) == sorted(rows_of("test"))


def test_splits_that_are_not_here_are_named(local, tmp_path):
    path = local("train", "validation")
    for keys, line in (
        ({"split": "fit"}, f"data.split = 'fit': .*{path}' has the splits train, validation"),
        ({"eval_split": "holdout"}, f"data.eval_split = 'holdout': .*{path}' has the splits train, validation"),
        ({"eval_split": "train"}, "data.eval_split = 'train' is text that .* trains on"),
        ({"eval_source": path, "eval_split": "train"}, "data.eval_split = 'train' is text that .* trains on"),
        ({"subset": "en"}, "data.subset = 'en': .*only a Hub data set has subsets and revisions"),
        ({"revision": "v2"}, "data.revision = 'v2': .*only a Hub data set"),
    ):
        with pytest.raises(ConfigError, match=line):
            load_text(DataConfig(source=path, **keys), byte_tokenizer(), 16)
    (tmp_path / "a.txt").write_text("text")
    for name in (str(tmp_path / "a.txt"), "stdlib"):
        for key in ("split", "eval_split"):
            with pytest.raises(ConfigError, match=rf"data.{key} = 'test': .*(no splits|has none)"):
                load_text(DataConfig(source=name, **{key: "test"}), byte_tokenizer(), 16)


def test_a_saved_data_set_without_splits(tmp_path, cache):
    saved, path = table_of("row"), tmp_path / "saved"
    saved.select(range(ROWS)).save_to_disk(path)
    plain = write_rows(tmp_path / "a.jsonl", [{"text": text} for text in rows_of("row")])
    for part in ("all", "training", "held-out"):
        assert texts(open_source(str(path), "text"), part) == texts(open_source(str(plain), "text"), part)
    config = DataConfig(source=str(path))
    first, again = (load_text(config, byte_tokenizer(), 16)[0].sequences for _ in range(2))
    assert first.tobytes() == again.tobytes()
    assert len([file for file in cache.iterdir() if file.suffix == ".npy"]) == 2
    for keys, line in (
        ({"split": "train"}, "data.split = 'train': .*has no splits"),
        ({"text_column": "body"}, "has the columns text"),
    ):
        with pytest.raises(ConfigError, match=line):
            load_text(DataConfig(source=str(path), **keys), byte_tokenizer(), 16)
    arrow = next(path.glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(ConfigError, match="save_to_disk that cannot be read"):
        load_text(config, byte_tokenizer(), 16)
