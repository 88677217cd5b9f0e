import numpy as np
import pytest
import torch
from quantised_models import quantised
from torch.nn.attention import SDPBackend, sdpa_kernel

import flipproof
from flipproof.data.sequences import Batch, PackedText
from flipproof.faults.attention import attend_with
from flipproof.faults.inject import set_tick
from flipproof.measure.evaluate import measure_arms
from flipproof.models import recompute
from flipproof.models.loss import IGNORED, fuse_loss, next_token_loss
from flipproof.models.parallelize import blocks
from flipproof.train.cuda_graph import Recorded

SPEC = flipproof.BitFlipSpec(w_p_exp=0.001, w_p_frac=0.005, w_zero_out_t=1.0, x_p_exp=0.001, x_zero_out_t=64.0)
OF_CODES = flipproof.BitFlipSpec(
    w_code_p=0.01, w_scale_p_exp=0.001, w_scale_zero_out_t=1.0, w_zero_out_t=1.0, x_p_exp=0.001, x_zero_out_t=64.0
)
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")


# backward of the faster ones adds up in an order that differs from run to run
@pytest.fixture(autouse=True)
def plain_attention():
    with sdpa_kernel(SDPBackend.MATH):
        yield


def batch(kind, seed):
    """Of two rows: text, or samples padded to rows or packed into them, elsewhere in each batch."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (2, 24), generator=random)
    if kind in ("text", "nf4"):
        return Batch(ids.cuda())
    labels = ids.where(torch.rand(2, 24, generator=random) < 0.6, IGNORED)
    sizes = torch.randint(4, 20, (2, 1), generator=random)
    positions = torch.arange(24).expand(2, 24)
    positions = positions.where(positions < sizes, positions - sizes)
    return Batch(ids, labels, positions if kind != "padded" else None).to(torch.device("cuda"))


def gradients(tiny_llama, recorded, several, compiled=False, waits=False, validated=False, kind="text"):
    """Those of each of four steps, and the losses of all micro-batches. ``validated``: with an evaluation after each
    step, of other rows under another seed."""
    by_blocks = kind == "packed, by blocks"
    model = tiny_llama(hidden_size=64, attention_dropout=0.0 if by_blocks else 0.1).cuda()
    if kind == "nf4":
        quantised(model, "nf4")
    flipproof.inject(model, OF_CODES if kind == "nf4" else SPEC, flipproof.LoraSpec(r=2))
    if by_blocks:
        attend_with(model, "flex_attention")
    fuse_loss(model)
    recompute.prepare(blocks(model), compiled)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.01)

    def micro_batch(batch, factor):
        loss = next_token_loss(model, batch.ids, batch.labels, positions=batch.positions)
        (loss * factor).backward()
        if waits:
            float(loss.detach())
        return loss.detach()

    run = Recorded(micro_batch, model, blocks(model), several) if recorded else micro_batch
    model.train()
    found, losses = [], []
    for step in range(4):
        torch.manual_seed(step)
        for micro in range(2 if several else 1):
            set_tick(model, 10 * step + micro)
            losses.append(run(batch(kind, 10 * step + micro), 0.5 + step).clone())
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found += [parameter.grad.clone() for parameter in trained]
        model.zero_grad(set_to_none=True)
        if validated:
            validate(model)
    if recorded:
        assert (run._graph is None) == waits
        run.release()
    return found, losses


def validate(model):
    text = PackedText(np.arange(3 * 16, dtype=np.int32).reshape(3, 16), "text")
    for name in ("recovered", "recovered_clean"):
        measure_arms(model, [name], text, seeds=[7], num_samples=3, batch_size=2)
    kept = [torch.full((64,), -1, device="cuda") for _ in range(1000)]  # where something freed may have been
    assert len(kept) == 1000


@pytest.mark.parametrize("several", [False, True])
def test_a_validation_between_replays_changes_nothing(tiny_llama, several):
    plain = gradients(tiny_llama, recorded=False, several=several)
    recorded = gradients(tiny_llama, recorded=True, several=several, validated=True)
    for one, other in zip(plain, recorded, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("kind", ["text", "padded", "packed", "packed, by blocks"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_what_is_recorded_has_the_gradients_of_what_is_not(tiny_llama, several, compiled, kind):
    if compiled:  # what the compiler makes in its first call may round otherwise than what it keeps
        gradients(tiny_llama, recorded=False, several=several, compiled=compiled, kind=kind)
    plain = gradients(tiny_llama, recorded=False, several=several, compiled=compiled, kind=kind)
    recorded = gradients(tiny_llama, recorded=True, several=several, compiled=compiled, kind=kind)
    for one, other in zip(plain, recorded, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("several", [False, True])
def test_a_quantised_model_is_recorded_too(tiny_llama, several):
    plain = gradients(tiny_llama, recorded=False, several=several, kind="nf4")
    recorded = gradients(tiny_llama, recorded=True, several=several, kind="nf4")
    for one, other in zip(plain, recorded, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("several", [False, True])
def test_what_waits_for_the_device_runs_as_it_is(tiny_llama, several, caplog):
    caplog.set_level("INFO", "flipproof")
    plain = gradients(tiny_llama, recorded=False, several=several, waits=True)
    recorded = gradients(tiny_llama, recorded=True, several=several, waits=True)
    for one, other in zip(plain, recorded, strict=True):
        assert all(map(torch.equal, one, other))
    assert "make no CUDA graph" in caplog.text


def test_its_peak_is_that_of_the_same_kernels_launched_one_by_one():
    """Beside what came after it was recorded, as AdamW's moments do."""
    mib = 2**20

    def most(recorded):
        weight = torch.nn.Parameter(torch.ones(4 * mib, device="cuda"))
        ids = Batch(torch.zeros(1, 1, dtype=torch.int64, device="cuda"))

        def micro_batch(_batch, factor):
            loss = weight.sqrt().square().sum()
            (loss * factor).backward()
            return loss.detach()

        run = Recorded(micro_batch, torch.nn.ParameterList([weight]), [], several=False) if recorded else micro_batch
        before = torch.cuda.memory_allocated()
        for _ in range(2):
            run(ids, 1.0)
            weight.grad = None
        later = torch.zeros(25 * mib, dtype=torch.float32, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        run(ids, 1.0)
        peak = run.peak if recorded else torch.cuda.max_memory_allocated()
        assert len(later) == 25 * mib
        return peak - before

    plain = most(recorded=False)
    assert plain > 100 * mib + 2 * 16 * mib
    assert abs(most(recorded=True) - plain) < mib
