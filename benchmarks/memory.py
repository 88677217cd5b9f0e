"""How a process's memory grows with steps and points, on a CPU: python benchmarks/memory.py

A small model trains 1,200 steps, and a sweep of it measures 2,000 points, at a rate at which most draws flip nothing
and at one at which most do. The resident memory of each process is looked at while it runs: what counts is how much
more there is at the end than after the first fifth, when all that is kept is there.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flipproof.models.load import byte_tokenizer

CONFIG = """
[model]
hf_model_path = "{directory}/base"
[training]
seq_len = 32
local_batch_size = 2
steps = {steps}
lr = 1e-4
log_freq = 1
save_freq = 100
[lora]
r = 2
lora_alpha = 4
[bitflip]
w_p_exp = {p}
w_p_frac = {p}
x_p_exp = {p}
x_p_frac = {p}
w_zero_out_t = 8.0
x_zero_out_t = 128.0
[data]
source = "{directory}/text.txt"
[eval]
num_samples = 2
trials = 2
[logging]
run_dir = "{directory}/run{p}"
"""


def prepare(directory: Path) -> None:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=256,
    )
    LlamaForCausalLM(shape).save_pretrained(directory / "base")
    byte_tokenizer().save_pretrained(directory / "base")
    letters = np.random.default_rng(0).choice(list("abcdefgh "), 400_000)
    (directory / "text.txt").write_text("\n\n".join("".join(part) for part in letters.reshape(-1, 400)))


def written(place: Path) -> int:
    """How many lines a file has, or files a directory."""
    if place.is_dir():
        return len(list(place.glob("*.json")))
    return place.read_bytes().count(b"\n") if place.exists() else 0


def growth(arguments: list[str], place: Path, wanted: int) -> tuple[float, float, float]:
    """(MiB after a fifth of the lines or files that a command writes, MiB at its last, KiB for each between the
    two)."""
    seen: list[tuple[int, float]] = []
    process = subprocess.Popen([sys.executable, "-m", "flipproof", *arguments], stderr=subprocess.DEVNULL)
    while process.poll() is None:
        done = written(place)
        status = Path(f"/proc/{process.pid}/status").read_text()
        if done >= wanted / 5 and (found := re.search(r"VmRSS:\s*(\d+) kB", status)):
            seen.append((done, int(found[1]) / 1024))
        if done >= wanted:
            break
        time.sleep(0.05)
    if process.wait() or not seen:
        raise SystemExit(f"{' '.join(arguments)} failed, or ended before it was looked at")
    (first, start), (last, end) = seen[0], seen[-1]
    return start, end, (end - start) * 1024 / max(1, last - first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--points", type=int, default=2000)
    args = parser.parse_args()
    print(f"{'':<36} {'after a fifth':>14} {'at the end':>12} {'each':>12}")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        prepare(directory)
        for p in ("1e-9", "1e-4"):
            config = directory / f"{p}.toml"
            config.write_text(CONFIG.format(directory=directory, steps=args.steps, p=p))
            train = ["train", "--config", str(config)]
            grid = ["--p", p, "--sites", "wx", "--seeds", str(args.points), "--to", f"{directory}/sweep{p}"]
            for what, command, place, count in (
                (f"{args.steps} steps at p = {p}", train, directory / f"run{p}/metrics.jsonl", args.steps),
                (
                    f"{args.points} points at p = {p}",
                    ["sweep", "--config", str(config), *grid],
                    directory / f"sweep{p}/points",
                    args.points,
                ),
            ):
                start, end, each = growth(command, place, count)
                print(f"{what:<36} {start:>10.1f} MiB {end:>8.1f} MiB {each:>8.2f} KiB", flush=True)


if __name__ == "__main__":
    main()
