import math
import random
import re
import tomllib
from pathlib import Path

import pytest
import tomli_w
import yaml

from flipproof import BitFlipSpec, Fault, LoraSpec
from flipproof.config import (
    SECTIONS,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    load_config,
    preset_names,
    preset_text,
)
from flipproof.config.sweep import SweepConfig
from flipproof.errors import ConfigError

# The tutorials' configs, verbatim.
TUTORIALS = Path(__file__).parent / "tutorials"
TUTORIAL_70B = (TUTORIALS / "config_70b.toml").read_text()

TUTORIAL_8B = (TUTORIALS / "transform_cfg.toml").read_text()

PRETRAIN_YAML = """
layer_name_to_config:
  default:
    w_p_exp: 7.62939453125e-06
    w_p_frac: 1e-05
    w_seed_exp: 0
    x_zero_out_t: 30.0
  model.layers.0.*: null
  "model.layers.1.*":
    w_p_frac: 0.25
transform_flavor: fc
use_regex: true
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="run.toml"):
        (tmp_path / name).write_text(text, "utf-8")
        return tmp_path / name

    return write


def problems(*arguments):
    with pytest.raises(ConfigError) as error:
        load_config(*arguments)
    return error.value.problems


def test_the_70b_tutorial_is_read_verbatim_key_by_key(write):
    config = load_config([write(TUTORIAL_70B)])
    for section, values in tomllib.loads(TUTORIAL_70B).items():
        for key, value in values.items():
            got = getattr(getattr(config, section), key)
            assert (list(got) if isinstance(got, tuple) else got) == value, (section, key)
    assert config.data.source == "Cheng98/fineweb-edu-1.25B"


def test_the_shipped_70b_preset_is_the_tutorial_and_its_scripts_schedule():
    tutorial = tomllib.loads(TUTORIAL_70B)
    tutorial["training"] |= {"lr_scheduler": "cosine", "control": True}  # its script's, not its TOML's; ours
    assert tomllib.loads(preset_text("70b")) == tutorial


def test_transform_cfg_is_read_as_bitflip_and_lora(write):
    config = load_config([write(TUTORIAL_8B)], {"model": {"hf_model_path": "m"}})
    assert (config.bitflip.w_zero_out_t, config.bitflip.x_zero_out_t) == (1.25, 30.0)
    assert config.bitflip.x_p_frac == 2**-16
    assert config.lora.r == 32
    without = TUTORIAL_8B.replace("use_lora = true", "use_lora = false")
    assert load_config([write(without)], {"model": {"hf_model_path": "m"}}).lora.r == 0


@pytest.mark.parametrize("bare", [False, True])
def test_the_yaml_dialect_is_read_as_overrides(write, bare):
    text = yaml.safe_dump(yaml.safe_load(PRETRAIN_YAML)["layer_name_to_config"]) if bare else PRETRAIN_YAML
    spec = load_config([write(text, "cfg.yaml")], {"model": {"hf_model_path": "m"}}).bitflip
    assert spec.w_p_exp == 2**-17
    assert spec.w_p_frac == 1e-5  # YAML 1.1 takes 1e-05 for text
    assert spec.for_layer("model.layers.0.mlp.up_proj") is None
    other = spec.for_layer("model.layers.1.mlp.up_proj")
    assert (other.w.p_frac, other.w.p_exp, other.x.zero_out_t) == (0.25, 0.0, None)  # entries there are complete
    assert spec.for_layer("model.layers.2.mlp.up_proj").x.zero_out_t == 30.0


def test_the_yaml_dialect_by_exact_names(write):
    text = PRETRAIN_YAML.replace("use_regex: true", "use_regex: false").replace("model.layers.1.*", "a.b")
    spec = load_config([write(text, "cfg.yaml")], {"model": {"hf_model_path": "m"}}).bitflip
    assert spec.for_layer("a.b").w.p_frac == 0.25
    assert spec.for_layer("aXb").w.p_frac == 1e-5


def test_later_files_and_overrides_count(write):
    first, second = write(TUTORIAL_70B), write("[training]\nlr = 1.0\nsteps = 7", "b.toml")
    config = load_config([first, second], {"training": {"lr": "1e-4"}})
    assert (config.training.lr, config.training.steps, config.training.seq_len) == (1e-4, 7, 2048)
    assert config.logging.run_dir == "runs/run"


@pytest.mark.parametrize("text", [TUTORIAL_70B, PRETRAIN_YAML])
def test_the_resolved_config_reads_back_as_itself(write, text):
    path = write(text, "a.toml" if text is TUTORIAL_70B else "a.yaml")
    config = load_config([path], {"model": {"hf_model_path": "m"}, "training": {"lr": "3e-5"}})
    assert load_config([write(config.to_toml(), "resolved.toml")]) == config


def test_all_errors_of_a_file_are_told_together_with_the_nearest_key(write):
    text = """
