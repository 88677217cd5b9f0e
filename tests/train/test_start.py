import sys
from dataclasses import replace

import pytest
from quantised_models import checkpoint, say
from texts import sentences

from flipproof.cli.main import main
from flipproof.config import load_config
from flipproof.errors import ConfigError
from flipproof.models.load import byte_tokenizer
from flipproof.train.loop import train
from flipproof.train.start import check, resolve_batch, resolve_steps


@pytest.fixture
def config(tiny_llama, tmp_path):
    """Of a model without weights."""
    tiny_llama().config.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text(sentences())
    return load_config(
        [],
        {
            "model": {"hf_model_path": str(tmp_path / "base")},
            "training": {"seq_len": 32, "local_batch_size": 3, "gradient_accumulation_steps": 2, "steps": 50},
            "lora": {"r": 2},
            "bitflip": {"w_p_frac": 0.01},
            "data": {"source": str(tmp_path / "text.txt")},
            "logging": {"run_dir": str(tmp_path / "run")},
        },
    )


def parts(config, **sections):
    return replace(config, **{name: replace(getattr(config, name), **keys) for name, keys in sections.items()})


def test_what_a_run_takes_is_said_without_weights_or_a_file(config, tiny_llama, tmp_path, caplog):
    caplog.set_level("INFO")
    before = sorted(tmp_path.rglob("*"))
    check(config)
    assert sorted(tmp_path.rglob("*")) == before
    model = tiny_llama()
    layers = [layer for name, layer in model.named_modules() if name.endswith("_proj")]
    adapters = sum(2 * (layer.in_features + layer.out_features) for layer in layers)
    total = sum(parameter.numel() for parameter in model.parameters()) + adapters
    share = f"{100 * adapters / total:.3g}%"
    assert f"{total:,} parameters, of which {adapters:,} train ({share})" in caplog.messages
    # a byte is a token, and the last tenth of the text is held out
    passes = 50 * 3 * 2 * 32 / (0.9 * len(sentences().encode()))
    (line,) = (line for line in caplog.messages if line.startswith("a step takes 6 sequences of 32 tokens"))
    assert line.endswith(
        "(local_batch_size 3 x processes 1 x gradient_accumulation_steps 2); 50 steps take 9,600 tokens, "
        + ("at most one pass over the text" if passes <= 1 else f"{passes:.1f} passes over the text")
    )
    assert f"all of it is written into {tmp_path / 'run'}" in caplog.messages


def test_a_quantised_checkpoint_is_seen_as_it_will_be_read(config, tiny_llama, tmp_path, caplog):
    """From what its config.json says, its own layers left out."""
    caplog.set_level("INFO")
    left = "model.layers.0.self_attn.q_proj"
    checkpoint(tiny_llama(), tmp_path / "base", "compressed-tensors", "int8", without=(left,))
    codes = parts(config, bitflip={"w_p_frac": None, "w_code_p": 0.01, "skip_patterns": (left,)})
    check(codes)
    line, *_ = (line for line in caplog.messages if "faulty linear layers cover" in line)
    size = [line for line in caplog.messages if "parameters, of which" in line]
    caplog.clear()
    train(parts(codes, training={"steps": 1}, eval={"num_samples": 2, "trials": 1}))
    assert line in caplog.messages
    assert [line for line in caplog.messages if "parameters, of which" in line] == size
    for wrong, words in (
        ({"bitflip": {"skip_patterns": (left,)}}, r"bitflip\.w_p_frac = 0\.01: the weights are int8"),
        ({"lora": {"r": 0}, "bitflip": {"w_p_frac": None}}, r"lora\.r = 0: the weights are int8, which do not train"),
        ({"training": {"compile": True}, "bitflip": {"w_p_frac": None}}, r"training\.compile = True: .* quantised"),
    ):
        with pytest.raises(ConfigError, match=words):
            check(parts(config, **wrong))


@pytest.mark.parametrize("said", [{"quant_method": "foo"}, {"quant_method": "compressed-tensors", "ignore": 5}])
def test_of_what_transformers_alone_may_read_a_dry_run_says_so(config, tmp_path, caplog, said):
    say(tmp_path / "base", said)
    check(config)
    assert any("is quantised in a way that transformers may read or not" in line for line in caplog.messages)


