import dataclasses
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import flipproof
from flipproof import BitFlipSpec, LoraSpec
from flipproof.config import SECTIONS, load_config
from flipproof.errors import ConfigError
from flipproof.train.resume import (
    RULES,
    Rule,
    check_fixed,
    compare,
    examine_model,
    rule,
    text_fingerprint,
    text_segments,
)
from flipproof.train.rundir import Record
from flipproof.world import World

ALONE = World(0, 1, torch.device("cpu"))
RUN = Path("runs/run")
RECORD = Record("model", 8, ((10, "text"),), "held out")


def config(**changes):
    """``section__key=value``."""
    tree = {
        "model": {"hf_model_path": "base"},
        "lora": {"r": 4},
        "bitflip": {"w_p_frac": 1e-3},
        "training": {"steps": 9},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        tree.setdefault(section, {})[key] = value
    return load_config([], tree)


def difference(record=RECORD, current=None, **changes):
    was, now = config(), config(**changes)
    check_fixed(was, now, RUN)
    return compare(was, now, record, current or RECORD, RUN)


def refusals(record=RECORD, current=None, **changes):
    with pytest.raises(ConfigError) as error:
        difference(record, current, **changes)
    return error.value.problems


def test_every_key_has_a_rule_and_every_rule_a_key():
    keys = {f"{section}.{f.name}" for section, cls in SECTIONS.items() for f in dataclasses.fields(cls)}
    assert all(isinstance(rule(key), Rule) for key in keys)
    assert RULES.keys() <= keys | SECTIONS.keys()


def test_the_same_config_differs_in_nothing():
    assert difference() == difference(record=RECORD, logging__run_dir="elsewhere", parallelism__fsdp_degree=4)
    assert (difference().said, difference().measured) == ([], [])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bitflip__w_p_frac": 0.1}, "bitflip.w_p_frac = 0.1, but the run in runs/run was begun with 0.001"),
        ({"bitflip__x_p_exp": 1e-5}, "bitflip.x_p_exp = 1e-05, but the run in runs/run was begun with None"),
        ({"bitflip__w_zero_out_t": 0.0}, "bitflip.w_zero_out_t = 0.0, but the run in runs/run was begun with None"),
        ({"bitflip__base_seed": 1}, "bitflip.base_seed = 1, but the run in runs/run was begun with 0"),
        (
            {"bitflip__layer_name_to_config": {"a.*": False}},
            "bitflip.layer_name_to_config = {'a.*': None}, but the run in runs/run was begun with {}",
        ),
        ({"lora__r": 8}, "lora.r = 8, but the run in runs/run was begun with 4"),
        ({"lora__lora_alpha": 128.0}, "lora.lora_alpha = 128.0, but the run in runs/run was begun with 32.0"),
        ({"training__seq_len": 64}, "training.seq_len = 64, but the run in runs/run was begun with 2048"),
        ({"training__seed": 1}, "training.seed = 1, but the run in runs/run was begun with 0"),
        (
            {"training__gradient_accumulation_steps": 2},
            "training.gradient_accumulation_steps = 2, but the run in runs/run was begun with 1",
        ),
        (
            {"training__mixed_precision_param": "bfloat16"},
            "training.mixed_precision_param = 'bfloat16', but the run in runs/run was begun with None",
        ),
    ],
)
def test_another_run_is_refused_by_key_old_and_new(change, words):
    assert refusals(**change) == [f"--resume: {words}"]


def test_all_that_is_refused_is_told_at_once():
    assert len(refusals(lora__r=8, training__seed=1, bitflip__w_p_frac=0.1)) == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 12),
        ("lr", 1e-5),
        ("lr_scheduler", "cosine"),
        ("warmup_steps", 3),
        ("weight_decay", 0.1),
        ("max_norm", 0.5),
    ],
)
def test_what_people_change_when_they_go_back_is_allowed_and_said(key, value):
    old = getattr(config().training, key)
    found = difference(**{f"training__{key}": value})
    assert (found.said, found.measured) == ([f"training.{key} = {value!r}, until now {old!r}"], [])


def test_off_is_off_however_it_is_written():
    found = difference(bitflip__x_p_exp=0.0, bitflip__kv_p_row=0.0)
    assert (found.said, found.measured) == ([], [])
    # no adapters, whatever their scale
    was, now = config(lora__r=0), config(lora__r=0, lora__lora_alpha=1.0)
    check_fixed(was, now, RUN)


@pytest.mark.parametrize(("key", "value"), [("num_samples", 3), ("trials", 2), ("until_ci", 0.1), ("max_trials", 7)])
def test_another_evaluation_is_measured_anew(key, value):
    found = difference(**{f"eval__{key}": value})
    assert [line.partition(" =")[0] for line in found.measured] == [f"eval.{key}"]


