"""Adapters that the installed PEFT writes, against what it makes of them itself."""

import json
import shutil
import warnings

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import flipproof
from flipproof import BitFlipSpec, LoraSpec
from flipproof.errors import ConfigError
from flipproof.models.adapter import load_adapter
from flipproof.models.peft_format import read_adapter

LINEAR = BitFlipSpec(w_p_frac=0.1)
ALL = BitFlipSpec(w_p_frac=0.1, sites=("linear", "head"))
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def base(tiny_llama, tmp_path):
    """The directory of a base model."""

    def make(**changes):
        tiny_llama(**changes).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return make


def written_by_peft(base, directory, save=None, **config):
    """An adapter that does something, in ``directory``."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**{"r": 4} | config))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    (save or PeftModel.save_pretrained)(model, directory)
    return directory


def edit(directory, **changes):
    path = directory / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_merged_as_peft_does(base, directory, spec=LINEAR):
    """Both weights are W + s·B·A after r + 3 roundings at most (r products, s, times s, plus W): so far are they
    apart at most."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory).merge_and_unload()
    mine = AutoModelForCausalLM.from_pretrained(base)
    adapter = read_adapter(directory)
    flipproof.inject(mine, spec, adapter.specs)
    load_adapter(mine, directory)
    layers = flipproof.faulty_layers(mine)
    assert {name for name, layer in layers.items() if layer.lora_A is not None} == set(adapter.matrices)
    bounds = {}
    for name, both in adapter.matrices.items():
        size = layers[name].lora.scaling * both["B"].double().abs() @ both["A"].double().abs()
        bounds[f"{name}.weight"] = 2 * (layers[name].lora.r + 3) * 2.0**-24 * (layers[name].weight.abs() + size)
        assert (layers[name].merged_weight() - layers[name].weight).abs().max() > 1e-3
    flipproof.merge(mine)
    expected = theirs.state_dict()
    if mine.lm_head.weight is not mine.model.embed_tokens.weight:
        # where the two were tied, PEFT merges into both
        expected["model.embed_tokens.weight"] = AutoModelForCausalLM.from_pretrained(base).model.embed_tokens.weight
    for name, tensor in mine.state_dict().items():
        assert ((tensor - expected[name]).abs() <= bounds.get(name, torch.zeros(()))).all(), name
    return adapter


FORMS = {
    "suffixes": {"target_modules": ["q_proj", "v_proj"]},
    "a pattern": {"target_modules": r".*\.layers\.1\..*(up|down)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "some blocks": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "one block": {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "some left out": {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    "left out by pattern": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.0\..*k_proj"},
    "ranks": {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7}},
    "scalings": {"target_modules": "all-linear", "alpha_pattern": {"q_proj": 3, "^model.layers.0.mlp.up_proj": 40}},
    "rank-stabilised": {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "lora_alpha": 16, "r": 3},
    "rank-stabilised ranks": {
        "target_modules": ["q_proj", "up_proj"],
        "use_rslora": True,
        "rank_pattern": {"up_proj": 9},
    },
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "mica": {"target_modules": ["q_proj"], "init_lora_weights": "mica"},
    "not zero at first": {"target_modules": ["q_proj"], "init_lora_weights": False},
    "dropout": {"target_modules": ["q_proj"], "lora_dropout": 0.3},
}


def test_dropout_and_scaling_are_read_as_peft_says_them(base, tmp_path):
    config = {"target_modules": ["q_proj"], "lora_dropout": 0.3, "use_rslora": True, "lora_alpha": 16, "r": 3}
    specs = read_adapter(written_by_peft(base(), tmp_path / "a", **config)).specs
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert specs == dict.fromkeys(names, LoraSpec(r=3, lora_alpha=16, dropout=0.3, use_rslora=True))
    edit(tmp_path / "a", lora_dropout=1.5)
    with pytest.raises(ConfigError, match=r"lora_dropout = 1\.5: a number of at least 0, below 1, is allowed"):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize("form", FORMS)
def test_what_peft_writes_is_merged_as_peft_does(base, tmp_path, form):
    directory = base()
    assert_merged_as_peft_does(directory, written_by_peft(directory, tmp_path / "a", **FORMS[form]))


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_of_the_head_comes_with_a_copy_of_its_weight(base, tmp_path, tied):
    directory = base(tie_word_embeddings=tied)
    adapter = written_by_peft(directory, tmp_path / "a", target_modules=["lm_head", "q_proj"])
    assert "base_model.model.lm_head.base_layer.weight" in load_file(adapter / WEIGHTS)
    assert_merged_as_peft_does(directory, adapter, ALL)
    # which may have been rounded, but is no other
    model = AutoModelForCausalLM.from_pretrained(directory)
    flipproof.inject(model, ALL, read_adapter(adapter).specs)
    tensors = load_file(adapter / WEIGHTS)
    copy = tensors["base_model.model.lm_head.base_layer.weight"]
    save_file(tensors | {"base_model.model.lm_head.base_layer.weight": copy.bfloat16()}, adapter / WEIGHTS)
    load_adapter(model, adapter)
    save_file(tensors | {"base_model.model.lm_head.base_layer.weight": copy + 0.01}, adapter / WEIGHTS)
    with pytest.raises(ConfigError, match=r"lm_head\.weight is another one than the model's"):
        load_adapter(model, adapter)


