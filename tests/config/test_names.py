import pytest

from flipproof.config import SECTIONS
from flipproof.config.names import _OTHER_WORDS as OTHER_WORDS
from flipproof.config.names import KEYS, keys_meant, near_key, near_table
from flipproof.faults.spec import field_names


@pytest.mark.parametrize(
    ("word", "keys"),
    [
        ("lr", ["training.lr"]),
        ("learning-rate", ["training.lr"]),
        ("seed", ["training.seed", "bitflip.base_seed"]),
        ("precision", ["training.dtype"]),
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
    for keys, words in OTHER_WORDS.items():
        assert all(key in KEYS for key in keys)
        assert not set(words) & set(KEYS.values()) - {"seed"}


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


def test_where_nothing_is_near_all_are_named():
    assert near_key("xyzzy", "lora") == f"; known are {', '.join(field_names(SECTIONS['lora']))}"
    assert near_table("xyzzy", is_table=True) == f"; known are {', '.join(SECTIONS)}"


def test_a_key_outside_its_table():
    assert near_table("steps", is_table=False) == " outside a table; did you mean training.steps?"
    assert near_table("save_dir", is_table=False) == " outside a table; did you mean logging.run_dir?"
    assert near_table("trainin", is_table=True) == "; did you mean training?"
