"""What flips cost on a CPU, as ratios within one run: python benchmarks/cpu.py

1. The flip in place on 100 million bf16 elements at p = 2^-16, beside ``clone()`` of the same tensor.
2. A training step of the demo's model with faults, beside the same step of a clean LoRA model (PEFT) and of our own
   layer without faults. The variants take turns, so that a busy machine slows all of them; medians are shown.
"""

from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model

import flipproof
from flipproof.bench import Row, about, medians, rows_of, tables
from flipproof.config import load_config
from flipproof.models.load import byte_tokenizer, load_model
from flipproof.train.optimizer import make_optimizer


def operation(elements: int = 100_000_000) -> list[Row]:
    x = torch.randn(elements, dtype=torch.bfloat16)
    y, guarded = x.clone(), x.clone()
    rates = {"p_exp": 2**-16, "p_frac": 2**-16, "seed": 0, "site": "benchmark/x"}
    ticks = iter(range(10**6))
    variants: dict[str, Callable[[], object]] = {
        "clone()": x.clone,
        "flip_": lambda: flipproof.flip_(y, tick=next(ticks), **rates),
        "flip_ with guard": lambda: flipproof.flip_(guarded, tick=next(ticks), zero_out_t=30.0, **rates),
        "flip with guard (out of place)": lambda: flipproof.flip(x, tick=next(ticks), zero_out_t=30.0, **rates),
    }
    return rows_of(f"{elements / 1e6:.0f}M bf16 elements, p = 2^-16", medians(variants, "cpu", 15))


def training_step(rounds: int = 40) -> list[Row]:
    config = load_config(["demo-base", "demo"], {"logging": {"run_dir": "unused"}, "model": {"hf_model_path": "x"}})
    training = config.training
    ids = torch.randint(0, 256, (training.local_batch_size, training.seq_len))

    def fresh() -> torch.nn.Module:
        shape = load_config([], {"model": {"flavor": "demo", "init": "random"}}).model
        return load_model(shape, byte_tokenizer(), training.dtype, 0)

    def stepper(model: torch.nn.Module) -> Callable[[], None]:
        optimizer = make_optimizer(model, training)
        trainable = [p for p in model.parameters() if p.requires_grad]

        def step() -> None:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, training.max_norm)
            optimizer.step()
            optimizer.zero_grad()

        return step

    peft = get_peft_model(
        fresh(),
        LoraConfig(
            r=config.lora.r,
            lora_alpha=config.lora.lora_alpha,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        ),
    )
    ours_clean, ours_faulty = fresh(), fresh()
    flipproof.inject(ours_clean, flipproof.BitFlipSpec(), config.lora)
    flipproof.inject(ours_faulty, config.bitflip, config.lora)
    times = medians(
        {
            "clean LoRA (PEFT)": stepper(peft),
            "our layer, no faults": stepper(ours_clean),
            "our layer, the demo's faults": stepper(ours_faulty),
        },
        "cpu",
        rounds,
    )
    return rows_of(f"training step of the demo ({training.dtype}, {tuple(ids.shape)} tokens)", times)


if __name__ == "__main__":
    print(tables(about("cpu"), [*operation(), *training_step()]))
