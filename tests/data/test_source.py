import json
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_texts import read, refused, write_rows

from flipproof.config import DataConfig
from flipproof.data import tables
from flipproof.data.document import TextFile
from flipproof.data.sequences import load_held_out, load_text
from flipproof.data.source import open_source
from flipproof.errors import ConfigError
from flipproof.models.load import byte_tokenizer

ODD_NAMES = [
    "a[0].txt", "*.txt", "what?.txt", "a::b.txt", "x=1&y=2.txt", "part#1.txt", "100%25.txt", "two words.txt",
    "ü 文.txt", "-rf.txt", ".hidden.txt", "hf:__datasets.txt", "{a,b}.txt", "~tilde.txt", "quote'\".txt",
    "back\\slash.txt",
]  # fmt: skip


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_path_is_a_path_whatever_it_holds(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for other in ("a0.txt", "a.txt", "whatx.txt"):
        (tmp_path / other).write_text("another")
    (tmp_path / name).write_text("this one")
    assert read(name) == read(tmp_path / name) == ["this one"]
    folder = tmp_path / name.replace(".txt", "")
    (folder / name.strip(".") / "deep").mkdir(parents=True)
    (folder / name.strip(".") / "deep" / "b.txt").write_text("below")
    assert read(folder) == ["below"]
    rows = folder.with_name(folder.name + ".jsonl")
    rows.write_text('{"text": "row"}\n')
    assert read(rows) == ["row"]
    pq.write_table(pa.table({"text": ["table"]}), folder.with_name(folder.name + ".PARQUET"))
    assert read(folder.with_name(folder.name + ".PARQUET")) == ["table"]


def test_home_local_names_before_hub_names_and_links(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", None)
    (tmp_path / "org" / "data").mkdir(parents=True)
    (tmp_path / "org" / "data" / "a.txt").write_text("home")
    os.symlink(tmp_path / "org", tmp_path / "link")
    for name in ("~/org/data", "~/org/data/a.txt", "org/data", "./org/data/", "link/data", "link", f"{tmp_path}/org"):
        assert read(name) == ["home"]
    (tmp_path / "stdlib").mkdir()
    (tmp_path / "stdlib" / "a.txt").write_text("a folder")
    assert read("./stdlib") == ["a folder"]
    assert len(read("stdlib")) > 100


def test_each_file_of_a_folder_is_read_once(tmp_path):
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    (folder / "b" / "c.TXT").write_text("c")
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "._a.txt").write_text("hidden")
    (folder / ".git").mkdir()
    (folder / ".git" / "d.txt").write_text("hidden")
    (folder / "README.md").write_text("about")
    (folder / "dataset_info.json").write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "e.txt").write_text("e")
    os.symlink(tmp_path / "elsewhere", folder / "linked")
    os.symlink(folder, folder / "b" / "round")
    os.symlink(folder / "a.txt", folder / "again.txt")
    os.link(folder / "a.txt", folder / "hard.txt")
    os.symlink(folder / "none.txt", folder / "dangling.txt")
    assert read(folder) == ["a", "c", "e"]
    refused(["no file and no folder"], folder / "dangling.txt")


