"""Ticks, runs and ranks, in loops that know nothing of flipproof."""

import copy

import pytest
import torch
from rounding import assert_same_function
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainerCallback, TrainingArguments

import flipproof
from flipproof import BitFlipSpec, LoraSpec
from flipproof.faults.flip_log import FlipLog, Replay, hooked
from flipproof.faults.inject import fault_state

FLIPS = BitFlipSpec(w_p_exp=0.001, w_p_frac=0.005, x_p_frac=0.005, w_zero_out_t=1.0, x_zero_out_t=8.0)
NEXT_RUN = 0x9E3779B97F4A7C15


def ticks_of(model):
    """A list that gets the tick of every forward pass."""
    seen = []
    model.register_forward_hook(lambda module, _x, _y: seen.append(int(fault_state(model).tick)))
    return seen


# -- what a pass gives is nobody's but the caller's --------------------------------------------------------------------


@pytest.mark.parametrize("r", [0, 4])
def test_loss_and_logits_can_be_changed_in_place(tiny_llama, token_ids, r):
    """With the gradients of the same arithmetic out of place."""

    def gradients(change_loss, change_logits):
        model = tiny_llama()
        flipproof.inject(model, FLIPS, LoraSpec(r=r))
        output = model(token_ids, labels=token_ids)
        loss, logits = change_loss(output.loss), change_logits(output.logits)
        (loss + logits.square().mean()).backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    def change_loss(loss):
        loss /= 4
        loss += 1
        return loss.mul_(3)

    def change_logits(logits):
        logits -= logits.mean().detach()
        return logits.mul_(0.5)

    expected = gradients(lambda x: (x / 4 + 1) * 3, lambda x: (x - x.mean().detach()) * 0.5)
    got = gradients(change_loss, change_logits)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_outputs_are_the_models_own(tiny_llama, token_ids):
    """No copy and no view: a large vocabulary's logits are held once."""
    model, made = tiny_llama(), []
    model.lm_head.register_forward_hook(lambda _m, _x, y: made.append(y))
    flipproof.inject(model, FLIPS)
    assert model(token_ids).logits is made[0]


class Recorder(TrainerCallback):
    """Notes the sum of the trainable parameters after each step."""

    def __init__(self):
        self.sums = []

    def on_step_end(self, args, state, control, model=None, **_):
        self.sums.append(float(sum(p.detach().double().sum() for p in model.parameters() if p.requires_grad)))


def rows_of_text(n=16):
    generator = torch.Generator().manual_seed(7)
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 256, (n, 24), generator=generator)]


def trainer(model, directory, steps, callbacks=(), **more):
    arguments = TrainingArguments(
        str(directory), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=steps, report_to=[],
        use_cpu=True, disable_tqdm=True, learning_rate=1e-2, lr_scheduler_type="constant", logging_steps=1, **more,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=rows_of_text(), callbacks=list(callbacks))