def test_text_is_compared_by_what_it_holds():
    other = replace(RECORD, text=((10, "edited"),))
    assert refusals(current=other) == [
        "--resume: the training text is another than the one that the run in runs/run was begun with, though no key "
        "that names it has changed"
    ]
    (line,) = refusals(current=other, data__source="b.txt")
    assert line.startswith("--resume: data.source = 'b.txt', but the run in runs/run was begun with 'Cheng98/")
    assert line.endswith("; the training text is another")
    assert difference(data__source="copy.txt").said[0].endswith(": the same training text")
    # a longer run reads on in it
    assert difference(current=replace(RECORD, text=((10, "text"), (5, "more")))) == difference()


def test_other_held_out_text_is_measured_anew():
    found = difference(current=replace(RECORD, held_out="another"), data__eval_source="b.txt")
    assert "the held-out text is another" in found.measured


def test_a_model_is_compared_by_what_it_holds():
    other = replace(RECORD, model="another")
    assert "the base model is another than the one" in refusals(current=other)[0]
    assert refusals(current=other, model__hf_model_path="b", training__dtype="bfloat16") == [
        "--resume: model.hf_model_path = 'b', but the run in runs/run was begun with 'base'; the base model is another",
        "--resume: training.dtype = 'bfloat16', but the run in runs/run was begun with None; the base model is another",
    ]
    assert difference(model__hf_model_path="moved").said == [
        "model.hf_model_path = 'moved', until now 'base': the same base model"
    ]


def test_a_model_from_scratch_is_what_its_config_says():
    scratch = replace(RECORD, model=None)
    assert difference(record=scratch, current=scratch) == difference()
    assert "model.flavor = '8B'" in refusals(record=scratch, current=scratch, model__flavor="8B")[0]


def test_processes_may_share_the_rows_as_they_like():
    assert difference(training__local_batch_size=2) == difference()
    (line,) = refusals(current=replace(RECORD, rows=4))
    assert line == "--resume: training.local_batch_size x processes = 4, but the run in runs/run was begun with 8"


def test_without_a_record_names_count():
    assert difference(record=None) == difference()
    for change in ({"data__source": "b"}, {"model__hf_model_path": "b"}, {"training__local_batch_size": 2}):
        assert len(refusals(record=None, **change)) == 1


# -- fingerprints ------------------------------------------------------------------------------------------------------


def test_the_fingerprint_of_text_is_of_its_tokens():
    tokens = np.arange(2**20 + 6, dtype="<i4").reshape(-1, 2)
    assert text_fingerprint(tokens) == text_fingerprint(tokens.copy())
    for row in (0, 2**18, len(tokens) - 1):  # in the first and the last of the parts that are hashed apart
        other = tokens.copy()
        other[row, 1] ^= 1 << 20
        assert text_fingerprint(other) != text_fingerprint(tokens)
    assert text_fingerprint(tokens[:-1]) != text_fingerprint(tokens)
    assert text_fingerprint(tokens.reshape(2, -1)) != text_fingerprint(tokens)


def test_a_longer_text_begins_with_the_segments_of_a_shorter_one():
    tokens = np.arange(60, dtype="<i4").reshape(20, 3)
    (first,) = text_segments(tokens[:12], ())
    assert first[0] == 12
    assert text_segments(tokens[:12], (12,)) == (first,)
    assert text_segments(tokens, (12,)) == (first, (8, text_fingerprint(tokens[12:])))
    assert text_segments(tokens, (12, 8)) == text_segments(tokens, (12,))
    assert text_segments(tokens + 1, (12,))[0] != first


def test_any_bit_of_a_model_changes_its_fingerprint_and_adapters_do_not(tiny_llama):
    mark, broken = examine_model(tiny_llama(), ALONE)
    assert broken == []
    model = tiny_llama()
    flipproof.inject(model, BitFlipSpec(w_p_frac=0.01), LoraSpec(r=2, lora_alpha=6))
    assert examine_model(model, ALONE) == (mark, [])
    for name, parameter in tiny_llama().named_parameters():
        model = tiny_llama()
        model.get_parameter(name).data.view(torch.int32).view(-1)[parameter.numel() // 2] ^= 1
        assert examine_model(model, ALONE)[0] != mark, name
    assert examine_model(tiny_llama().bfloat16(), ALONE)[0] != mark


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_tensors_that_are_not_finite_are_named(tiny_llama, value):
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    assert examine_model(model, ALONE)[1] == ["model.layers.1.mlp.up_proj.weight"]
