import json
import os
import random
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a network
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()  # packed tokens of tests are not the user's
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()  # what was compiled for other kernels does not fit these
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # and none for compilers, which import torch anew
os.environ.setdefault("OMP_NUM_THREADS", "1")  # there is a process of tests for each core

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported

from transformers import LlamaConfig, LlamaForCausalLM

_LONGEST = [
    "test_sharded_training",
    "test_sharded_resumed",
    "test_recompute",
    "test_damages",
    "test_slurm",
    "test_triton_launch",
    "test_crash_points",
    "test_run",
    "test_loop_resumed",
    "test_cpu",
    "test_demo",
]


def pytest_collection_modifyitems(items):
    """The files that take longest begin: then nobody is left alone with one of them when all others are done."""
    places = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session")
def tiny_llama():
    """Makes a Llama of a few thousand parameters, the same weights each time."""

    def make(**changes):
        config = {
            "vocab_size": 258,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 128,
            "bos_token_id": None,
            "eos_token_id": 256,
        }
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return LlamaForCausalLM(LlamaConfig(**config | changes))

    return make


@pytest.fixture
def token_ids():
    return torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))


_WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "red", "birds", "near", "old", "trees"]
_LM_EVAL_TASKS = {
    "toy_choice": """
output_type: multiple_choice
training_split: test
fewshot_split: test
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "toy_pages": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "toy_generate": """
output_type: generate_until
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
_LM_EVAL_GROUP = """
group: toy_group
task: [toy_choice, toy_pages]
aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]
metadata: {version: 1.0}
"""


@pytest.fixture(scope="session")
def lm_eval_tasks(tmp_path_factory):
    """A directory for ``--include-path``: one small task of each of lm-eval's kinds, and a group of two of them."""
    directory = tmp_path_factory.mktemp("lm_eval_tasks")
    rng = random.Random(0)
    for name, task in _LM_EVAL_TASKS.items():
        words = 60 if name == "toy_pages" else 5
        lines = [
            json.dumps(
                {
                    "question": " ".join(rng.choices(_WORDS, k=words)),
                    "choices": [" ".join(rng.choices(_WORDS, k=2)) for _ in range(3)],
                    "answer": rng.randrange(3),
                }
            )
            for _ in range(4 if name == "toy_pages" else 10)
        ]
        data = directory / f"{name}.jsonl"
        data.write_text("\n".join(lines) + "\n")
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (directory / f"{name}.yaml").write_text(f"{head}{task}metadata: {{version: 1.0}}\n")
    (directory / "toy_group.yaml").write_text(_LM_EVAL_GROUP)
    return directory


@pytest.fixture
def learned_llama_dir(tiny_llama, tmp_path):
    """A model on disk, with a tokenizer, that has learned which bytes Python code is made of."""
    from flipproof.config import DataConfig
    from flipproof.data.sequences import load_held_out
    from flipproof.models.load import byte_tokenizer
    from flipproof.models.loss import next_token_loss

    text = load_held_out(DataConfig(source="stdlib", max_tokens=20_000), byte_tokenizer(), 32)
    model = tiny_llama()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        next_token_loss(model, text.batch(range(16)).ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def telling_llama(tiny_llama):
    """With weights large enough that its answers differ, and that a guard clips some."""
    model = tiny_llama()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def telling_llama_dir(telling_llama, tmp_path):
    """The same on disk, with a tokenizer."""
    from flipproof.models.load import byte_tokenizer

    telling_llama.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"
