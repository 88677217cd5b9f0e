"""Training steps of whole models, sharded or not: tokens per second and memory, with faults, without, and beside PEFT.

    python benchmarks/training.py 8B
    torchrun --nproc_per_node=4 benchmarks/training.py 70B --variants full/faults full/clean full/peft
    python benchmarks/training.py 8B --samples 300 --attention sdpa flex_attention --variants none/faults

A variant is ACTIVATION_CHECKPOINTING/WHAT[/section.key=value...]; the first may also be ``weights``, what "auto" ends
with where memory abounds. WHAT is ``faults`` (p = 2^-16 for every bit, both guards, r = 32), ``clean`` (our layer with
adapters, nothing flips), ``peft`` (PEFT's layer, adapters in bfloat16, which makes it fastest) or the name of a format
that weights are quantised to (``nf4``: QLoRA; not compiled, and nothing flips but by overrides). All others take one
path: random weights, 2 x 2048 random tokens in each process, blocks compiled, the loss without logits, AdamW on the
adapters after each micro-step; the micro-batch is a CUDA graph, as in training. Figures are means of six
steps after three. With ``--samples`` rows hold samples that see nothing of each other, by each ``--attention``.
"""

import argparse
import gc
import itertools
from typing import Any

import torch
from torch import nn

from flipproof.config import ParallelismConfig, RunConfig, TrainingConfig, load_config
from flipproof.data.sequences import Batch
from flipproof.dtensor import local
from flipproof.faults.attention import attend_with
from flipproof.faults.inject import inject, is_faulty, set_tick
from flipproof.formats.spec import format_of
from flipproof.models import recompute
from flipproof.models.build import build_model
from flipproof.models.load import byte_tokenizer, materialise, model_on_meta
from flipproof.models.loss import IGNORED, fuse_loss, next_token_loss
from flipproof.models.parallelize import Gradients, blocks, parallelize
from flipproof.models.quantised import quantise_on_meta, quantised_layers, without_compilation
from flipproof.plan.compare import measure_steps
from flipproof.train.cuda_graph import Recorded
from flipproof.train.optimizer import make_optimizer
from flipproof.world import World, arrange, join_world

_P = 2.0**-16
_FAULTS: dict[str, Any] = {
    "w_p_exp": _P, "w_p_frac": _P, "w_zero_out_t": 256.0, "x_p_exp": _P, "x_p_frac": _P, "x_zero_out_t": 8192.0
}  # fmt: skip
_STEPS = 6


def _config(flavor: str, rows: int, variant: str) -> RunConfig:
    mode, what, *more = variant.split("/")
    tree: dict[str, dict[str, Any]] = {
        "model": {"flavor": flavor, "init": "random", "tokenizer": "bytes"},
        "training": {
            "seq_len": 2048,
            "local_batch_size": rows,
            "dtype": "bfloat16",
            "mixed_precision_param": "bfloat16",
            "activation_checkpointing": "none" if mode == "weights" else mode,
        },
        "lora": {"r": 32, "lora_alpha": 32},
        "bitflip": dict(_FAULTS) if what == "faults" else {},
    }
    for override in more:
        name, value = override.split("=")
        section, key = name.split(".")
        tree.setdefault(section, {})[key] = value
    if "guards" in tree["bitflip"]:  # fitted ones have thresholds of their own
        del tree["bitflip"]["w_zero_out_t"], tree["bitflip"]["x_zero_out_t"]
    return load_config([], tree)