def old_format(model, directory):
    model.save_pretrained(directory, safe_serialization=False)


def whole_state(model, directory):
    """What a training loop of one's own writes: the names hold that of the adapter."""
    model.save_pretrained(directory)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" in name}
    assert any(".default." in name for name in state)
    save_file(state, directory / WEIGHTS)


def by_transformers(model, directory):
    plain = AutoModelForCausalLM.from_pretrained(model.peft_config["default"].base_model_name_or_path)
    plain.add_adapter(model.peft_config["default"])
    plain.load_state_dict({name.removeprefix("base_model.model."): t for name, t in model.state_dict().items()})
    plain.save_pretrained(directory)


@pytest.mark.parametrize("save", [old_format, whole_state, by_transformers])
def test_adapters_in_other_files_are_merged_as_peft_does(base, tmp_path, save):
    directory = base()
    adapter = written_by_peft(directory, tmp_path / "a", save, target_modules=["q_proj", "up_proj"])
    assert (adapter / WEIGHTS).exists() == (save is not old_format)
    found = read_adapter(adapter)
    if save is whole_state:  # which PEFT itself does not read
        save_file(
            {
                f"base_model.model.{name}.lora_{matrix}.weight": tensor
                for name, both in found.matrices.items()
                for matrix, tensor in both.items()
            },
            adapter / WEIGHTS,
        )
    again = assert_merged_as_peft_does(directory, adapter)
    for name, both in found.matrices.items():
        assert all(torch.equal(again.matrices[name][matrix], tensor) for matrix, tensor in both.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adapters_are_read(base, tmp_path, dtype):
    directory = base()
    adapter = written_by_peft(directory, tmp_path / "a", target_modules=["q_proj"])
    save_file({name: tensor.to(dtype) for name, tensor in load_file(adapter / WEIGHTS).items()}, adapter / WEIGHTS)
    assert_merged_as_peft_does(directory, adapter)


def test_adapters_are_found_on_the_hub_and_at_home(base, tmp_path, monkeypatch):
    adapter = written_by_peft(base(), tmp_path / "home/adapters/mine", target_modules=["q_proj"])
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert read_adapter("~/adapters/mine").specs == read_adapter(adapter).specs
    fetched = []

    def snapshot_download(repo, allow_patterns):
        fetched.append((repo, allow_patterns))
        return str(adapter)

    with monkeypatch.context() as patched:
        patched.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        assert read_adapter("hers/adapter-1").specs == read_adapter(adapter).specs
    assert fetched == [("hers/adapter-1", [CONFIG, WEIGHTS, "adapter_model.bin"])]
    # what the Hub says is passed on
    refused("hers/adapter-2", r"--adapter = 'hers/adapter-2': .*the Hub did not give an adapter.*HF_HUB_OFFLINE is set")
    refused("./hers/adapter", r"adapter \./hers/adapter: adapter_config\.json is missing")


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.fixture
def plain(base, tmp_path):
    return written_by_peft(base(), tmp_path / "a", target_modules=["q_proj"])


def refused(adapter, words):
    with pytest.raises(ConfigError, match=words) as caught:
        read_adapter(adapter)
    assert all("\n" not in problem for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa', which changes the base model"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora'"),
        ({"use_dora": True}, "it uses use_dora"),
        ({"modules_to_save": ["lm_head"]}, "it uses modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "it uses trainable_token_indices"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "it uses layer_replication"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, r"it holds .*embed_tokens\.lora_embedding_A"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_peft_writes_beyond_lora_is_refused_by_name(base, tmp_path, config, words):
    refused(written_by_peft(base(), tmp_path / "a", **{"target_modules": ["q_proj"]} | config), words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init_lora_weights": "corda"}, "init_lora_weights = 'corda'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights = 'loftq'"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights = 'lora_ga'"),
        ({"init_lora_weights": "of_next_year"}, "init_lora_weights = 'of_next_year'"),
        ({"bias": "lora_only"}, "bias = 'lora_only'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"target_parameters": ["a"]}, "target_parameters"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"arrow_config": {"top_k": 2}, "kasa_config": {"a": 1}}, "it uses arrow_config, kasa_config"),
        ({"of_next_year": 3}, "of_next_year"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"r": "8"}, "r = '8': a positive integer is allowed"),
        ({"r": True}, "r = True"),
        ({"r": 0}, "r = 0"),
        ({"lora_alpha": None}, "lora_alpha = None: a positive number is allowed"),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan"),
        ({"rank_pattern": {"q_proj": 1.5}}, r"rank_pattern = \{'q_proj': 1.5\}: a positive integer by pattern"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern = "),
        ({"alpha_pattern": [1]}, r"alpha_pattern = \[1\]"),
        ({"target_modules": 3}, "target_modules = 3"),
        ({"target_modules": "("}, "target_modules = "),
        ({"layers_to_transform": "all"}, "layers_to_transform = 'all'"),
        ({"layers_pattern": 3}, "layers_pattern = 3"),
        ({"r": 8}, r"q_proj has rank 8 by adapter_config.json, and lora_A of shape \(4, 32\)"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_a_config_says_beyond_lora_is_refused_by_name(plain, changes, words):
    edit(plain, **changes)
    refused(plain, words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", r"adapter_config\.json is damaged: it holds \[\], not an object"),
        ("{", r"adapter_config\.json is damaged"),
        ("\udcff", r"adapter_config\.json is damaged"),
        ('{"peft_type": "LORA", "lora_alpha": 8}', r"adapter_config\.json: r is missing"),
        ('{"peft_type": "LORA", "r": 8}', r"adapter_config\.json: lora_alpha is missing"),
        ("{}", "peft_type is None"),
    ],
)
def test_damaged_configs_are_told(plain, content, words):
    (plain / CONFIG).write_text(content, errors="surrogateescape")
    refused(plain, words)


def test_damaged_tensors_are_told(plain, tmp_path):
    tensors = load_file(plain / WEIGHTS)
    key = min(tensors)

    def saved(changes):
        save_file({name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}, plain / WEIGHTS)

    saved({key: None})
    refused(plain, r"q_proj\.lora_A is missing")
    saved({key: tensors[key].to(torch.int8)})
    refused(plain, "int8")
    saved({key: torch.full_like(tensors[key], float("inf"))})
    refused(plain, r"q_proj\.lora_A holds values that are not finite")
    saved({key: tensors[key][None]})
    refused(plain, r"lora_A of shape \(1, 4, 32\)")
    saved({"base_model.model.x.lora_magnitude_vector": torch.ones(1)})
    refused(plain, "it holds base_model.model.x.lora_magnitude_vector")
    saved({key.replace("lora_A.weight", "lora_A.other.weight"): tensors[key].clone()})
    refused(plain, "it holds 2 adapters")
    saved(dict.fromkeys(tensors))
    refused(plain, "it holds no lora_A and lora_B")
    (plain / WEIGHTS).write_bytes(b"short")
    refused(plain, r"adapter_model\.safetensors is missing or damaged")
    (plain / WEIGHTS).unlink()
    refused(plain, r"adapter_model\.safetensors is missing or damaged")
    (plain / "adapter_model.bin").write_bytes(b"short")
    refused(plain, r"adapter_model\.bin is missing or damaged")
    torch.save([1], plain / "adapter_model.bin")
    refused(plain, r"adapter_model\.bin is damaged")
    torch.save({"a": shutil.rmtree}, plain / "adapter_model.bin")  # a pickle that does something is not opened
    refused(plain, r"adapter_model\.bin is missing or damaged")
    refused(tmp_path / "nowhere", r"adapter_config\.json is missing")


def test_an_adapter_may_be_of_layers_without_faults(base, tmp_path, tiny_llama):
    head = written_by_peft(base(), tmp_path / "head", target_modules=["lm_head"])
    assert_merged_as_peft_does(tmp_path / "base", head)
    skipped = written_by_peft(base(), tmp_path / "q", target_modules=["q_proj"])
    assert_merged_as_peft_does(tmp_path / "base", skipped, BitFlipSpec(w_p_frac=0.1, skip_patterns=("q_",)))
    model = tiny_llama()
    coverage = flipproof.inject(model, LINEAR, read_adapter(head).specs)
    assert coverage.skipped == {"lm_head": "an adapter, no faults"}
    assert not any(fault.active for fault in (model.lm_head.w_fault, model.lm_head.x_fault))


def test_layers_that_are_not_there_are_told(plain, tiny_llama):
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.self_attn\.q_proj \(no such nn\.Linear\)"):
        flipproof.inject(tiny_llama(num_hidden_layers=1), ALL, read_adapter(plain).specs)


def test_an_adapter_made_for_another_model_is_told(plain, tiny_llama):
    edit(plain, base_model_name_or_path="hers/model")
    for changes, words in (
        ({"num_hidden_layers": 3}, r"layers\.2\.self_attn\.q_proj\.lora_A is missing"),
        ({"hidden_size": 48, "head_dim": 16}, r"q_proj\.lora_A has shape \(4, 32\), the model's layer has \(4, 48\)"),
    ):
        model = tiny_llama(**changes)
        flipproof.inject(model, ALL, read_adapter(plain).specs)
        before = [parameter.clone() for parameter in model.parameters()]
        with pytest.raises(ConfigError, match=f"{words}.*it was made for 'hers/model'"):
            load_adapter(model, plain)
        assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))