def test_keys_that_say_nothing_are_told(config, caplog):
    check(parts(config, lora={"r": 0, "dropout": 0.1}, data={"packing": False}))
    vain = [line for line in caplog.messages if "says nothing" in line]
    assert vain == [
        "data.packing = False says nothing: this is text, and no instruction data",
        "lora.dropout = 0.1 says nothing: lora.r = 0 makes no adapters",
    ]
    caplog.clear()
    check(parts(config, lora={"dropout": 0.1}))
    assert not [line for line in caplog.messages if "says nothing" in line]


def test_adapters_that_train_without_any_fault_are_told(config, caplog):
    check(parts(config, bitflip={"w_p_frac": None}))
    line = "no faults are configured (bitflip.w_p_exp and more): the adapters train without any"
    assert caplog.messages.count(line) == 1
    caplog.clear()
    check(config)
    check(parts(config, bitflip={"w_p_frac": None, "w_zero_out_t": 8.0}))  # a guard is something
    check(parts(config, bitflip={"w_p_frac": None}, lora={"r": 0}, training={"dtype": "float32"}))
    assert line not in caplog.messages


def test_distillation_is_told(config, caplog):
    caplog.set_level("INFO")
    line = "a step runs the model once more, without faults, to distil from it (training.distill)"
    check(config)
    assert line not in caplog.messages
    check(parts(config, training={"distill": 0.5}))
    assert line in caplog.messages


def test_of_a_short_text_the_passes_are_counted(config, caplog):
    caplog.set_level("INFO")
    check(parts(config, data={"max_tokens": 4800}))
    assert any("9,600 tokens, 2.0 passes over the text" in line for line in caplog.messages)


def test_processes_are_those_that_the_config_asks_for_or_that_were_started(config, monkeypatch, caplog):
    caplog.set_level("INFO")
    sharded = parts(config, parallelism={"fsdp_degree": 4})
    check(sharded)
    assert any("a step takes 24 sequences" in line and "x processes 4" in line for line in caplog.messages)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were started, but"):
        check(sharded)


def test_a_budget_of_tokens_is_a_number_of_steps_before_there_are_weights(config, tiny_llama, caplog):
    caplog.set_level("INFO")
    parameters = sum(parameter.numel() for parameter in tiny_llama().parameters())
    check(parts(config, training={"steps": None, "tokens_per_parameter": 6.5 * 3 * 2 * 32 / parameters}))
    assert any("; 7 steps take" in line for line in caplog.messages)


def test_a_global_batch_is_accumulated(config, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check(parts(config, training={"global_batch_size": 24, "gradient_accumulation_steps": 1}))
    line = "a step takes 24 sequences of 32 tokens (local_batch_size 3 x processes 2 x gradient_accumulation_steps 4)"
    assert any(said.startswith(line) for said in caplog.messages)
    # LitGPT's example: 512 in micro-batches of 2 on 8 devices
    training = replace(config.training, global_batch_size=512, local_batch_size=2, gradient_accumulation_steps=1)
    assert resolve_batch(replace(config, training=training), 8).training.gradient_accumulation_steps == 32


def test_a_length_in_epochs_is_known_with_the_text(config, caplog):
    caplog.set_level("INFO")
    by_epochs = parts(config, training={"steps": None, "epochs": 2.5})
    check(by_epochs)
    assert any(line.endswith("; it takes 2.5 passes over the text; the steps are known once it is tokenised")
               for line in caplog.messages)  # fmt: skip
    for epochs, sequences, steps in ((2.5, 100, 42), (3, 24, 12), (0.3, 60, 3), (1, 1, 1)):  # of 6 sequences a step
        by_epochs = parts(config, training={"steps": None, "epochs": epochs})
        assert resolve_steps(by_epochs, 0, 1).training.steps is None
        resolved = resolve_steps(by_epochs, 0, 1, sequences).training
        assert (resolved.steps, resolved.epochs) == (steps, None)


@pytest.mark.parametrize(
    ("ratio", "steps", "warmup"), [(0.2, 7075, 1415), (0.2, 45712, 9142), (0.29, 100, 29), (0.0, 9, 0), (1.0, 9, 9)]
)
def test_a_share_of_the_steps_is_warm_up(config, ratio, steps, warmup):
    """The second is AICrossSim's 400M, of 9142.4 rounded down; the third is less in floating point."""
    resolved = resolve_steps(parts(config, training={"steps": steps, "warmup_ratio": ratio}), 0, 1).training
    assert (resolved.warmup_steps, resolved.warmup_ratio) == (warmup, None)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"hf_model_path": "no/such"}}, r"model\.hf_model_path = 'no/such': no local directory"),
        ({"model": {"flavor": "8B"}}, r"model\.flavor = '8B' has hidden_size 4096"),
        ({"model": {"tokenizer": "no/such"}}, r"model\.tokenizer = 'no/such'"),
        ({"training": {"seq_len": 129}}, r"training\.seq_len = 129: the model has 128 positions"),
        ({"data": {"source": "no-such.txt"}}, r"data source 'no-such\.txt' is no file or folder here"),
        ({"data": {"source": "no/such-data"}}, r"data source 'no/such-data' cannot be reached as a Hub data set"),
        ({"data": {"eval_source": "no-such.txt"}}, r"data source 'no-such\.txt' is no file or folder here"),
        ({"data": {"bos": True}}, r"data\.bos = True"),
        ({"lora": {"r": 0}, "training": {"dtype": "bfloat16"}}, r"AdamW cannot train bfloat16 weights"),
        ({"bitflip": {"skip_patterns": ["proj"]}}, r"skip_patterns"),
        (
            {"training": {"distill": 0.5}, "lora": {"r": 0}},
            r"distill = 0\.5 with lora\.r = 0: .*0 is allowed, or lora\.r",
        ),
        (
            {"training": {"global_batch_size": 16}},
            r"global_batch_size = 16: a multiple of local_batch_size x processes = 3 x 1 = 3 is allowed$",
        ),
        ({"training": {"global_batch_size": 2}}, r"global_batch_size = 2: a multiple of"),
        (
            {"training": {"global_batch_size": 12}},
            r"gradient_accumulation_steps = 2: global_batch_size = 12 with local_batch_size x processes = 3 x 1 is 4; ",
        ),
        ({"training": {"distill": 1.0}, "model": {"init": "random"}}, r"distill = 1 with model\.init = 'random'"),
    ],
)
def test_what_would_keep_a_run_from_beginning_is_found(config, sections, words):
    with pytest.raises(ConfigError, match=words):
        check(parts(config, **sections))


