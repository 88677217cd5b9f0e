"""What it costs to rotate a model block by block, from files to files: python benchmarks/rotation.py

A model of the shape of Llama-3-70B with one block, and one with three, random weights, bfloat16; nothing is downloaded.
Each is rotated as ``flipproof harden`` rotates any model: looked into, rotated, written and proven, on the GPU where
there is one. The difference is what a block costs; the whole model is its blocks, and the rest once. Its files were
just written and are in the page cache: a disk adds its own time for each of the three passes.

Sizes are flags, for trying it out: python benchmarks/rotation.py --hidden 512 --mlp 1792 --heads 8 --kv 2 --vocab 1000
"""

import argparse
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from flipproof.config import ModelConfig, ParallelismConfig
from flipproof.models import layerwise
from flipproof.models.load import byte_tokenizer
from flipproof.models.save import Shards
from flipproof.world import World, join_world

FEW, MORE = 1, 3
"""Blocks of the two models."""


def make(directory: Path, args: argparse.Namespace, layers: int, device: torch.device) -> int:
    """Write a model of random weights. Returns its bytes."""
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.mlp,
        num_hidden_layers=layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    directory.mkdir()
    config.save_pretrained(directory)
    with torch.device("meta"):
        names = AutoModelForCausalLM.from_config(config).state_dict()
    shards, total = Shards(directory), 0
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in names.items():
        values = torch.randn(tensor.shape, generator=generator, device=device, dtype=torch.bfloat16)
        shards.add(name, 1 + values / 8 if tensor.dim() == 1 else values * 0.02)
        total += 2 * tensor.numel()
    shards.finish()
    return total


class Seconds:
    """How long functions take in all."""

    def __init__(self, device: torch.device) -> None:
        self.total, self._device = 0.0, device

    def of(self, holder: Any, name: str) -> Any:
        """In the block that this begins, a function's time counts."""
        function = getattr(holder, name)

        def timed(*args: Any) -> Any:
            wait(self._device)
            start = time.perf_counter()
            result = function(*args)
            wait(self._device)
            self.total += time.perf_counter() - start
            return result

        return mock.patch.object(holder, name, timed)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def peak_gib() -> Iterator[list[float]]:
    """The most memory that this process had of its own in the block, mapped files aside."""
    found, ended = [0.0], threading.Event()

    def look() -> None:
        while not ended.wait(0.01):
            status = Path("/proc/self/status").read_text()
            found[0] = max(found[0], int(re.findall(r"RssAnon:\s*(\d+) kB", status)[0]) / 2**20)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def measured(args: argparse.Namespace, layers: int, world: World) -> dict[str, float]:
    """Seconds and GiB of a model of so many blocks."""
    with tempfile.TemporaryDirectory() as name:
        source, to = Path(name) / "model", Path(name) / "rotated"
        size = make(source, args, layers, world.device)
        to.mkdir()
        rotating, reading, writing = (Seconds(world.device) for _ in range(3))
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        config = ModelConfig(hf_model_path=str(source))
        start = time.perf_counter()
        with (
            rotating.of(layerwise, "changed"),
            reading.of(layerwise.Layerwise, "read"),
            writing.of(layerwise.Shards, "add"),
            writing.of(layerwise.Shards, "finish"),
            peak_gib() as cpu,
        ):
            said, _ = layerwise.rotate_into(to, config, byte_tokenizer(), None, args.rotate, 0, world)
        seconds = time.perf_counter() - start
    print(f"{layers} blocks, {size / 1e9:.1f} GB: {said}", flush=True)
    return {
        "seconds": seconds,
        "of these rotating in float64": rotating.total,
        "of these reading": reading.total,
        "of these writing": writing.total,
        "GB": size / 1e9,
        "peak GiB, CPU": cpu[0],
        "peak GiB, GPU": torch.cuda.max_memory_allocated() / 2**30 if world.device.type == "cuda" else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in (
        ("hidden", 8192),
        ("mlp", 28672),
        ("heads", 64),
        ("kv", 8),
        ("vocab", 128256),
        ("blocks", 80),
    ):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--rotate", choices=("residual", "full"), default="residual")
    args = parser.parse_args()
    with join_world(ParallelismConfig()) as world:
        print(
            torch.cuda.get_device_name() if world.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        )
        few, more = (measured(args, layers, world) for layers in (FEW, MORE))
    print(f"{'':<30}{'a block':>10}{'the rest':>10}{f'{args.blocks} blocks':>12}")
    for what, value in more.items():
        if "peak" in what:
            print(f"{what:<30}{'':>20}{max(value, few[what]):>12.2f}")
            continue
        block = (value - few[what]) / (MORE - FEW)
        rest = few[what] - FEW * block
        print(f"{what:<30}{block:>10.2f}{rest:>10.2f}{rest + args.blocks * block:>12.1f}")


if __name__ == "__main__":
    main()