@pytest.mark.parametrize(
    ("files", "training", "held_out"),
    [
        (["train.txt", "validation.txt", "test.txt"], ["train.txt"], ["validation.txt"]),
        (["train.txt", "test.txt"], ["train.txt"], ["test.txt"]),
        (["train/a.txt", "train/b.txt", "val/c.txt", "test/d.txt"], ["train/a.txt", "train/b.txt"], ["val/c.txt"]),
        (["data/train-00000-of-00002.txt", "data/train-00001-of-00002.txt", "data/test-00000-of-00001.txt"],
         ["data/train-00000-of-00002.txt", "data/train-00001-of-00002.txt"], ["data/test-00000-of-00001.txt"]),
        (["wiki.train.txt", "wiki.valid.txt", "wiki.test.txt"], ["wiki.train.txt"], ["wiki.valid.txt"]),
        (["Training/a.txt", "Dev/a.txt"], ["Training/a.txt"], ["Dev/a.txt"]),
        (["corpus.txt", "test.txt"], ["corpus.txt"], ["test.txt"]),
        (["corpus.txt", "my test notes.txt", "latest.txt", "train of thought.txt"], None, None),
        (["train/a.txt", "train/b.txt"], None, None),
        (["test.txt", "validation.txt"], [], ["validation.txt"]),
    ],
)  # fmt: skip
def test_the_splits_of_a_folder(tmp_path, files, training, held_out):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name}")
    source = open_source(str(tmp_path), "text")
    if held_out is None:
        assert source.splits is None
        assert read(tmp_path) == sorted(files)
        return
    assert read(tmp_path, "held-out") == read(tmp_path, "all") == held_out
    if training:
        assert read(tmp_path, "training") == training
    else:
        refused(["validation or test files alone", "data.eval_source"], tmp_path, part="training")


def test_a_split_that_is_held_out_is_said(tmp_path, caplog):
    for name, size in (("train", 400), ("valid", 300), ("test", 200)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name * size}))
    with caplog.at_level("INFO", "flipproof"):
        train, held_out = load_text(DataConfig(source=str(tmp_path)), byte_tokenizer(), 50)
    assert byte_tokenizer().decode(train.sequences[0]).startswith("traintrain")
    assert train.sequences.size == 400 * len("train")
    assert byte_tokenizer().decode(held_out.sequences[0]).startswith("validvalid")
    assert [r.getMessage() for r in caplog.records if "held out" in r.getMessage()] == [
        f"data source {str(tmp_path)!r}: 1 files to train on, 1 of its validation split held out, 1 left alone"
    ]
    # its test file may be evaluation text beside it; its train file may not
    load_text(DataConfig(source=str(tmp_path), eval_source=str(tmp_path / "test.jsonl")), byte_tokenizer(), 50)
    with pytest.raises(ConfigError, match="trains on"):
        load_text(DataConfig(source=str(tmp_path), eval_source=str(tmp_path / "train.jsonl")), byte_tokenizer(), 50)


def test_what_is_no_source_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", None)
    (tmp_path / "saved").mkdir()
    for name in ("data-00000-of-00001.arrow", "state.json", "dataset_info.json"):
        (tmp_path / "saved" / name).write_text("{}")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_text("a")
    (tmp_path / "a.parquet.gz").write_text("")
    (tmp_path / "a.png").write_text("")
    refused(["'pictures'", ".txt", ".parquet", "found .png"], "pictures")
    refused(["'a.png'", ".txt", "found .png"], "a.png")
    refused(["'a.parquet.gz'", "unpack"], "a.parquet.gz")
    refused(["'saved'", "save_to_disk", "cannot be read"], "saved")
    refused(["'empty'", "found nothing"], "empty")
    refused(["'pipe.txt'", "no file and no folder"], "pipe.txt")
    for name in ("gone.txt", "./gone", "~/gone", "/gone/a", "a/b/c", "hf://datasets/x", "https://x.org/a.txt", "a b",
                 "gone.jsonl", "x" * 300 + "/.", "a\0b", "-x"):  # fmt: skip
        refused(["no file or folder here", "no Hub data set"], name)


# -- tables ------------------------------------------------------------------------------------------------------------


def test_other_columns_are_of_no_matter(tmp_path):
    late = [{"text": "a" * 2000, "id": 1}] * 40 + [
        {"text": "b", "id": "x", "meta": {"a": 1}},
        {"text": None},
    ]
    assert read(write_rows(tmp_path / "a.jsonl", late)) == ["", *["a" * 2000] * 40, "b"]
    refused(["text_column = 'body'", "has the columns text, id"], tmp_path / "a.jsonl", "body")
    chat = write_rows(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "hello"}]}])
    refused(["has the columns messages", "instruction data has instruction and output"], chat)
    refused(["chat.jsonl, line 1 holds a value of type list of dict", "data.format = 'chat'"], chat, "messages")