def test_all_that_is_wrong_is_told_at_once(config, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    (tmp_path / "file").touch()
    broken = parts(
        config,
        training={"seq_len": 129},
        data={"source": "no-such.txt"},
        logging={"run_dir": str(tmp_path / "file" / "run"), "wandb": "online"},
    )
    with pytest.raises(ConfigError) as error:
        check(broken)
    assert len(error.value.problems) == 4
    for words in ("seq_len", "no-such.txt", "is not a directory", "needs the package wandb"):
        assert any(words in problem for problem in error.value.problems)


def test_weights_and_biases_is_asked(config, monkeypatch):
    """Whether it lets the user in; the run would be refused as well."""
    monkeypatch.setattr("flipproof.train.start.log_in", lambda _: (_ for _ in ()).throw(ConfigError(["no key"])))
    with pytest.raises(ConfigError, match="no key"):
        check(config)


def test_a_dry_run_prints_its_config_and_then_what_is_wrong(config, tmp_path, capsys):
    (tmp_path / "config.toml").write_text(config.to_toml())
    assert main(["train", "--config", str(tmp_path / "config.toml"), "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert out == config.to_toml()
    assert "parameters, of which" in err
    assert main(["train", "--config", str(tmp_path / "config.toml"), "--dry-run", "--data.source", "gone.txt"]) == 2
    out, err = capsys.readouterr()
    assert 'source = "gone.txt"' in out
    assert err.splitlines()[-1] == (
        "flipproof train: error: data source 'gone.txt' is no file or folder here, and no Hub data set is named so"
    )


def test_a_directory_that_holds_a_run_is_refused_unless_it_is_resumed(config, tmp_path):
    (tmp_path / "run" / "checkpoints" / "step-5").mkdir(parents=True)
    (tmp_path / "run" / "config.toml").write_text(config.to_toml())
    with pytest.raises(ConfigError, match="holds a run already"):
        check(config)
    check(config, "auto")
    with pytest.raises(ConfigError, match=r"training\.steps = 4, but .*step-5 has done 5"):
        check(parts(config, training={"steps": 4}), "step-5")
    with pytest.raises(ConfigError, match=r"lora\.r = 3, .* begun with 2"):
        check(parts(config, lora={"r": 3}), "auto")
    with pytest.raises(ConfigError, match=r"--resume step-6: .* holds step-5"):
        check(config, "step-6")
