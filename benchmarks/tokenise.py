"""How fast text becomes tokens, and in how much memory: python benchmarks/tokenise.py [SOURCE] [--tokenizer DIR]

SOURCE is what ``data.source`` may be; without one, the standard library's own source. Without a tokenizer one as
GPT-2's is trained on the beginning of the text first: byte-level BPE, 32,768 tokens. All of the source is packed, as
before a run, into a cache of its own that is deleted. Beside it the tokenizer alone, called with the first 64 pieces.
"""

import argparse
import resource
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

from flipproof.config import DataConfig
from flipproof.data.document import pieces
from flipproof.data.packing import packed_tokens
from flipproof.data.source import training_source


def cpu_seconds() -> float:
    """Of this process and of those that it has ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def trained(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    end = "<|endoftext|>"
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=32768, special_tokens=[end], initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="stdlib")
    parser.add_argument("--tokenizer", help="a directory or a Hub name")
    options = parser.parse_args()

    import datasets
    from transformers import AutoTokenizer

    source = training_source(DataConfig(source=options.source))
    texts = [piece.text for piece in islice((p for span in source.spans("all") for p in pieces(span)), 64)]
    tokenizer: Any = AutoTokenizer.from_pretrained(options.tokenizer) if options.tokenizer else trained(texts)
    before = peak_mib()

    begin, begin_cpu = time.perf_counter(), cpu_seconds()
    count = sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
    wall, cpu = time.perf_counter() - begin, cpu_seconds() - begin_cpu
    print(f"the tokenizer alone: {count:,} tokens, {count / wall:,.0f} a second, {count / cpu:,.0f} a CPU second")

    with tempfile.TemporaryDirectory() as directory:
        datasets.config.HF_DATASETS_CACHE = Path(directory)
        begin, begin_cpu = time.perf_counter(), cpu_seconds()
        tokens = len(packed_tokens(source, "all", tokenizer, [], 2048, None))
        wall, cpu = time.perf_counter() - begin, cpu_seconds() - begin_cpu
    print(f"packed: {tokens:,} tokens, {tokens / wall:,.0f} a second, {tokens / cpu:,.0f} a CPU second")
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"peak memory: {before:,.0f} MiB before, {peak_mib():,.0f} MiB after; of a worker at most {largest:,.0f} MiB")


if __name__ == "__main__":
    main()