@pytest.mark.parametrize("r", [0, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_is_a_plain_loop_on_the_same_batches_and_ticks(tiny_llama, tmp_path, r, checkpointing):
    """Hugging Face's Trainer, with gradient accumulation, with and without gradient checkpointing: bit for bit."""
    model = tiny_llama()
    flipproof.inject(model, FLIPS, LoraSpec(r=r))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    recorder, batches = Recorder(), []
    run = trainer(
        model, tmp_path, 3, [recorder], save_strategy="no", max_grad_norm=0.0,
        adam_epsilon=1e-6, weight_decay=0.0, optim="adamw_torch",
    )  # fmt: skip
    model.register_forward_pre_hook(lambda _m, _a, kw: batches.append(kw["input_ids"]), with_kwargs=True)
    run.train()
    logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]

    plain = tiny_llama()
    flipproof.inject(plain, FLIPS, LoraSpec(r=r))
    plain.train()
    optimizer = torch.optim.AdamW(
        [p for p in plain.parameters() if p.requires_grad], lr=1e-2, eps=1e-6, weight_decay=0.0
    )
    sums, losses = [], []
    for step in range(3):
        total = torch.zeros(())
        for micro in range(2):
            tick = 2 * step + micro
            flipproof.set_tick(plain, tick)
            # Trainer sums over the tokens of the whole step and divides once
            loss = plain(batches[tick], labels=batches[tick], num_items_in_batch=2 * 2 * 23).loss
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        sums.append(float(sum(p.detach().double().sum() for p in plain.parameters() if p.requires_grad)))
        losses.append(float(total))
    assert len(batches) == 6
    assert recorder.sums == sums
    assert logged == losses


# -- a loop that resumes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [0, 4])
def test_a_resumed_trainer_repeats_no_flips(tiny_llama, tmp_path, r):
    def resumed(callbacks):
        model = tiny_llama()
        flipproof.inject(model, FLIPS, LoraSpec(r=r))
        ticks = ticks_of(model)
        recorder = Recorder()
        run = trainer(model, tmp_path, 4, [recorder, *callbacks], save_strategy="no")
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        return ticks, recorder.sums

    model = tiny_llama()
    flipproof.inject(model, FLIPS, LoraSpec(r=r))
    ticks, recorder = ticks_of(model), Recorder()
    trainer(model, tmp_path, 4, [recorder], save_strategy="steps", save_steps=2).train()
    assert ticks == list(range(8))
    again, _ = resumed([])
    assert len(again) == 4
    assert not set(again) & set(ticks)
    assert again == resumed([])[0]  # a function of the checkpoint

    class Ticks(TrainerCallback):
        """The README's, for the flips of a run that was never interrupted."""

        def on_step_begin(self, args, state, control, model=None, **_):
            flipproof.set_tick(model, state.global_step * args.gradient_accumulation_steps)

    exact, sums = resumed([Ticks()])
    assert exact == [4, 5, 6, 7]
    assert sums == recorder.sums[2:]


def test_weights_that_are_loaded_move_the_ticks_of_training_alone(tiny_llama, token_ids):
    model, trained = tiny_llama(), tiny_llama()
    for one in (model, trained):
        flipproof.inject(one, FLIPS, LoraSpec(r=2))
    state = copy.deepcopy(trained.state_dict())
    ticks = ticks_of(model)
    model(token_ids)
    model.load_state_dict(state)  # nothing new
    model(token_ids)
    state["model.layers.0.mlp.up_proj.lora_B"] += 1
    model.load_state_dict(state)
    model.eval()(token_ids)
    with torch.no_grad():
        model.train()(token_ids)
    model(token_ids)
    model(token_ids)
    flipproof.set_tick(model, 6)
    model(token_ids)
    assert ticks[:4] == [0, 1, 2, 3]
    assert ticks[4] >= 2**47
    assert ticks[5:] == [ticks[4] + 1, 6]


def test_weights_for_a_model_from_the_meta_device_are_its_first(tiny_llama, token_ids):
    source = tiny_llama()
    with torch.device("meta"):
        model = tiny_llama()
    flipproof.inject(model, FLIPS)
    model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    model.model.rotary_emb.inv_freq.copy_(source.model.rotary_emb.inv_freq)
    ticks = ticks_of(model)
    model(token_ids)
    assert ticks == [0]


# -- runs --------------------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """Runs one linear layer twice in a pass."""

    def __init__(self, checkpointed=False):
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.checkpointed = nn.Linear(48, 48), checkpointed

    def forward(self, x):
        for _ in range(2):
            x = (checkpoint(self.shared, x, use_reentrant=False) if self.checkpointed else self.shared(x)).tanh()
        return x


def flipped_by_hand(x, p, key):
    """``flip`` with a key of its own: what a further run draws."""
    y = x.clone()
    rates = torch.tensor([0.0, p], dtype=torch.float64)
    torch.ops.flipproof.flip_(y, rates, None, torch.tensor(key), torch.tensor(3), 0)
    return y


@torch.no_grad()
def test_a_module_that_runs_twice_draws_twice():
    spec = BitFlipSpec(w_p_frac=0.05, x_p_frac=0.05)
    model = Twice()
    flipproof.inject(model, spec)
    flipproof.set_tick(model, 3)
    x, layer = torch.randn(4, 48), model.shared
    expected = x
    for run in range(2):
        x_key, w_key = ((int(key) + run * NEXT_RUN + 2**63) % 2**64 - 2**63 for key in (layer.x_key, layer.w_key))
        flipped = flipped_by_hand(expected, 0.05, x_key), flipped_by_hand(layer.weight, 0.05, w_key)
        expected = nn.functional.linear(*flipped, layer.bias).tanh()
    assert torch.equal(model(x), expected)
    flipproof.set_tick(model, 3)  # a pass counts its own runs
    assert torch.equal(model(x), expected)


def test_a_persistent_fault_is_the_same_at_every_run():
    model = Twice()
    flipproof.inject(model, BitFlipSpec(w_p_frac=0.01, x_p_frac=0.01, w_faults="persistent"))
    with torch.no_grad(), FlipNames(model) as seen:
        model(torch.randn(4, 48))
    assert seen["shared/w"].any()
    assert torch.equal(seen["shared/w"], seen["shared#2/w"])
    assert not torch.equal(seen["shared/x"], seen["shared#2/x"])


class FlipNames:
    """Name of a draw -> which elements it changed."""

    def __init__(self, model):
        self.state, self.seen = fault_state(model), {}

    def __enter__(self):
        self.before, self.state.flip_hook = self.state.flip_hook, self.look
        return self.seen

    def look(self, name, x, draw):
        y = torch.ops.flipproof.flip.default(x, *draw.arguments)
        self.seen[name] = y != x
        return y

    def __exit__(self, *_):
        self.state.flip_hook = self.before


@torch.no_grad()
def test_the_runs_of_a_pass_are_logged_and_replayed_apart(tmp_path):
    model = Twice()
    flipproof.inject(model, BitFlipSpec(w_p_frac=0.01, x_p_frac=0.01))
    x = torch.randn(4, 48)
    with FlipLog(tmp_path / "log.jsonl", about="") as log, hooked(model, log):
        expected = model(x)
    flipproof.set_tick(model, 0)
    replay = Replay(tmp_path / "log.jsonl")
    with hooked(model, replay):
        assert torch.equal(model(x), expected)
    replay.check_all_done()


def test_training_through_two_runs_is_autograd_through_both():
    """Gradients against the same product of flipped operands, written out."""
    x = torch.randn(4, 48)
    model = Twice()
    flipproof.inject(model, BitFlipSpec(w_p_frac=0.05, x_p_frac=0.05))
    y = model(x)
    y.sum().backward()
    layer = model.shared
    weight = layer.weight.detach().clone().requires_grad_()
    flipproof.set_tick(model, 0)
    with torch.no_grad(), FlipDeltas(model) as deltas:
        model(x)

    def expected():
        weight.grad, out = None, x
        for name in ("shared", "shared#2"):
            flipped_x, flipped_w = out + deltas[f"{name}/x"], weight + deltas[f"{name}/w"]
            out = nn.functional.linear(flipped_x, flipped_w, layer.bias.detach()).tanh()
        out.sum().backward()
        return weight.grad

    assert_same_function(layer.weight.grad, expected, [weight])


class FlipDeltas(FlipNames):
    """Name of a draw -> what it added."""

    def look(self, name, x, draw):
        y = torch.ops.flipproof.flip.default(x, *draw.arguments)
        self.seen[name] = y - x
        return y


def test_a_repeated_run_of_several_is_refused_and_one_of_one_is_not():
    model = Twice(checkpointed=True)
    flipproof.inject(model, BitFlipSpec(w_p_frac=0.05))
    loss = model(torch.randn(4, 48, requires_grad=True)).sum()
    with pytest.raises(RuntimeError, match="shared ran 2 times in one forward pass"):
        loss.backward()


def test_keys_values_and_embedding_of_a_second_run_draw_anew(tiny_llama, token_ids):
    class Again(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.config = model, model.config
            self._supports_attention_backend = True

        def get_input_embeddings(self):
            return self.model.get_input_embeddings()

        def forward(self, ids):
            return [self.model(ids, use_cache=False).logits for _ in range(2)]

    model = Again(tiny_llama().eval())
    flipproof.inject(model, BitFlipSpec(w_p_frac=0.01, kv_p_frac=0.05, sites=("embedding",)))
    with torch.no_grad(), FlipNames(model) as seen:
        model(token_ids[:1])
    for name in ("model.model.embed_tokens/w", "model.model.layers.0.self_attn/k"):
        first, second = seen[name], seen[name.replace("/", "#2/")]
        assert first.any()
        assert not torch.equal(first, second)
