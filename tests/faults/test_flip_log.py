import gzip
import json

import pytest
import torch

import flipproof
from flipproof import BitFlipSpec, LoraSpec
from flipproof.errors import ConfigError
from flipproof.faults.draw import FaultData
from flipproof.faults.flip_log import FlipCount, FlipLog, Replay, hooked
from flipproof.faults.inject import fault_state
from flipproof.records import sealed, unsealed

SPEC = BitFlipSpec(
    w_p_exp=0.002,
    w_p_frac=0.01,
    w_zero_out_t=0.5,
    x_p_exp=0.001,
    x_p_frac=0.01,
    x_zero_out_t=9.0,
    kv_p_frac=0.01,
    sites=("linear", "head", "embedding"),
    base_seed=4,
)


def passes(model, ids):
    flipproof.set_tick(model, 5)
    with torch.no_grad():
        return torch.stack([model(ids).logits for _ in range(2)])


@pytest.fixture
def model(tiny_llama):
    model = tiny_llama().bfloat16().eval()
    flipproof.inject(model, SPEC, LoraSpec(r=2, lora_alpha=2))
    for layer in flipproof.faulty_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.01, generator=torch.Generator().manual_seed(0))
    return model


def places(entry):
    return entry["tensor"], entry["tick"], entry["index"]


def logged(model, ids, path):
    with FlipLog(path, dtype="bfloat16", seed=9) as log, hooked(model, log):
        return passes(model, ids), log


@pytest.mark.parametrize("name", ["log.jsonl", "log.jsonl.gz"])
def test_a_replay_is_the_run_bit_by_bit(model, token_ids, tmp_path, name):
    plain = passes(model, token_ids)
    seen, _ = logged(model, token_ids, tmp_path / name)
    assert torch.equal(seen, plain)  # looking changes nothing
    flipproof.set_seed(model, 77)
    assert not torch.equal(passes(model, token_ids), plain)
    with hooked(model, Replay(tmp_path / name)):
        assert torch.equal(passes(model, token_ids), plain)  # whatever this machine would draw
    assert fault_state(model).flip_hook is None


def test_the_log_says_what_flipped(model, token_ids, tmp_path):
    """Each weight's lines against ``flip``, of the merged weight."""
    _, log = logged(model, token_ids, tmp_path / "log.jsonl")
    header, *entries = map(unsealed, (tmp_path / "log.jsonl").read_text().splitlines())
    assert header == {"kind": "flipproof injection log", "dtype": "bfloat16", "seed": 9}
    bits = 0
    for name, layer in flipproof.faulty_layers(model).items():
        clean = layer.merged_weight().detach().flatten()
        for tick in (5, 6):
            draw = {"p_exp": 0.002, "p_frac": 0.01, "seed": 4, "site": f"{name}/w", "tick": tick}
            unguarded = flipproof.flip(clean, **draw).view(torch.int16)
            after = flipproof.flip(clean, zero_out_t=0.5, **draw)
            here = [e for e in entries if (e["tensor"], e["tick"]) == (f"{name}/w", tick)]
            mask = torch.zeros(len(clean), dtype=torch.int64)
            for entry in here:
                if entry["bit"] is not None:
                    mask[entry["index"]] ^= 1 << entry["bit"]
                    bits += 1
                assert entry["before"] == clean[entry["index"]]
                assert entry["after"] == after[entry["index"]]
                assert entry["after_bits"] == after.view(torch.int16)[entry["index"]] & 0xFFFF
            assert torch.equal(mask, (clean.view(torch.int16) ^ unguarded).long() & 0xFFFF)
            changed = (clean.view(torch.int16) != after.view(torch.int16)).nonzero().flatten().tolist()
            assert set(changed) <= {e["index"] for e in here}
    embedding = [e for e in entries if e["tensor"] == "model.embed_tokens/w" and e["bit"] is not None]
    assert log.flipped_bits["w"] == bits + len(embedding)
    # a guard alone zeroes: what is zeroed is what it would not let pass
    for e in entries:
        mask = (
            sum(1 << o["bit"] for o in entries if places(o) == places(e) and o["bit"] is not None) if e["zeroed"] else 0
        )
        if e["zeroed"]:
            flipped = torch.tensor(e["before_bits"] ^ mask).to(torch.int16).view(torch.bfloat16)
            assert not abs(flipped) < {"w": 0.5, "x": 9.0}[e["tensor"][-1]]
    assert sum(log.zeroed.values()) == len({places(e) for e in entries if e["zeroed"]})
    assert {e["tensor"].rpartition("/")[2] for e in entries} == {"w", "x", "k", "v"}


def test_words_that_a_decoder_zeroes_are_not_counted_as_flips():
    x = torch.ones(4000, dtype=torch.bfloat16)
    fault = flipproof.Fault(0.005, 0.005, pattern=flipproof.Pattern(protection="secded"))
    draw = FaultData(fault).draw(torch.tensor(1), torch.tensor(0), 0, x)
    count = FlipCount()
    y = count("a/w", x, draw)
    assert count.zeroed["w"] == int((y == 0).sum()) > 0
    left = (y != 0).nonzero().flatten()
    differing = (x.view(torch.int16) ^ y.view(torch.int16))[left].long() & 0xFFFF
    assert count.flipped_bits["w"] == sum(int(v).bit_count() for v in differing)


