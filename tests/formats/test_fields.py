import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from flipproof.errors import ConfigError
from flipproof.formats.fields import from_bytes, from_words, part, to_bytes, to_words


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 2, 7, 8, 9, 32, 37])
def test_words_are_those_of_compressed_tensors(bits, columns):
    g = torch.Generator().manual_seed(columns)
    codes = torch.randint(0, 2**bits, (5, columns), dtype=torch.uint8, generator=g)
    words = to_words(codes, bits)
    assert torch.equal(words, pack_to_int32((codes.int() - 2 ** (bits - 1)).to(torch.int8), bits))
    assert torch.equal(from_words(words, bits)[:, :columns], codes)
    assert not from_words(words, bits)[:, columns:].any()
    assert torch.equal(from_words(words.T.contiguous().T, bits), from_words(words, bits))
    assert torch.equal(to_words(codes.T.contiguous().T, bits), words)


@pytest.mark.parametrize(("integers", "word"), [
    ([-8, -7, -6, -5, 0, 1, 2, 7], 0xFA983210), ([-128, -1, 0, 127], 0xFF807F00)
])  # fmt: skip
def test_a_word_by_hand(integers, word):
    bits = 32 // len(integers)
    codes = torch.tensor([[number + 2 ** (bits - 1) for number in integers]], dtype=torch.uint8)
    assert to_words(codes, bits).item() & 0xFFFFFFFF == word


def test_the_first_of_two_is_the_low_half():
    codes = torch.tensor([[3, 15, 9]], dtype=torch.uint8)
    assert to_bytes(codes, 4).tolist() == [[0xF3, 0x09]]
    assert from_bytes(torch.tensor([[0xF3, 0x09]], dtype=torch.uint8), 4).tolist() == [[3, 15, 9, 0]]


def test_a_part_is_there_and_what_it_should_be():
    tensors = {"b": torch.ones(2), "a": torch.ones(2, 2)}
    assert part(tensors, "a", (torch.float16, torch.float32), 2) is tensors["a"]
    with pytest.raises(ConfigError, match=r"^c is missing; there are a, b$"):
        part(tensors, "c", torch.float32, 1)
    with pytest.raises(ConfigError, match=r"^c is missing; there are no tensors$"):
        part({}, "c", torch.float32, 1)
    with pytest.raises(
        ConfigError, match=r"^b is torch.float32 of shape \(2,\): torch.uint8 with 1 dimension is needed$"
    ):
        part(tensors, "b", torch.uint8, 1)
    with pytest.raises(ConfigError, match=r"^b is .*: torch.float32 or torch.uint8 with 2 dimensions is needed$"):
        part(tensors, "b", (torch.float32, torch.uint8), 2)
