"""Run by torchrun on several GPUs: losses and gradients of processes that share frozen weights are bit for bit those of
processes that have all, launched kernel by kernel and as a CUDA graph. Says so of each way, and exits with 1 if not."""

import sys
import tempfile
from itertools import product
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

from flipproof.config import load_config
from flipproof.data.sequences import Batch
from flipproof.faults.inject import set_tick
from flipproof.models.build import build_model
from flipproof.models.load import byte_tokenizer
from flipproof.models.loss import next_token_loss
from flipproof.models.parallelize import Gradients, blocks, slots
from flipproof.train.cuda_graph import Recorded
from flipproof.world import arrange, join_world

P = 2.0**-12
OF_INPUTS = {"w_zero_out_t": 256.0, "x_p_exp": P, "x_p_frac": P, "x_zero_out_t": 8192.0}
FAULTS = {"w_p_exp": P, "w_p_frac": P, **OF_INPUTS}
OF_QUANTISED = {"w_code_p": P, "w_scale_p_exp": P, **OF_INPUTS}
FORMATS = {"none": "nf4", "full": "int4-asym", "selective": "nvfp4"}
"""What blocks keep -> what weights are quantised to."""
ROWS, SEQ_LEN, TICKS = 2, 256, 4


def config_of(strategy, kept, base=None, quantize=None, **parallelism):
    """``base``: a model's directory, to be quantised; None is a model from scratch, of plain weights."""
    training = {"seq_len": SEQ_LEN, "local_batch_size": ROWS, "dtype": "bfloat16", "activation_checkpointing": kept}
    return load_config(
        [],
        {
            "model": {"hf_model_path": base, "tokenizer": "bytes", "quantize": quantize}
            if base
            else {"flavor": "clm-200M", "init": "random", "tokenizer": "bytes"},
            "training": training,
            "lora": {"r": 8},
            "bitflip": OF_QUANTISED if base else FAULTS,
            "parallelism": {"sharding_strategy": strategy, **parallelism},
        },
    )


def found(world, config, recorded):
    """Losses and gradients of steps with an evaluation between them, and whether frozen weights were shared."""
    world = arrange(world, config.parallelism)
    model = build_model(config, byte_tokenizer(), world, config.lora).train()
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_B" in name:  # not zero, as in training
            parameter.data.normal_(std=1e-3, generator=torch.Generator("cuda").manual_seed(seed))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = Gradients(model, config.parallelism, world)

    def micro_batch(batch, factor):
        loss = next_token_loss(model, batch.ids)
        (loss * factor).backward()
        return loss.detach()

    run = Recorded(micro_batch, model, blocks(model), several=False) if recorded else micro_batch
    seen = []
    for tick in range(TICKS):
        set_tick(model, tick)
        ids = torch.randint(0, 256, (ROWS, SEQ_LEN), generator=torch.Generator().manual_seed(10 * tick + world.rank))
        with gradients.micro_batch(last=True):
            seen.append(run(Batch(ids.cuda()), 1.0).clone())
        seen += [parameter.grad.clone() for parameter in trained]
        model.zero_grad(set_to_none=True)
        if tick == 2:
            with torch.no_grad():
                seen.append(model(ids.cuda()).logits[:, -1])
    if recorded:
        assert run._graph is not None
        run.release()
    return seen, bool(slots(model))


def save_base(directory):
    config = LlamaConfig(vocab_size=512, hidden_size=1024, intermediate_size=2048, num_hidden_layers=4,
                         num_attention_heads=8, num_key_value_heads=4, bos_token_id=None, eos_token_id=256)  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
    return directory


def main():
    different = False
    with join_world(config_of("no_shard", "none").parallelism) as world, sdpa_kernel(SDPBackend.MATH):
        half = {"fsdp_degree": world.size // 2} if world.size > 2 else {}
        ways = [("no_shard", {}), ("full_shard", {}), ("full_shard", {"forward_prefetch": 2, "backward_prefetch": 3})]
        ways += [("hybrid_shard", half)] if half else []
        base = world.once(lambda: str(save_base(Path(tempfile.mkdtemp()))))
        for (kept, name), quantised in product(FORMATS.items(), (True, False)):
            model = {"base": base, "quantize": name} if quantised else {}
            whole = config_of("no_shard", kept, **model)
            found(world, whole, recorded=False)  # what compiles may round otherwise
            expected, _ = found(world, whole, recorded=False)
            for strategy, parallelism in ways:
                for recorded in (False, True):
                    seen, shared = found(world, config_of(strategy, kept, **model, **parallelism), recorded)
                    alike = all(map(torch.equal, seen, expected)) and shared == (strategy != "no_shard")
                    same = all(world.gathered(alike))
                    different |= not same
                    if world.first:  # at once, since all of it takes minutes
                        way = kept, model, strategy, parallelism, "graph" if recorded else "kernels"
                        print("the same bits" if same else "OTHER BITS", *way, flush=True)
    return different


if __name__ == "__main__":
    sys.exit(main())