[model]
flavr = "8B"
hf_model_path = "m"
[training]
lr = "fast"
stpes = 3
r = 4
local_batch_size = 0
[bitflip]
w_p_exp = 0.7
x_zero_out_t = -1
[bitflp]
a = 1
"""
    found = "\n".join(problems([write(text)]))
    for words in (
        "model.flavr: unknown key; did you mean flavor?",
        "training.lr = 'fast': a positive number is allowed",
        "training.stpes: unknown key; did you mean steps?",
        "training.r: unknown key; did you mean lora.r?",
        "training.local_batch_size = 0: a whole number from 1 to 2^63 - 1 is allowed",
        "bitflip.w_p_exp = 0.7: a flip probability from 0 to 0.5 or None is allowed",
        "bitflip.x_zero_out_t = -1: a threshold of at least 0 or None is allowed",
        "[bitflp]: unknown table; did you mean bitflip?",
    ):
        assert words in found
    assert len(found.splitlines()) == 8


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("training", "steps", "2.5", "training.steps = '2.5': a whole number from 1 to 2^63 - 1 or None is allowed"),
        ("training", "dtype", "bf16", "bfloat16"),
        ("training", "tokens_per_parameter", "0", "training.tokens_per_parameter = '0': a positive number"),
        (
            "training",
            "activation_checkpointing",
            "0",
            "training.activation_checkpointing = '0': 'none', 'full', 'selective', 'auto' or a whole number",
        ),
        ("training", "activation_checkpointing", "some", "training.activation_checkpointing = 'some'"),
        ("training", "lr", "-1", "training.lr = '-1'"),
        ("training", "seq_len", "1", "training.seq_len = '1': a whole number from 2"),
        ("data", "held_out_tokens", "0", "data.held_out_tokens = '0'"),
        ("parallelism", "fsdp_degree", "0", "parallelism.fsdp_degree = '0'"),
        ("parallelism", "replicas", "0", "parallelism.replicas = '0'"),
        ("parallelism", "timeout_minutes", "0", "parallelism.timeout_minutes = '0'"),
        ("parallelism", "sharding_strategy", "zero3", "full_shard"),
        ("checkpoint", "state_dict_type", "flat", "sharded"),
        ("lora", "r", "-2", "lora.r = '-2': a whole number from 0 to 2^31 - 1"),
        ("bitflip", "x_zero_out_t", "nan", "bitflip.x_zero_out_t = 'nan'"),
        ("lora", "lora_alpha", "inf", "lora.lora_alpha = 'inf'"),
        ("bitflip", "w_faults", "never", "bitflip.w_faults"),
        ("checkpoint", "keep_last", "0", "checkpoint.keep_last = '0'"),
        ("eval", "trials", "0", "eval.trials = '0'"),
        ("eval", "trials", str(10**20), f"eval.trials = '{10**20}': a whole number from 1 to 1,000,000 is allowed"),
        (
            "training",
            "steps",
            str(2**63),
            f"training.steps = '{2**63}': a whole number from 1 to 2^63 - 1 or None is allowed",
        ),
        ("training", "lr", 10**400, "training.lr = 1000"),
        ("lora", "lora_alpha", "1e308", "lora.lora_alpha = '1e308': a positive number below 2^127"),
        ("lora", "r", str(2**31), f"lora.r = '{2**31}'"),
        ("sweep", "seeds", str(10**20), f"sweep.seeds = '{10**20}': a whole number from 1 to 1,000,000 is allowed"),
        ("sweep", "p", "1e-9:1e-1:99999999999", "from 2 to 10,000"),
    ],
)
def test_values_out_of_range_name_key_value_and_what_is_allowed(section, key, value, words):
    found = problems([], {"model": {"hf_model_path": "m"}, section: {key: value}})
    assert len(found) == 1
    assert words in found[0]


def test_overrides_of_layers_are_read_and_told_as_all_else(write):
    text = """
