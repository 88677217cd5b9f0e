import logging
from typing import get_origin

import pytest

from flipproof.config import SECTIONS, load_config, split_overrides
from flipproof.config.names import KEYS
from flipproof.errors import ConfigError
from flipproof.values import bare


def test_keys_are_split_off_a_command_line():
    argv = [
        "--config",
        "a",
        "--training.lr",
        "-1",
        "--lora.r=2",
        "--steps",
        "3",
        "--data.source=--x=y",
        "--prompt=a.b c",
    ]
    overrides, rest = split_overrides(argv)
    assert overrides == {"training": {"lr": "-1"}, "lora": {"r": "2"}, "data": {"source": "--x=y"}}
    assert rest == ["--config", "a", "--steps", "3", "--prompt=a.b c"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--training.lr"], ["--training.lr: a value is missing"]),
        (["--training.lr="], ["--training.lr: a value is missing"]),
        (["--training.lr", ""], ["--training.lr: a value is missing"]),
        (["--training.steps", "--training.lr", "1"], ["--training.steps: a value is missing"]),
        (["--trainin.lr", "1"], ["--trainin.lr: unknown flag; did you mean --training.lr?"]),
        (["--train.micro_batch_size", "1"],
         ["--train.micro_batch_size: unknown flag; did you mean --training.local_batch_size?"]),
        (["--default_bitflip_config.x_p_exp=null"],
         ["--default_bitflip_config.x_p_exp: unknown flag; did you mean --bitflip.x_p_exp?"]),
        (["--trainin.xyzzy=1", "--lora.r"],
         ["--trainin.xyzzy: unknown flag; did you mean --training.xyzzy?", "--lora.r: a value is missing"]),
        (["--a.xyzzy=1"], [f"--a.xyzzy: unknown flag; known are {', '.join(f'--{name}.…' for name in SECTIONS)}"]),
    ],
)  # fmt: skip
def test_flags_that_set_nothing_are_a_line_each(argv, expected):
    with pytest.raises(ConfigError) as error:
        split_overrides(argv)
    assert error.value.problems == expected


def test_the_last_of_two_counts_and_a_line_says_so(caplog):
    with caplog.at_level(logging.WARNING, "flipproof"):
        overrides, _ = split_overrides(["--lora.r", "2", "--training.lr=1", "--lora.r=3", "--training.lr", "1"])
    assert overrides == {"lora": {"r": "3"}, "training": {"lr": "1"}}
    assert caplog.messages == ["--lora.r: given twice, '2' and '3'; the last one counts"]


def test_keys_are_spelled_with_dashes_too_and_by_other_words():
    argv = [
        "--training.local-batch-size",
        "2",
        "--data.source=a-b",
        "--Learning-Rate=1e-4",
        "--to-do",
        "x",
        "--",
        "--lora.r",
    ]
    overrides, rest = split_overrides(argv, {"learning_rate": "training.lr"})
    assert overrides == {"training": {"local_batch_size": "2", "lr": "1e-4"}, "data": {"source": "a-b"}}
    assert rest == ["--to-do", "x", "--", "--lora.r"]


def test_a_truth_without_a_value_is_true():
    argv = ["--training.compile", "runs/x", "--logging.profile", "--parallelism.cpu_offload", "false"]
    overrides, rest = split_overrides(argv)
    assert rest == ["runs/x"]
    assert overrides == {
        "training": {"compile": "true"},
        "logging": {"profile": "true"},
        "parallelism": {"cpu_offload": "false"},
    }


LISTS = [
    key
    for key, name in KEYS.items()
    if {list, tuple} & {get_origin(kind) for kind in bare(SECTIONS[key.partition(".")[0]].declared()[name])}
]


def read(key, text):
    """What a config has of a flag that sets a key."""
    flags = ["--model.hf_model_path=m", "--lora.r=1", f"--{key}", text]
    section, _, name = key.partition(".")
    return getattr(getattr(load_config([], split_overrides(flags)[0]), section), name)


@pytest.mark.parametrize("key", LISTS)
def test_every_list_is_given_with_commas_in_brackets_and_in_toml(key):
    """Down to those that are written as one text, whose parts are its own."""
    words = {"sites": "head,embedding", "protection": "none,guard", "p": "1e-5,1e-4", "formats": "int4,nf4"}.get(
        KEYS[key], "15,7"
    )
    first, last = words.split(",")
    as_toml = read(key, f'["{first}", "{last}"]')
    assert list(as_toml) == [first, last]
    for text in (words, f"[{words}]", f"[ {first} , {last} ]", f"['{first}', {last}]"):
        found = read(key, text)
        parts = found.split(",") if isinstance(found, str) else [str(part) for part in found]
        assert [part.replace("1e-05", "1e-5").replace("0.0001", "1e-4") for part in parts] == [first, last]
    for text in (f"[{words}", f"{words}]"):
        with pytest.raises(ConfigError, match=rf"^{key} = .* is allowed \(a bracket or a quote is not closed\)$"):
            read(key, text)
