"""Loops that are not flipproof's, on processes as torchrun starts them: what each rank drew and learned.

    preloaded.run_ranks(2, foreign_loops.main, DIRECTORY)

Each loop leaves DIRECTORY/LOOP.RANK.pt: the inputs' flips of its rows and the gradients of its first step.
"""

import torch
import torch.distributed as dist
from accelerate import Accelerator
from meeting import meet_in
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import flipproof
from flipproof import BitFlipSpec, LoraSpec
from flipproof.dtensor import whole
from flipproof.faults.inject import fault_state

FLIPS = BitFlipSpec(w_p_exp=0.001, w_p_frac=0.005, x_p_frac=0.005, w_zero_out_t=1.0, x_zero_out_t=64.0)
ROWS = 2
"""In each process."""


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


def global_batch():
    return torch.randint(0, 256, (2 * ROWS, 24), generator=torch.Generator().manual_seed(1))


def rows_here(rank):
    return global_batch()[rank * ROWS : (rank + 1) * ROWS]


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


def ddp(rank):
    model = make_model()
    wrapped = DistributedDataParallel(model)
    wrapped(input_ids=rows_here(rank), labels=rows_here(rank)).loss.backward()
    return model


def accelerate(rank):
    accelerator, model = Accelerator(cpu=True), make_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    rows = [{"input_ids": row, "labels": row} for row in global_batch()]
    # accelerate gives whole batches to processes in turn: rank 0's rows come first
    wrapped, _, loader = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(rows, batch_size=ROWS))
    (batch,) = list(loader)
    assert torch.equal(batch["input_ids"], rows_here(rank))
    loss = wrapped(**batch).loss
    loss /= 1
    accelerator.backward(loss)
    return model


def fsdp(rank):
    model = make_model()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    model(input_ids=rows_here(rank), labels=rows_here(rank)).loss.backward()
    return model


def main(rank, directory):
    meet_in(directory / "store", rank, 2)
    dist.init_process_group("gloo")
    for loop in (ddp, accelerate, fsdp):
        model = loop(rank)
        flips = {} if loop is fsdp else flips_of(model, rows_here(rank))
        torch.save({"gradients": gradients(model), "flips": flips}, directory / f"{loop.__name__}.{rank}.pt")
    dist.destroy_process_group()