def test_one_line_changed_changes_one_value(model, token_ids, tmp_path):
    """What one flip did: the log of nothing, and a line put in by hand."""
    path = tmp_path / "one.jsonl"
    weight = flipproof.faulty_layers(model)["model.layers.1.mlp.up_proj"].merged_weight().detach().clone()
    before = int(weight.flatten()[37].view(torch.int16)) & 0xFFFF
    entry = {"tick": 5, "tensor": "model.layers.1.mlp.up_proj/w", "index": 37, "bit": 15, "zeroed": False}
    lines = [{"kind": "flipproof injection log"}, entry | {"before_bits": before}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with hooked(model, Replay(path)):
        one = passes(model, token_ids)
    with flipproof.faults(model, flips=False, guard=False):
        clean = passes(model, token_ids)
        flipproof.merge(model)
        model.model.layers[1].mlp.up_proj.weight.data.view(-1)[37] *= -1
        with torch.no_grad():
            by_hand = model(token_ids).logits
    assert torch.equal(one[1], clean[1])
    assert not torch.equal(one[0], clean[0])
    assert torch.equal(one[0], by_hand)


def test_bad_logs_and_names(model, token_ids, tmp_path):
    path = tmp_path / "log.jsonl"
    _, _ = logged(model, token_ids, path)
    text = path.read_text()
    with pytest.raises(ConfigError, match=r"log\.jsonl exists already"):
        FlipLog(path)
    with pytest.raises(ConfigError, match=r"nowhere/log\.jsonl: No such file"):
        FlipLog(tmp_path / "nowhere/log.jsonl")
    with pytest.raises(ConfigError, match=r"missing\.jsonl: No such file"):
        Replay(tmp_path / "missing.jsonl")
    (tmp_path / "half.jsonl").write_text(text[: len(text) // 2])
    with pytest.raises(ConfigError, match=r"half.jsonl, line \d+: not a whole entry"):
        Replay(tmp_path / "half.jsonl")
    (tmp_path / "half.jsonl.gz").write_bytes(gzip.compress(text.encode())[:-100])
    with pytest.raises(ConfigError, match=r"half\.jsonl.gz: Compressed file ended"):
        Replay(tmp_path / "half.jsonl.gz")
    (tmp_path / "other.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match=r"other\.jsonl is not a log that --flip-log wrote"):
        Replay(tmp_path / "other.jsonl")
    header, entry, *_ = text.splitlines()
    (tmp_path / "bit.jsonl").write_text(f"{header}\n{json.dumps(sealed(unsealed(entry) | {'bit': 99}))}\n")
    with pytest.raises(ConfigError, match=r"bit\.jsonl, line \d+: bit = 99: a bit from 0 to 31, or null"):
        Replay(tmp_path / "bit.jsonl")


def test_a_log_of_another_model_is_refused(model, token_ids, tmp_path, caplog):
    path = tmp_path / "log.jsonl"
    plain, _ = logged(model, token_ids, path)
    with pytest.raises(ConfigError, match=r"log\.jsonl: is of flips in bfloat16, and bits flip in float32 here"):
        Replay(path, "float32")
    replay = Replay(path)
    with hooked(model, replay), torch.no_grad():
        flipproof.set_tick(model, 5)
        model(token_ids)
    with pytest.raises(ConfigError, match="lm_head/w in pass 6 was not reached, nor were 34 of the log's other 69"):
        replay.check_all_done()
    with hooked(model, replay):
        passes(model, token_ids)
    replay.check_all_done()
    with hooked(model, Replay(path)), caplog.at_level("WARNING", logger="flipproof"):
        assert not torch.equal(passes(model, token_ids.flip(0)), plain)
    with torch.no_grad():
        flipproof.faulty_layers(model)["model.layers.0.mlp.up_proj"].weight.neg_()
    with (
        hooked(model, Replay(path)),
        pytest.raises(ConfigError, match=r"up_proj/w\[\d+\] holds bits 0x.* of other weights"),
    ):
        passes(model, token_ids)


def test_a_log_with_lines_taken_out(model, token_ids, tmp_path):
    """Only the flips of one tensor: those of the others are gone, and inputs are what follows from it."""
    path, name = tmp_path / "log.jsonl", "model.layers.0.mlp.up_proj/x"
    logged(model, token_ids, path)
    header, *lines = path.read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["tensor"] == name and json.loads(line)["bit"] is not None]
    (tmp_path / "some.jsonl").write_text("\n".join([header, *kept]))
    replay = Replay(tmp_path / "some.jsonl")
    with hooked(model, replay):
        some = passes(model, token_ids)
    replay.check_all_done()
    assert replay.flipped_bits == {"x": len(kept)}
    with flipproof.faults(model, flips=False, guard=False):
        clean = passes(model, token_ids)
    assert not torch.equal(some, clean)
    with hooked(model, lambda name, x, draw: x):
        assert torch.equal(passes(model, token_ids), clean)


def test_a_log_that_breaks_off_leaves_no_file(model, token_ids, tmp_path):
    def run():
        with FlipLog(tmp_path / "log.jsonl"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert list(tmp_path.iterdir()) == []
