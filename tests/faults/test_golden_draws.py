"""Draws are a contract: no refactoring, platform or version of a library may change a bit of one.

``golden_draws.json`` has a digest of the bits that each case gives. One that is there never changes: another digest is
another version of the contract, under another name. A new case gets the digest that its failing test shows.
"""

import hashlib
import json
from itertools import product
from pathlib import Path

import pytest
import torch

import flipproof
from flipproof import BitFlipSpec, LoraSpec, Pattern
from flipproof.faults.layouts import LAYOUTS

GOLDEN = Path(__file__).with_name("golden_draws.json")
DTYPES = {"bfloat16": torch.int16, "float16": torch.int16, "float32": torch.int32}
PROBABILITIES = [(2**-16, 2**-16), (1e-3, 0.0), (0.0, 0.004), (0.02, 1 / 128), (0.3, 0.011), (0.45, 0.4), (0.5, 0.5)]
PATTERNS = {
    "persistent": Pattern(persistent=True),
    "p_bits": Pattern(p_bits=(("sign", 0.25), ("7", 1e-3), ("0-2", 0.0))),
    "burst": Pattern(burst=37),
    "p_row": Pattern(p_row=0.1, row_bytes=64),
    "secded": Pattern(protection="secded"),
    "parity": Pattern(protection="parity"),
    "protected_bits": Pattern(protected_bits=("sign", "exp")),
    "all": Pattern(persistent=True, p_bits=(("3-5", 2e-3),), p_row=0.02, row_bytes=256, protection="secded"),
}
WHERE = {"near": {"seed": 0, "site": "a/x", "tick": 0}, "far": {"seed": 2**63 - 1, "site": "b/w", "tick": 2**47 + 3}}
ELEMENTS = 3 * 8192 + 5
LOW_BITS = ("integer4", "nf4", "e2m1", "e8m0", "e4m3", "e5m2", "integer8", "nf4-scale")


def every_kind_of_value(dtype):
    """Of all exponents, with infinities and NaNs, in integer arithmetic alone."""
    bits = DTYPES[dtype]
    return (torch.arange(ELEMENTS) * 2654435761 + 12345).to(bits).view(getattr(torch, dtype))


def digest(x):
    bits = DTYPES[str(x.dtype).removeprefix("torch.")]
    return hashlib.blake2b(x.contiguous().view(bits).numpy().tobytes(), digest_size=16).hexdigest()


def flips():
    for dtype, (p_exp, p_frac), where in product(DTYPES, PROBABILITIES, WHERE):
        draw = {"p_exp": p_exp, "p_frac": p_frac, "offset": 8192 * 5 - 3, **WHERE[where]}
        yield f"{dtype} {p_exp} {p_frac} {where}", dtype, draw
    for dtype, name, (where, offset) in product(DTYPES, PATTERNS, (("near", 0), ("far", 2**40 + 64))):
        same_p = PATTERNS[name].burst > 1
        draw = {"p_exp": 2e-3, "p_frac": 2e-3 if same_p else 5e-4, "offset": offset, "pattern": PATTERNS[name]}
        yield f"{dtype} {name} {where}", dtype, draw | WHERE[where] | {"zero_out_t": 2.0**9}


def flips_of_low_bits():
    """(name, element, draw) of patterns of 4 and 8 bits, as quantised weights have."""
    for element, (p_exp, p_frac), where in product(LOW_BITS, PROBABILITIES, WHERE):
        yield f"{element} {p_exp} {p_frac} {where}", element, {"p_exp": p_exp, "p_frac": p_frac, "offset": 8192 * 5 - 3}
    for element, name in product(LOW_BITS, PATTERNS):
        if PATTERNS[name].p_bits or PATTERNS[name].protected_bits:
            continue  # of bits that not all have
        draw = {"p_exp": 2e-3, "p_frac": 2e-3, "offset": 2**40 + 64, "pattern": PATTERNS[name]}
        yield f"{element} {name} far", element, draw | WHERE["far"]


def digest_of_low_bits(name, element, draw):
    x = ((torch.arange(ELEMENTS) * 2654435761 + 12345) % 2 ** LAYOUTS[element].bits).to(torch.uint8)
    where = WHERE[name.rpartition(" ")[2]]
    y = flipproof.flip(x, element=element, **draw | where)
    return hashlib.blake2b(y.numpy().tobytes(), digest_size=16).hexdigest()


def of_flips():
    return {name: digest(flipproof.flip(every_kind_of_value(dtype), **draw)) for name, dtype, draw in flips()}


def of_a_model(tiny_llama, token_ids):
    """Which keys, ticks and offsets two passes of a model draw with, operand by operand."""
    model = tiny_llama(dtype=torch.bfloat16)
    fault = {f"{operand}_{p}": 1e-4 for operand in ("w", "x", "kv") for p in ("p_exp", "p_frac")}
    flipproof.inject(model, BitFlipSpec(**fault, sites=("linear", "head", "embedding"), base_seed=5), LoraSpec(r=2))
    seen = hashlib.blake2b(digest_size=16)
    for tick in (3, 2**40):
        flipproof.set_tick(model, tick)
        for name, key, at, offset in draws_of(model, token_ids):
            seen.update(f"{name} {key} {at} {offset}\n".encode())
    return {"keys, ticks and offsets of a model": seen.hexdigest()}


def draws_of(model, token_ids):
    from flipproof.faults.inject import fault_state

    found = []

    def tap(name, x, draw):
        found.append((name, int(draw.key), int(draw.tick), draw.offset))
        return x

    fault_state(model).flip_hook = tap
    with torch.no_grad():
        model(token_ids)
    return found


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


@pytest.mark.parametrize(("name", "dtype", "draw"), [pytest.param(*case, id=case[0]) for case in flips()])
def test_draws_are_those_of_every_version(golden, name, dtype, draw):
    assert digest(flipproof.flip(every_kind_of_value(dtype), **draw)) == golden[name]


@pytest.mark.parametrize(("name", "element", "draw"), [pytest.param(*case, id=case[0]) for case in flips_of_low_bits()])
def test_draws_of_low_bits_are_those_of_every_version(golden, name, element, draw):
    assert digest_of_low_bits(name, element, draw) == golden[name]


def test_a_models_draws_are_those_of_every_version(golden, tiny_llama, token_ids):
    name, found = next(iter(of_a_model(tiny_llama, token_ids).items()))
    assert found == golden[name]
