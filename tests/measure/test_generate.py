import json
import re

import pytest
import torch

import flipproof
from flipproof.cli.main import main
from flipproof.config import load_config
from flipproof.errors import ConfigError
from flipproof.measure.generate import Sampling, generate
from flipproof.models.adapter import save_adapter
from flipproof.models.load import byte_tokenizer

FAULTS = {"w_p_exp": 1e-3, "w_p_frac": 0.005, "w_zero_out_t": 2.0, "x_p_frac": 0.005}


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
    texts = generate(config_of(model_dir), "def f(", Sampling(max_new_tokens=16, seed=3, **sampled))
    model = tiny_llama().eval()
    clean = by_transformers(model, "def f(", max_new_tokens=16, **sampled)
    flipproof.inject(model, flipproof.BitFlipSpec(**FAULTS, base_seed=1))  # evaluation's first seed
    flipped = by_transformers(model, "def f(", max_new_tokens=16, **sampled)
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
                y = flipproof.flip(layer.weight, p_exp=1e-3, p_frac=0.005, seed=1, site=f"{name}/w", tick=tick)
                mask = (y.view(torch.int32) ^ layer.weight.view(torch.int32)).long() & 0xFFFFFFFF
                count += sum(v.bit_count() for v in mask.flatten().tolist())
    assert texts["flipped"].flipped_bits["w"] == count
    assert texts["flipped"].flipped_bits["x"] > 0
    assert texts["flipped"].zeroed["w"] > 0


def test_a_logged_text_replays(model_dir, tmp_path):
    sampling = Sampling(max_new_tokens=8, seed=5, **SAMPLED)
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
        (["--seed", str(2**65)], f"--seed {2**65}: an integer from 0 to 2^63 - 1 is allowed"),
        (["--seed", "-1"], "--seed -1: an integer from 0 to 2^63 - 1 is allowed"),
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


def test_the_guards_text_is_its_own(telling_llama_dir, telling_llama, capsys):
    """By transformers with the guard alone; and a line where it changes the clean text."""
    cut = {"w_p_frac": 1e-3, "w_zero_out_t": 0.1}
    texts = generate(config_of(telling_llama_dir, **cut), "abc", Sampling(max_new_tokens=8))
    assert list(texts) == ["clean", "guard", "flipped"]
    model = telling_llama.eval()
    flipproof.inject(model, flipproof.BitFlipSpec(w_zero_out_t=0.1))
    assert texts["guard"].text == byte_tokenizer().decode(by_transformers(model, "abc", max_new_tokens=8))
    assert (texts["guard"].flipped_bits["w"], texts["guard"].parts_at is None) == (0, False)
    zeroed = sum(int((layer.weight.abs() >= 0.1).sum()) for layer in flipproof.faulty_layers(model).values())
    assert texts["guard"].zeroed["w"] == zeroed * texts["guard"].passes
    flags = [f"--bitflip.{key}={value}" for key, value in cut.items()]
    capsys.readouterr()
    assert main(["generate", str(telling_llama_dir), "--prompt", "abc", "--max_new_tokens", "3", *flags]) == 0
    out, err = capsys.readouterr()
    assert "--- guard ---\nabc" in out
    assert f"in 3 passes nothing was flipped, {3 * zeroed:,} values zeroed" in out
    (line,) = [line for line in err.splitlines() if "the guard alone" in line]
    assert "bitflip.w_zero_out_t = 0.1 zeroes clean values; flipproof profile" in line


@pytest.mark.parametrize(
    ("bitflip", "with_adapter", "arms"),
    [
        ({"w_p_frac": 0.1}, False, ["clean", "flipped"]),
        ({"w_zero_out_t": 8.0}, False, ["clean", "guard"]),
        ({"w_p_frac": 0.1, "w_zero_out_t": 8.0}, True, ["clean", "guard", "flipped", "recovered"]),
        ({"w_zero_out_t": 8.0}, True, ["clean", "guard", "recovered_guard"]),
        ({}, True, ["clean", "recovered_clean"]),
    ],
)
def test_texts_are_of_the_arms_that_differ(model_dir, tiny_llama, tmp_path, bitflip, with_adapter, arms):
    adapter = None
    if with_adapter:
        model = tiny_llama()
        flipproof.inject(model, flipproof.BitFlipSpec(), flipproof.LoraSpec(r=2))
        save_adapter(model, adapter := tmp_path / "adapter", None)
    settings = {"model": {"hf_model_path": str(model_dir), "tokenizer": "bytes"}, "bitflip": bitflip}
    settings["training"] = {"mixed_precision_param": "bfloat16"}
    to = tmp_path / "a" / "b"
    assert list(generate(load_config([], settings), "abc", Sampling(max_new_tokens=2), adapter=adapter, to=to)) == arms
    written = json.loads((to / "generate.json").read_text())
    assert (list(written["texts"]), written["dtype"]) == (arms, "bfloat16")


@pytest.mark.parametrize("flag", ["--to", "--flip-log"])
def test_what_cannot_be_written_is_told_before_anything_is_read(tmp_path, capsys, flag):
    (tmp_path / "file").write_text("")
    argv = ["generate", "no/model", "--prompt", "a", "--bitflip.w_p_frac", "0.1"]
    assert main([*argv, flag, str(tmp_path / "file" / "out")]) == 2
    assert f"{tmp_path / 'file'} is not a directory" in capsys.readouterr().err
