"""What runs, sweeps and profiles leave behind, made up: a cliff at a known place, costs that are known."""

import itertools
import json
import math

from flipproof.measure.points import Setting

CLEAN = 2.0
CLIFF = 3e-5
PS = [1e-6, 1e-5, 1e-4, 1e-3]
SITES, LAYERS = ["w", "wx"], ["all", "model.layers.0.", "model.layers.1."]
BITS, PROTECTIONS, SEEDS = ["all", "sign", "14"], ["none", "secded"], [1, 2, 3]
VOLTAGES = [[0.9, 1e-6], [0.8, 1e-5], [0.7, 1e-4], [0.6, 1e-3]]


def cost_at(p, setting):
    """Nats over clean: straight in log p between measured points, through ln 1.1 at the cliff; one cell is broken."""
    cliff = CLIFF * (10 if setting.protection == "secded" else 1)
    share = (math.log10(p) - math.log10(cliff)) + 1  # 0 a decade below the cliff, 1 at it
    slope = {"all": 1.0, "sign": 0.6, "14": 0.9}[setting.bits] if setting.layers != "all" else 1.0
    cost = max(share, 0) * slope * math.log(1.1)
    return math.inf if p >= 1e-3 and setting == Setting("wx", "all", "all", "none") else cost


def write_sweep(directory, drop=0):
    """A sweep of known costs: seeds scatter evenly around them, so that means are exact."""
    settings = [Setting(*values) for values in itertools.product(SITES, LAYERS, BITS, PROTECTIONS)]
    at = {ber: volts for volts, ber in VOLTAGES}
    rows = []
    for setting in settings:
        for p in PS:
            for seed, off in zip(SEEDS, (-0.01, 0.0, 0.01), strict=True):
                loss = CLEAN + cost_at(p, setting) + off
                rows.append({"id": f"{setting}{p}/{seed}", "p": p, "voltage": at[p],
                             **setting._asdict(), "seed": seed, "loss": loss if math.isfinite(loss) else None,
                             "tokens": 4096, "seconds": 1.5})  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    sweep = {
        "model": "tiny <llama>", "dtype": "bfloat16", "text": "some text", "tokens": 4096,
        "axes": {"p": PS, "sites": SITES, "layers": LAYERS, "bits": BITS, "protection": PROTECTIONS, "seeds": 3},
        "overhead": {"none": 0.0, "secded": 0.125}, "voltages": VOLTAGES,
        "clean": {"loss": CLEAN, "perplexity": math.exp(CLEAN)}, "guard": None,
        "thresholds": {"w": None, "x": None}, "planned": len(rows),
    }  # fmt: skip
    (directory / "sweep.json").write_text(json.dumps(sweep))
    (directory / "points").mkdir()
    for row in rows[: len(rows) - drop]:
        (directory / "points" / f"{row['id'].replace('/', '-')}.json").write_text(json.dumps(row))
    return rows


def write_profile(directory):
    def one(shift):
        return {"count": 1000, "zeros": 3, "nan": 0, "infinite": 0,
                "quantiles": {"p50": 0.01, "p99": 0.1, "p99.9": 0.2, "p99.99": 0.4}, "maximum": 0.5,
                "proposed_t": 1.0, "zero_out_t": 2.0 if shift else None, "clipped": 0 if shift else None,
                "histogram": [[-9 + shift, 100], [-8 + shift, 700], [-2 + shift, 197]]}  # fmt: skip

    def both(shift):
        return {"weights": one(shift), "inputs": one(shift + 1)}

    layers = {f"model.layers.{i}.q_proj": both(i) for i in range(2)}
    profile = {"model": "tiny", "dtype": "bfloat16", "text": "t", "tokens": 10, "all": both(0), "layers": layers}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "profile.json").write_text(json.dumps(profile))


def write_run(directory):
    def arm(*losses):
        return {"trial_losses": list(losses), "tokens": 100}

    arms = {"clean": arm(2.0), "flipped": arm(2.9, 3.1, None), "recovered": arm(2.4, 2.5, 2.7)}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.json").write_text(json.dumps({"arms": arms, "dtype": "float32", "text": "stdlib"}))
    (directory / "config.toml").write_text('[model]\nhf_model_path = "my/model"\n')
    lines = [
        json.dumps({"step": step, "loss": 3.0 / step, "tokens": 64 * step, "tokens_per_second": 100.0 + step,
                    "peak_memory_gib": 0.5 + step / 8, "mfu": None if step == 1 else 0.25 * step})
        for step in (1, 2, 3)
    ]  # fmt: skip
    (directory / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4, "lo']))
    texts = {"clean": " is <b>well</b>", "flipped": "al□ i5 </script> w3ll"}
    (directory / "generate.json").write_text(json.dumps({"model": "m", "prompt": "all", "texts": texts}))


def write_hardened(directory, **changes):
    """What ``flipproof harden`` leaves, of known costs: the rotation helps at the two higher of three probabilities."""

    def row(protection, p, cost, half):
        interval = None if half is None else [cost - half, cost + half]
        return {"protection": protection, "sites": "wx" if p else "", "p": p, "cost": cost, "interval": interval}

    def side(protection, alone, *costs):
        ps = (2**-16, 2**-14, 2**-12)
        return [row(protection, 0.0, alone, None)] + [
            row(protection, p, *cost) for p, cost in zip(ps, costs, strict=True)
        ]

    rotation = {
        "how": "residual", "seed": 3, "stream": ["model.embed_tokens", "lm_head"], "folded": ["model.norm"],
        "values": ["model.layers.0.self_attn"], "online": [], "untied": True, "difference": 2e-6,
        "left": {"model.layers.0.mlp": "a norm stands <between>", "model.layers.1.mlp": "a norm stands <between>"},
    }  # fmt: skip
    found = {
        "model": "my/model", "dtype": "bfloat16", "guards": "channel", "rotation": rotation,
        "text": "some text", "tokens": 4096, "fitted": [{"source": "code", "tokens": 81920}],
        "before": side("guard-tensor", 0.0, (0.5, 0.02), (2.5, 0.1), (9.0, 0.5))
        + side("guard-channel", 0.002, (0.02, 0.005), (0.1, 0.01), (0.5, 0.05)),
        "after": side("guard-channel", 0.001, (0.018, 0.005), (0.07, 0.01), (0.3, 0.05)),
    }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    found |= changes
    left = {key: value for key, value in found.items() if value is not None}
    (directory / "hardened.json").write_text(json.dumps(left))
    return found
