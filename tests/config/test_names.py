import dataclasses
import re

import pytest

from flipproof.config import SECTIONS, aliases
from flipproof.config.names import KEYS, keys_meant, near_key, near_table
from flipproof.config.texts import readings
from flipproof.faults.spec import field_names
from flipproof.values import checked


@pytest.mark.parametrize(
    ("word", "keys"),
    [
        ("lr", ["training.lr"]),
        ("learning-rate", ["training.lr"]),
        ("seed", ["training.seed", "bitflip.base_seed"]),
        ("bf16", ["training.precision", "training.dtype", "training.mixed_precision_param"]),
        ("num_train_epochs", ["training.epochs"]),
        ("max_tokens_to_train", ["training.steps", "training.epochs", "training.tokens_per_parameter"]),
        ("seq-len", ["training.seq_len"]),
        ("lora_r", ["lora.r"]),
        ("gradient_accumulation", ["training.gradient_accumulation_steps"]),
        ("max_train_steps", ["training.steps"]),
        ("micro_batch_size", ["training.local_batch_size"]),
        ("save_dir", ["logging.run_dir"]),
        ("rundir", ["logging.run_dir"]),
        ("xyzzy", []),
    ],
)
def test_a_word_means_the_key_that_it_names_or_is_nearest_to(word, keys):
    assert keys_meant(word) == keys


def test_every_key_means_itself_and_the_table_of_other_words_names_keys_that_exist():
    for key, name in KEYS.items():
        assert key in keys_meant(name)
        assert keys_meant(key.replace(".", "_")) == [key]
        assert key.split(".")[1] not in {word for words in aliases.KEYS.values() for word in words}
    words = [word for words in aliases.KEYS.values() for word in words]
    assert len(set(words)) == len(words)
    assert not set(words) & set(aliases.ANSWERS)
    for key, words in aliases.KEYS.items():
        assert all(keys_meant(word) == [key] for word in words)


def test_answers_name_keys_verbs_and_values_that_exist():
    for answer in [*aliases.ANSWERS.values(), *aliases.TABLES.values(), *aliases.VERBS.values()]:
        for section, key in re.findall(rf"\b({'|'.join(SECTIONS)})\.(\w+)", answer):
            assert f"{section}.{key}" in KEYS
        assert set(re.findall(r"\[(\w+)\]", answer)) <= set(SECTIONS)
    for key, values in aliases.VALUES.items():
        section, name = key.split(".")
        (field,) = (field for field in dataclasses.fields(SECTIONS[section]) if field.name == name)
        for theirs, ours in values.items():
            assert checked("key", ours, field.type, readings) == ours
            with pytest.raises(ValueError, match=ours):
                checked("key", theirs, field.type, readings)


@pytest.mark.parametrize(
    ("section", "key", "hint"),
    [
        ("training", "lrr", "lr"),
        ("training", "LR", "lr"),
        ("training", "seq-len", "seq_len"),
        ("training", "save_dir", "logging.run_dir"),
        ("training", "learning_rate", "lr"),
        ("training", "r", "lora.r"),
        ("model", "dtype", "training.dtype"),
        ("logging", "output_dir", "run_dir"),
    ],
)
def test_an_unknown_key_of_a_file_is_told_the_right_one(section, key, hint):
    assert near_key(key, section) == f"; did you mean {hint}?"


@pytest.mark.parametrize(
    ("section", "key", "words"),
    [
        ("training", "max_tokens_to_train", "training.tokens_per_parameter"),
        ("training", "total_batch_size", "training.global_batch_size"),
        ("training", "mixed_precision", "bf16-mixed"),
        ("parallelism", "tensor_parallel_degree", "parallelism.fsdp_degree"),
    ],
)
def test_a_key_that_means_none_of_ours_is_answered(section, key, words):
    assert words in near_key(key, section)


def test_tables_of_other_tools_are_told_where_their_keys_are():
    assert near_table("dataset", is_table=True) == "; the table is [data], and the text its source"
    assert "training.lr" in near_table("optimizer", is_table=True)
    assert near_table("devices", is_table=False).startswith(" outside a table; processes are started by --devices N")


def test_where_nothing_is_near_all_are_named():
    assert near_key("xyzzy", "lora") == f"; known are {', '.join(field_names(SECTIONS['lora']))}"
    assert near_table("xyzzy", is_table=True) == f"; known are {', '.join(SECTIONS)}"


def test_a_key_outside_its_table():
    assert near_table("steps", is_table=False) == " outside a table; did you mean training.steps?"
    assert near_table("save_dir", is_table=False) == " outside a table; did you mean logging.run_dir?"
    assert near_table("trainin", is_table=True) == "; did you mean training?"
