"""Loops that are not flipproof's, on processes as torchrun starts them: what each rank drew and learned.

    preloaded.run_ranks(2, foreign_loops.main, DIRECTORY)

Each loop leaves DIRECTORY/LOOP.RANK.pt: the rows of each micro-batch, the flips in them, and the gradients of its first
step, which accumulates two micro-batches.
"""

import torch
import torch.distributed as dist
from accelerate import Accelerator
from meeting import meet_in
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import flipproof
from flipproof import BitFlipSpec, LoraSpec
from flipproof.dtensor import whole
from flipproof.faults.inject import fault_state

FLIPS = BitFlipSpec(w_p_exp=0.001, w_p_frac=0.005, x_p_frac=0.005, w_zero_out_t=1.0, x_zero_out_t=64.0)
ROWS, MICRO_BATCHES = 2, 2
"""Of each process."""


def make_model():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=128,
        )
    )  # fmt: skip
    flipproof.inject(model, FLIPS, LoraSpec(r=2))
    for layer in flipproof.faulty_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(2))
    return model


def text():
    ids = torch.randint(0, 256, (2 * ROWS * MICRO_BATCHES, 24), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def batches_here(rank):
    """A micro-batch is rows of rank 0, then rows of rank 1."""
    ids = torch.stack([row["input_ids"] for row in text()])
    return ids.reshape(MICRO_BATCHES, 2, ROWS, 24)[:, rank]


def flips_of(model, ids):
    """Name of a draw -> bits that it inverted, of a pass that leaves the ticks where they are."""
    seen, state = {}, fault_state(model)

    def look(name, x, draw):
        y = torch.ops.flipproof.flip.default(x, *draw.arguments)
        seen[name] = x.view(torch.int32) ^ y.view(torch.int32)
        return y

    state.flip_hook = look
    with torch.no_grad(), flipproof.faults(model):
        model(input_ids=ids)
    state.flip_hook = None
    return seen


def gradients(model):
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def plain_loop(wrapped, rank):
    for ids in batches_here(rank):
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss /= MICRO_BATCHES
        loss.backward()


def ddp(model, rank, _directory):
    plain_loop(DistributedDataParallel(model), rank)
    return gradients(model)


def fsdp(model, rank, _directory):
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    plain_loop(model, rank)
    return gradients(model)


def accelerate(model, _rank, _directory):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO_BATCHES)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    # accelerate gives whole batches to processes in turn: rank 0's rows come first
    loader = torch.utils.data.DataLoader(text(), batch_size=ROWS)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(**batch).loss)
            optimizer.step()
    return gradients(model)


class FirstGradients(TrainerCallback):
    """Those of the first step, before anything clips them."""

    def __init__(self):
        self.found = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.found = self.found or {name: grad.clone() for name, grad in gradients(model).items()}


def trainer(model, _rank, directory, resume=None):
    """Hugging Face's, two steps of it, with a checkpoint after the first; or only the second, after ``resume``."""
    how = TrainingArguments(
        str(directory / "trainer"), per_device_train_batch_size=ROWS, gradient_accumulation_steps=MICRO_BATCHES,
        max_steps=2, save_steps=1, learning_rate=1e-2, max_grad_norm=0.0, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    first = FirstGradients()
    Trainer(model, how, train_dataset=text(), callbacks=[first]).train(resume_from_checkpoint=resume)
    return first.found


def resumed(model, rank, directory):
    return trainer(model, rank, directory, str(directory / "trainer/checkpoint-1"))


def main(rank, directory):
    meet_in(directory / "store", rank, 2)
    dist.init_process_group("gloo")
    for loop in (ddp, accelerate, trainer, resumed, fsdp):
        model, seen = make_model(), []
        flips = flips_of(model, batches_here(rank)[0])
        taken = model.register_forward_pre_hook(
            lambda model, _args, named, seen=seen: seen.append((int(fault_state(model).tick), named["input_ids"])),
            with_kwargs=True,
        )
        found = loop(model, rank, directory)
        taken.remove()
        weights = {name: whole(p.detach()) for name, p in model.named_parameters() if p.requires_grad}
        left = {"passes": seen, "flips": flips, "gradients": found, "weights": weights}
        torch.save(left, directory / f"{loop.__name__}.{rank}.pt")
    dist.destroy_process_group()