def test_a_row_without_the_column_among_rows_that_have_it_is_refused(tmp_path):
    words = ["data.text_column = 'text'", "has the columns id, body; without text", "null or ''"]
    mixed = [{"text": "a"}, {"text": None}, {"id": 3, "body": "b"}, {"text": "c"}]
    refused(["a.jsonl, line 3", *words], write_rows(tmp_path / "a.jsonl", mixed))
    (tmp_path / "a.json").write_text(json.dumps(mixed))
    refused(["a.json, item 2", *words], tmp_path / "a.json")
    refused(["b.jsonl, line 2", "has no columns"], write_rows(tmp_path / "b.jsonl", [{"text": "a"}, {}]))
    (tmp_path / "two").mkdir()
    write_rows(tmp_path / "two" / "a.jsonl", [{"title": "no text"}] * 3)
    write_rows(tmp_path / "two" / "b.jsonl", [{"text": "c"}])
    refused(["a.jsonl, line ", "has the columns title"], tmp_path / "two")


def test_json_lines_of_every_usual_form(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  {"text": "b\\r\\nc"}  \n{"text": "\xc3\xa9"}')
    assert read(path) == ["a", "b\r\nc", "é"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "a"}\n\n{"text": "unfinished\n', ["a.jsonl, line 3", "not one JSON object"]),
        (b'{"text": "a"}\n{"text": "b"} {"text": "c"}\n', ["a.jsonl, line 2", "Extra data"]),
        (b'{"text": "a"}\n"b"\n', ["a.jsonl, line 2 holds a str, not an object"]),
        (b'{\n  "text": "a"\n}\n', ["a.jsonl, line 1"]),
        (b'{"text": "a"}\n{"text": "\xe9"}\n', ["a.jsonl, line 2: byte 10 (0xe9) is not UTF-8", "iconv"]),
        (b'{"text": "a"}\n{"text": 3}\n', ["a.jsonl, line 2 holds a value of type int"]),
        (b'{"text": ' + b"[" * 100_000 + b"\n", ["a.jsonl, line 1"]),
        (b'[{"text": "a"}, {"text": "b}]', ["a.jsonl, item 1 is not JSON", "Unterminated string"]),
        (b'[{"text": "a"} {"text": "b"}]', ["a.jsonl, item 0", "comma"]),
        (b'[{"text": "a"}', ["a.jsonl, item 0", "end of the array"]),
        (b'[{"text": "a"}, "b"]', ["a.jsonl, item 1 holds a str, not an object"]),
        (b'[{"text": "a"}, {"text": {"b": 1}}]', ["a.jsonl, item 1 holds a value of type dict"]),
        ('[{"text": "é"}]'.encode("latin-1"), ["a.jsonl: byte 11 (0xe9) is not UTF-8"]),
    ],
)
def test_what_is_wrong_with_json_is_named_by_its_line(tmp_path, content, words):
    (tmp_path / "a.jsonl").write_bytes(content)
    refused(words, tmp_path / "a.jsonl")


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_json_array_is_read_an_item_at_a_time(tmp_path, monkeypatch, indent, suffix):
    items = [{"text": f"item {i} " + 'é[]{},"\\' * i, "more": [i, {"a": None}]} for i in range(2000)]
    path = (tmp_path / "a").with_suffix(suffix)
    path.write_text("\n " + json.dumps(items, indent=indent))
    held, more = [], tables._JsonReader._more
    monkeypatch.setattr(tables._JsonReader, "_more", lambda self: more(self) and (held.append(len(self.text)) or True))
    assert read(path) == sorted(item["text"] for item in items)
    assert max(held) < path.stat().st_size / 20
    for empty in ("[]", " [ ] "):
        path.write_text(empty)
        assert read(path) == []