[model]
hf_model_path = "m"
[bitflip]
w_p_exp = 0.7
[bitflip.w_p_bits]
foo = 0.6
[bitflip.layer_name_to_config]
"(" = false
b = true
[bitflip.layer_name_to_config.a]
x_p = 1
w_p_exp = "much"
x_burst = false
w_p_bits = { sign = 1 }
kv_p_exp = "1e-5"
kv_p_frac = false
"""
    bits = "'sign', 'exp', 'frac', a bit ('15') or a range of bits ('7-14')"
    found = problems([write(text)])
    known = ", ".join(list(SECTIONS["bitflip"].declared())[:45])
    assert found == [
        "bitflip.w_p_exp = 0.7: a flip probability from 0 to 0.5 or None is allowed",
        f"bitflip.w_p_bits key = 'foo': {bits} is allowed",
        "bitflip.w_p_bits 'foo' = 0.6: a flip probability from 0 to 0.5 is allowed",
        "bitflip.layer_name_to_config key = '(': a regular expression is allowed "
        "(missing ), unterminated subpattern at position 0)",
        "bitflip.layer_name_to_config 'b' = True: a table of keys, or false, is allowed",
        f"bitflip.layer_name_to_config 'a'.x_p: unknown key; known are {known}",
        "bitflip.layer_name_to_config 'a'.w_p_exp = 'much': a flip probability from 0 to 0.5 or None is allowed",
        "bitflip.layer_name_to_config 'a'.x_burst = False: a length in bits from 1 to 4,096 is allowed",
        "bitflip.layer_name_to_config 'a'.w_p_bits 'sign' = 1: a flip probability from 0 to 0.5 is allowed",
    ]
    good = "[model]\nhf_model_path = 'm'\n[bitflip.layer_name_to_config.a]\nkv_p_exp = '1e-5'\nkv_p_frac = false"
    assert load_config([write(good)]).bitflip.layer_name_to_config == {"a": {"kv_p_exp": 1e-5, "kv_p_frac": None}}


@pytest.mark.parametrize("value", ["none", "full", "selective", "auto", "3"])
def test_activation_checkpointing_is_a_word_or_a_number(value):
    config = load_config([], {"model": {"hf_model_path": "m"}, "training": {"activation_checkpointing": value}})
    assert config.training.activation_checkpointing == (3 if value == "3" else value)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.toml", "[model\n", "a.toml"),
        ("a.yaml", "a: [1\n", "a.yaml"),
        ("a.yaml", "just text", "holds no tables"),
        ("a.toml", "model = 3\n[x]", "a table is allowed"),
    ],
)
def test_files_that_are_no_config(write, name, text, words):
    assert any(words in problem for problem in problems([write(text, name)]))


def test_a_missing_file_names_the_presets():
    (problem,) = problems(["nowhere.toml"])
    assert "nowhere.toml: No such file" in problem
    assert "demo" in problem


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid(name):
    assert isinstance(load_config([name]), RunConfig)


def test_lists_and_tables_on_the_command_line():
    words = {
        "sites": "head,embedding",
        "w_protected_bits": "sign, 10-12",
        "skip_patterns": "a",
        "include_patterns": "[]",
    }
    tables = {"w_p_bits": '{ exp = 1e-5, "15" = 0 }', "x_p_bits": "{exp: 1e-5, '15': 0}", "kv_p_bits": '{"exp": 1e-5}'}
    spec = load_config([], {"model": {"hf_model_path": "x"}, "bitflip": words | tables}).bitflip
    assert (spec.sites, spec.w_protected_bits, spec.skip_patterns) == (("head", "embedding"), ("sign", "10-12"), ("a",))
    assert spec.include_patterns == ()
    assert spec.w_p_bits == spec.x_p_bits == {"exp": 1e-5, "15": 0}
    assert spec.kv_p_bits == {"exp": 1e-5}
    with pytest.raises(ConfigError) as error:
        load_config([], {"model": {"hf_model_path": "x"}, "bitflip": {"sites": "heads", "w_p_bits": "exp=1"}})
    assert error.value.problems == [
        "bitflip.sites[0] = 'heads': 'linear', 'head' or 'embedding' is allowed",
        "bitflip.w_p_bits = 'exp=1': a table, such as { exp = 1e-5, \"15\" = 0 }, is allowed",
    ]


def over_8b(write, text, name="run.toml"):
    return load_config(["8b", write(text, name)])


def test_what_fc_leaves_out_is_off_whatever_was_said_before(write):
    earlier = write(
        "[bitflip]\nw_p_bits = { exp = 0.1 }\nkv_p_exp = 0.1\nkv_p_frac = 0.1\nkv_burst = 2\nx_faults = 'persistent'\n"
        "base_seed = 5\nskip_patterns = ['gate']\n[bitflip.layer_name_to_config]\n'a' = false\n[lora]\nlora_alpha = 4",
        "earlier.toml",
    )
    config = load_config(["8b", earlier, write("use_lora = true\n[fc]\nw_p_exp = 0.25\n[lora]\nr = 3")])
    assert config.bitflip == BitFlipSpec(w_p_exp=0.25, base_seed=5, skip_patterns=["gate"])
    assert config.lora == LoraSpec(r=3)
    assert over_8b(write, "[fc]\nw_p_exp = 0.25").lora.r == 0  # use_lora is left out
    assert over_8b(write, "[fc]\nw_p_exp = 0.25\n[lora]\nr = 3").lora.r == 3
    assert over_8b(write, "[fc]\n").bitflip == BitFlipSpec()


def test_flags_and_bitflip_of_the_same_file_count_over_fc(write):
    path = write("[fc]\nw_p_exp = 0.25\nw_seed_exp = 3\n[bitflip]\nx_p_frac = 0.5")
    config = load_config(["8b", path], {"bitflip": {"w_zero_out_t": "2"}, "lora": {"r": "1"}})
    assert config.bitflip == BitFlipSpec(w_p_exp=0.25, x_p_frac=0.5, w_zero_out_t=2.0)
    assert config.lora.r == 1


@pytest.mark.parametrize("default", ["{w_p_exp: 0.25}", "null", "{}", None])
def test_what_the_default_entry_leaves_out_is_off(write, default):
    text = "layer_name_to_config:\n  a.*: {w_p_frac: 0.5}\n" + (f"  default: {default}\n" if default else "")
    spec = over_8b(write, text, "a.yaml").bitflip
    p_exp = 0.25 if default == "{w_p_exp: 0.25}" else 0.0
    assert (spec.w, spec.x, spec.kv) == (Fault(p_exp), Fault(), Fault())
    assert spec.for_layer("ab").w == Fault(0.0, 0.5)


def test_use_lora_says_whether_there_are_adapters(write):
    assert load_config(["8b"]).lora.r == 32
    assert over_8b(write, "use_lora = false").lora.r == 0
    assert over_8b(write, "use_lora = true").lora.r == 32
    model = {"model": {"hf_model_path": "m"}}
    path = write("use_lora = true\n[fc]\nw_p_exp = 0.1")
    assert problems([path], model) == [
        f"{path}: use_lora = true: lora.r is not set; the rank of the adapters is needed"
    ]
    assert load_config([path], model | {"lora": {"r": 2}}).lora.r == 2
    assert load_config([path, write("use_lora = false", "b.toml")], model).lora.r == 0
    assert problems([write("use_lora = 1", "c.toml")], model) == [
        f"{path.parent}/c.toml: use_lora = 1: true or false is allowed"
    ]


ODD = [
    "\\x71",
    "\x00\x1f\x7f",
    "a\u00a0b",
    '"',
    "'''",
    "\\",
    "\n",
    "\r\n",
    "\t",
    "é",
    "💡",
    "\u2028",
    "#",
    "a.b",
    "[x]",
    "; ",
    " ",
]


@pytest.mark.parametrize("seed", range(20))
def test_config_toml_reads_back_whatever_it_holds(write, seed):
    """Values drawn from all that a config may hold; the oracle is equality of the whole tree."""
    draw = random.Random(seed)

    def text():
        return "".join(draw.choices([*ODD, "x", "1"], k=draw.randint(1, 4)))

    def number():
        return draw.choice([5e-324, 1e-300, 2**-16, 0.1, 0.5, 0.0, draw.random() / 2])

    def override():
        return draw.choice(
            [
                None,
                {},
                {"w_p_exp": None, "x_p_frac": number()},
                {"w_p_bits": {"15": number(), "7-9": 0}},
                {"x_zero_out_t": math.inf},
            ]
        )

    config = RunConfig(
        model=ModelConfig(hf_model_path=text(), tokenizer=draw.choice([None, text()])),
        training=TrainingConfig(lr=draw.choice([1e-300, 1e22, 3e-5]), seed=draw.choice([0, 2**63 - 1])),
        bitflip=BitFlipSpec(
            w_p_exp=draw.choice([None, number()]),
            w_zero_out_t=draw.choice([None, math.inf, 1e300]),
            w_p_bits=draw.choice([{}, {"exp": number(), "0": number()}]),
            skip_patterns=[text() for _ in range(draw.randint(0, 3))],
            include_patterns=[text() for _ in range(draw.randint(0, 3))],
            layer_name_to_config={re.escape(text()): override() for _ in range(draw.randint(0, 4))},
        ),
        data=DataConfig(source=text(), text_column=text()),
        logging=LoggingConfig(run_dir="r" + text()),
        sweep=SweepConfig(p=[1e-5, "1e-7:1e-3:9", 0.5], layers=draw.choice([text(), [text(), "x"]])),
    )
    assert load_config([write(config.to_toml(), "resolved.toml")]) == config


def test_a_byte_order_mark_and_letters_of_all_kinds(write, tmp_path):
    for name, text in {"a.toml": '[model]\nhf_model_path = "é💡"', "a.yaml": "model: {hf_model_path: é💡}"}.items():
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert load_config([tmp_path / name]).model.hf_model_path == "é💡"
    (tmp_path / "a.toml").write_text("[model]\n", "utf-16")
    assert "a.toml: not a text file in UTF-8" in problems([tmp_path / "a.toml"])[0]


def test_a_home_directory_is_found(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write("[model]\nhf_model_path = 'm'\n[logging]\nrun_dir = '~/runs/a'", "home.toml")
    config = load_config(["~/home.toml"])
    assert config.logging.run_dir == f"{tmp_path}/runs/a"
    assert LoggingConfig(run_dir="~/b").run_dir == f"{tmp_path}/b"
    assert SweepConfig(voltage="~/chip.csv").voltage == f"{tmp_path}/chip.csv"
    assert load_config([], {"model": {"hf_model_path": "m"}, "logging": {"run_dir": "~/c"}}).logging.run_dir == (
        f"{tmp_path}/c"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr:", "training.lr = None: a positive number is allowed"),
        ("steps: 1:30", "training.steps = '1:30': a whole number from 1 to 2^63 - 1 or None is allowed"),
        ("steps: 1e3", "training.steps = 1000.0: a whole number from 1 to 2^63 - 1 or None is allowed"),
        ("steps: 1_000", "training.steps = '1_000': a whole number from 1 to 2^63 - 1 or None is allowed"),
        ("steps: true", "training.steps = True: a whole number from 1 to 2^63 - 1 or None is allowed"),
        ("compile: yes", "training.compile = 'yes': true, false or None is allowed"),
        ("compile: 1", "training.compile = 1: true, false or None is allowed"),
        ("lr: ''", "training.lr is empty: a positive number is allowed"),
        ("lr: .inf", "training.lr = inf: a positive number is allowed"),
        ("lr: .nan", "training.lr = nan: a positive number is allowed"),
        ("max_norm: .inf", "training.max_norm = inf: a number of at least 0, below 2^63, is allowed"),
        ("seed: 9223372036854775808", "training.seed = 9223372036854775808: a seed from 0 to 2^63 - 1 is allowed"),
        ("seed: -1", "training.seed = -1: a seed from 0 to 2^63 - 1 is allowed"),
        ("{lr: 1, lr: 2}", "a.yaml: 'lr' is there twice in"),
        ("[lr]", "training = ['lr']: a table is allowed"),
        ("{1: 2}", "training.1: unknown key"),
    ],
)
def test_odd_values_of_a_yaml_file_are_a_line_each(write, text, words):
    path = write(f"model: {{hf_model_path: m}}\ntraining:\n  {text}\n", "a.yaml")
    (found,) = problems([path])
    assert words in found


def test_an_empty_yaml_table_says_nothing(write):
    path = write("model: {hf_model_path: m}\ntraining:\n", "a.yaml")
    assert load_config([path]).training == TrainingConfig()


def test_a_key_outside_its_table_is_told_its_table(write):
    path = write("steps = 3\nsave_dir = 'x'\nxyzzy = 1\n[model]\nhf_model_path = 'm'")
    assert problems([path]) == [
        f"{path}: steps: unknown key outside a table; did you mean training.steps?",
        f"{path}: save_dir: unknown key outside a table; did you mean logging.run_dir?",
        f"{path}: xyzzy: unknown key; known are {', '.join(SECTIONS)}",
    ]


def test_a_value_that_holds_a_separator_is_one_problem(write):
    (problem,) = problems([write("[model]\nhf_model_path = 'm'\n[bitflip]\nw_faults = 'a; b'")])
    assert "'a; b'" in problem
    (problem,) = problems([write("[model]\nhf_model_path = 'm'\n[bitflip.layer_name_to_config]\n'(a; b' = false")])
    assert problem.startswith("bitflip.layer_name_to_config key = '(a; b': a regular expression is allowed (missing )")


@pytest.mark.parametrize(
    ("earlier", "later", "kept"),
    [
        ({"steps": 9}, {"epochs": "2"}, {"steps": None, "epochs": 2.0}),
        ({"tokens_per_parameter": 9}, {"epochs": "2"}, {"tokens_per_parameter": None, "epochs": 2.0}),
        ({"epochs": 2}, {"steps": "9"}, {"steps": 9, "epochs": None}),
        ({"steps": 9}, {"tokens_per_parameter": "2"}, {"steps": None, "tokens_per_parameter": 2.0}),
        ({"steps": 9}, {"epochs": "null"}, {"steps": 9, "epochs": None}),
        ({"warmup_steps": 9}, {"warmup_ratio": "0.5"}, {"warmup_steps": 0, "warmup_ratio": 0.5}),
        ({"gradient_accumulation_steps": 2}, {"global_batch_size": "8"},
         {"gradient_accumulation_steps": 1, "global_batch_size": 8}),
        ({"dtype": "bfloat16"}, {"precision": "bf16-mixed"}, {"dtype": "float32", "mixed_precision_param": "bfloat16"}),
        ({"precision": "bf16-mixed"}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "mixed_precision_param": None}),
    ],
)  # fmt: skip
def test_what_a_file_said_by_one_word_a_flag_may_say_by_another(write, earlier, later, kept):
    path = write(tomli_w.dumps({"model": {"hf_model_path": "m"}, "training": earlier}))
    training = load_config([path], {"training": later}).training
    assert {key: getattr(training, key) for key in kept} == kept


@pytest.mark.parametrize(
    ("word", "dtype", "computed"),
    [
        ("bf16-true", "bfloat16", None),
        ("bf16-mixed", "float32", "bfloat16"),
        ("16-true", "float16", None),
        ("16-mixed", "float32", "float16"),
        ("32-true", "float32", None),
    ],
)
def test_litgpts_precisions_are_two_dtypes(word, dtype, computed):
    model = {"hf_model_path": "m"}
    named = load_config([], {"model": model, "training": {"precision": word}})
    assert named == load_config([], {"model": model, "training": {"dtype": dtype, "mixed_precision_param": computed}})
    assert "precision =" not in named.to_toml()
