import json
import re

import pytest
import torch

import flipproof
from flipproof.cli import main
from flipproof.config import load_config
from flipproof.errors import ConfigError
from flipproof.generate import Sampling, generate
from flipproof.model import byte_tokenizer

FAULTS = {"w_p_exp": 1e-3, "w_p_frac": 0.01, "w_zero_out_t": 2.0, "x_p_frac": 0.02}


@pytest.fixture
def model_dir(tiny_llama, tmp_path):
    """A model that has seen nothing, and its tokenizer."""
    directory = tmp_path / "model"
    tiny_llama().save_pretrained(directory)
    return directory


def config_of(model_dir, **bitflip):
    return load_config(
        [], {"model": {"hf_model_path": str(model_dir), "tokenizer": "bytes"}, "bitflip": bitflip or FAULTS}
    )


def by_transformers(model, prompt, **how):
    ids = byte_tokenizer()(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(3)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=257, **how)
    return output[0, ids.shape[1] :].tolist()


SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.9}


@pytest.mark.parametrize("sampled", [{}, SAMPLED])
def test_texts_are_those_of_transformers(model_dir, tiny_llama, sampled):
    texts = generate(config_of(model_dir), "def f(", Sampling(max_new_tokens=30, seed=3, **sampled))
    model = tiny_llama().eval()
    clean = by_transformers(model, "def f(", max_new_tokens=30, **sampled)
    flipproof.inject(model, flipproof.BitFlipSpec(**FAULTS, base_seed=1))  # evaluation's first seed
    flipped = by_transformers(model, "def f(", max_new_tokens=30, **sampled)
    assert clean != flipped
    for arm, tokens in (("clean", clean), ("flipped", flipped)):
        assert texts[arm].text == byte_tokenizer().decode(tokens, skip_special_tokens=True)
        assert texts[arm].tokens == texts[arm].passes == len(tokens)
    assert texts["clean"].parts_at is None
    assert texts["flipped"].parts_at == next(i for i, (a, b) in enumerate(zip(clean, flipped, strict=False)) if a != b)


def test_flips_are_counted(model_dir, tiny_llama):
    texts = generate(config_of(model_dir), "abc", Sampling(max_new_tokens=5))
    assert texts["clean"].flipped_bits == {}
    count = 0
    for name, layer in tiny_llama().named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            for tick in range(texts["flipped"].passes):
                y = flipproof.flip(layer.weight, p_exp=1e-3, p_frac=0.01, seed=1, site=f"{name}/w", tick=tick)
                mask = (y.view(torch.int32) ^ layer.weight.view(torch.int32)).long() & 0xFFFFFFFF
                count += sum(v.bit_count() for v in mask.flatten().tolist())
    assert texts["flipped"].flipped_bits["w"] == count
    assert texts["flipped"].flipped_bits["x"] > 0
    assert texts["flipped"].zeroed["w"] > 0


def test_a_logged_text_replays(model_dir, tmp_path):
    sampling = Sampling(max_new_tokens=20, seed=5, **SAMPLED)
    config = config_of(model_dir)
    logged = generate(config, "x = ", sampling, to=tmp_path / "out", flip_log=tmp_path / "flips.jsonl")
    other = config_of(model_dir, **FAULTS, base_seed=50)
    assert generate(other, "x = ", sampling)["flipped"].text != logged["flipped"].text
    assert generate(other, "x = ", sampling, replay=tmp_path / "flips.jsonl")["flipped"].text == logged["flipped"].text
    written = json.loads((tmp_path / "out" / "generate.json").read_text())
    assert written["texts"] == {arm: text.text for arm, text in logged.items()}
    assert written["flips"]["flipped"] == logged["flipped"].flipped_bits
    with pytest.raises(ConfigError, match=r"generate\.json exists already"):
        generate(config, "x = ", sampling, to=tmp_path / "out")


def test_the_command_line_takes_the_papers_flags(model_dir, capsys):
    flags = "--max_new_tokens 12 --do_sample true --temperature 0.6 --top_k 50 --top_p 0.9 --seed 3"
    faults = [f"--bitflip.{key}={value}" for key, value in FAULTS.items()]
    arguments = ["generate", str(model_dir), "--model.tokenizer", "bytes", "--prompt", "London is", *faults]
    assert main([*arguments, *flags.split()]) == 0
    out = capsys.readouterr().out
    assert re.search(r"--- clean ---\nLondon is", out)
    assert re.search(
        r"parts from the clean text at token \d+; in 12 passes [\d,]+ bits of inputs, [\d,]+ bits of w", out
    )
    assert main([*arguments, "--max-new-tokens", "3", "--do_sample"]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--prompt", ""], "--prompt is empty"),
        (["--temperature", "0"], "--temperature 0.0: a positive number is allowed"),
        (["--top_p", "1.5"], "--top_p 1.5: a number above 0, up to 1"),
        (["--top_k", "0"], "--top_k 0: at least 1"),
        (["--max_new_tokens", "0"], "--max_new_tokens 0: at least 1"),
        (["--max_new_tokens", "500"], "the prompt has 2 tokens and the model room for 128; at most 126 is allowed"),
        (["--replay", "nothing.jsonl"], "nothing.jsonl: No such file"),
        (["--model.tokenizer", "nowhere"], "nowhere"),
        (["--temprature", "1"], "--temprature: unknown flag; did you mean --temperature?"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(model_dir, capsys, changes, message):
    arguments = [
        "generate",
        str(model_dir),
        "--model.tokenizer",
        "bytes",
        "--prompt",
        "ab",
        "--bitflip.w_p_frac",
        "0.1",
    ]
    assert main([*arguments, *changes]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert message in lines[0]


def test_no_faults_no_second_text(model_dir):
    config = load_config([], {"model": {"hf_model_path": str(model_dir), "tokenizer": "bytes"}})
    assert list(generate(config, "abc", Sampling(max_new_tokens=3))) == ["clean"]
    with pytest.raises(ConfigError, match="nothing to log"):
        generate(config, "abc", flip_log=model_dir / "log.jsonl")