def test_parquet_of_every_kind_of_column(tmp_path):
    def write(**columns):
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        return tmp_path / "a.parquet"

    texts = ["a", "é", None, ""]
    expected = sorted(text or "" for text in texts)
    for kind in (pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int8(), pa.string()), pa.string_view()):
        assert read(write(text=pa.array(texts, pa.string()).cast(kind), other=[[1]] * 4)) == expected
    for values, kind in (([1], "int"), ([1.5], "float"), ([["a"]], "list of str"), ([{"a": 1}], "dict")):
        refused(["a.parquet, row 0", f"type {kind}"], write(text=values))
    refused(["row 1 holds bytes that are not UTF-8"], write(text=[b"ok", b"\xff"]))
    refused(["text_column = 'body'", "has the columns text, n"], write(text=["a"], n=[1]), "body")
    assert read(write(text=pa.nulls(3))) == ["", "", ""]
    path = write(text=["abc" * 1000] * 1000)
    path.write_bytes(path.read_bytes()[:-100])
    refused(["a.parquet", "cannot be read"], path)
    path.write_bytes(b"")
    refused(["a.parquet", "cannot be read"], path)


# -- the Hub -----------------------------------------------------------------------------------------------------------


def hub(monkeypatch, found):
    def load_dataset(name, subset, split, revision):
        assert (name, subset, split, revision) == ("org/data", None, "train", None)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_a_hub_data_set_is_its_column(tmp_path, monkeypatch, cache):
    table = pa.table({"text": [f"text {i}" for i in range(1000)], "n": list(range(1000))})
    hub(monkeypatch, datasets.Dataset(datasets.table.InMemoryTable(table)))
    assert read("org/data") == sorted(f"text {i}" for i in range(1000))
    refused(["data.text_column = 'body'", "'org/data' has the columns text, n"], "org/data", "body")
    refused(["org/data, row ", " holds a value of type int"], "org/data", "n")
    path = tmp_path / "a.jsonl"
    write_rows(path, table.to_pylist())
    for part in ("training", "held-out"):
        assert read("org/data", part) == read(path, part)
    first = load_held_out(DataConfig(source="org/data"), byte_tokenizer(), 8).sequences
    hub(monkeypatch, datasets.Dataset(datasets.table.InMemoryTable(pa.table({"text": ["other text"] * 1000}))))
    assert load_held_out(DataConfig(source="org/data"), byte_tokenizer(), 8).sequences.shape != first.shape


def test_what_the_hub_said_is_passed_on(monkeypatch):
    cause = datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset")
    cause.__cause__ = ValueError("row 7 of x.csv\nis broken")
    for error, words in (
        (datasets.exceptions.DatasetNotFoundError("Dataset 'org/data' is a gated dataset on the Hub. You must be "
         "authenticated to access it."), ["gated", "authenticated"]),
        (ConnectionError("Couldn't reach 'org/data' on the Hub (OfflineModeIsEnabled)"), ["OfflineModeIsEnabled"]),
        (ValueError("Config name is missing.\nPlease pick one among the available configs: ['en', 'de']\nExample of "
         "usage:\n\t`load_dataset('org/data', 'en')`"), ["Config name is missing", "['en', 'de']"]),
        (ValueError("Unknown split \"train\". Should be one of ['test', 'dev']."), ['"train"', "['test', 'dev']"]),
        (cause, ["row 7 of x.csv is broken"]),
        (RuntimeError(), ["RuntimeError"]),
    ):  # fmt: skip
        hub(monkeypatch, error)
        refused(["'org/data'", "local file or folder", *words], "org/data")


def test_a_kind_of_file_is_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "a.jsonl", [{"text": "not asked for"}])
    for name in ("json", "text", "parquet", "csv"):
        refused([repr(name), "a kind of file"], name)


def test_a_file_that_vanishes_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a" * 100)
    source = open_source(str(tmp_path / "a.txt"), "text")
    (span,) = source.spans("all")
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ConfigError, match=r"a.txt' cannot be read \(No such file"):
        span.document.read(0, 10)
    with pytest.raises(ConfigError, match=r"a.txt.* cannot be read \(No such file"):
        list(source.spans("all"))
    assert isinstance(span.document, TextFile)