def _batch(training: TrainingConfig, samples: int | None, seed: int) -> Batch:
    """Random tokens; with samples, of half to one and a half times so many, of which the first has no loss."""
    random = torch.Generator().manual_seed(seed)
    shape = training.local_batch_size, training.seq_len
    ids = torch.randint(0, 256, shape, generator=random)
    if samples is None:
        return Batch(ids)
    positions = torch.empty(shape, dtype=torch.int64)
    for row in positions:
        at = 0
        while at < len(row):
            size = min(len(row) - at, int(torch.randint(samples // 2, samples * 3 // 2 + 1, (), generator=random)))
            row[at : at + size] = torch.arange(size)
            at += size
    return Batch(ids, ids.where(positions > 0, IGNORED), positions)


def _quantised_model(config: RunConfig, format: str, world: World) -> nn.Module:
    """With codes and scales of no meaning, which cost what others do."""
    model = model_on_meta(config.model, byte_tokenizer(), config.training.dtype)
    quantise_on_meta(model, format_of(format))
    inject(model, config.bitflip, config.lora)
    fuse_loss(model)
    parallelize(model, without_compilation(config, model), world)
    materialise(model, config.model, 0, world.device)
    for layer in quantised_layers(model).values():
        for held in layer.buffers(recurse=False):
            mine = local(held)  # where processes share it
            mine.random_(0, 256) if mine.dtype == torch.uint8 else mine.fill_(1e-2)
    return model


def _peft_model(config: RunConfig, world: World) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    model = model_on_meta(config.model, byte_tokenizer(), config.training.dtype)
    with torch.device("meta"):
        inject_adapter_in_model(
            LoraConfig(r=config.lora.r, lora_alpha=config.lora.lora_alpha, target_modules="all-linear"), model
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    model.to(torch.bfloat16)
    fuse_loss(model)
    parallelize(model, config, world)
    materialise(model, config.model, 0, world.device)
    return model


def measure(config: RunConfig, variant: str, samples: int | None, attention: str | None, world: World) -> str:
    """One line of the table."""
    mode, what, *_ = variant.split("/")
    if what == "peft":
        model = _peft_model(config, world)
    elif what in ("faults", "clean"):
        model = build_model(config, byte_tokenizer(), world, config.lora)
    else:
        model = _quantised_model(config, what, world)
    if mode == "weights":
        for block in blocks(model):
            recompute.keep(block, "weights")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # not zero, as in training
            nn.init.normal_(local(parameter.data), std=1e-4)
    if attention:
        attend_with(model, attention)
    training = config.training
    gradients, optimizer = Gradients(model, config.parallelism, world), make_optimizer(model, training)
    batch = _batch(training, samples, world.rank).to(world.device)
    model.train()

    def micro_batch(batch: Batch, factor: float | torch.Tensor) -> torch.Tensor:
        loss = next_token_loss(model, batch.ids, labels=batch.labels, positions=batch.positions)
        (loss * factor).backward()
        return loss.detach()

    may_record = gradients.apart and world.device.type == "cuda"
    recorded = Recorded(micro_batch, model, blocks(model), several=False) if may_record else None
    run = recorded or micro_batch

    loss = torch.zeros((), device=world.device)

    def step(tick: int) -> None:
        if is_faulty(model):
            set_tick(model, tick)
        with gradients.micro_batch(last=True):
            loss.copy_(run(batch, 1.0))
        optimizer.step()
        optimizer.zero_grad()

    found = measure_steps(step, world, _STEPS, recorded)
    if recorded:
        recorded.release()
    tokens = batch.ids.numel() * world.size
    title = f"{variant} {attention}" if attention else variant
    return (
        f"{title:<60} {tokens / found.seconds:>8.0f} tokens/s {found.seconds * 1e3:>8.1f} ms "
        f"{(found.peak or 0) / 2**30:>6.1f} GiB  communication {found.communication or 0:>4.0%}, "
        f"exposed {found.exposed or 0:>4.0%}  loss {world.mean(loss):.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("flavor")
    parser.add_argument("--rows", type=int, default=2, help="sequences in each process")
    parser.add_argument("--variants", nargs="+", default=["none/faults", "none/clean", "none/peft"])
    parser.add_argument("--samples", type=int, help="tokens of a sample in the mean, where rows hold several")
    parser.add_argument(
        "--attention", nargs="+", default=[None], help="what transformers calls it: sdpa, flex_attention"
    )
    arguments = parser.parse_args()
    with join_world(ParallelismConfig()) as world:
        for variant, attention in itertools.product(arguments.variants, arguments.attention):
            config = _config(arguments.flavor, arguments.rows, variant)
            line = measure(config, variant, arguments.samples, attention, arrange(world, config.parallelism))
            if world.first:
                print(line, flush=True)
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
