import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a network
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()  # packed tokens of tests are not the user's
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported

from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture
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
