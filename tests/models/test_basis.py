import pytest
import torch
from scipy.linalg import hadamard

from flipproof.models.basis import Basis, fold, rotate_in, rotate_out, split, spread

SIZES = (1, 2, 3, 48, 64, 80, 576, 1031)


def dense(basis):
    """Q by its definition, from its factors."""
    return torch.diag(basis.signs) @ torch.kron(basis.left, basis.right)


@pytest.mark.parametrize("n", SIZES)
def test_bases_are_orthogonal_and_spread_every_unit_vector(n):
    basis = Basis.of(n, 3, "here")
    q, one = dense(basis), torch.eye(n, dtype=torch.float64)
    assert (q.T @ q - one).abs().max() < 1e-12
    assert q.abs().max() <= (2 / n) ** 0.5 + 1e-12  # all equal would be 1/sqrt(n)
    torch.testing.assert_close(basis.apply(one), q, rtol=0, atol=1e-12)
    torch.testing.assert_close(basis.undo(q), one, rtol=0, atol=1e-12)


def test_a_power_of_two_is_hadamards_matrix():
    torch.testing.assert_close(spread(64), torch.from_numpy(hadamard(64) / 8.0), rtol=0, atol=0)


def test_a_basis_is_a_function_of_seed_and_name():
    one, same, other, elsewhere = (Basis.of(64, *of) for of in ((0, "a"), (0, "a"), (1, "a"), (0, "b")))
    assert torch.equal(one.signs, same.signs)
    assert not torch.equal(one.signs, other.signs)
    assert not torch.equal(one.signs, elsewhere.signs)
    # written down once: a directory holds what must be turned back by the same signs
    assert one.signs[:16].tolist() == [-1, -1, 1, -1, -1, 1, 1, 1, -1, 1, 1, 1, 1, 1, 1, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("elements", [1, 100, 2**20])
def test_weights_in_a_basis_are_products_with_its_matrix(dtype, elements, monkeypatch):
    monkeypatch.setattr("flipproof.models.basis._ELEMENTS", {"cpu": elements})
    weight = torch.randn(24, 36, generator=torch.Generator().manual_seed(0)).to(dtype).double()
    gain = torch.linspace(-2, 3, 36).to(dtype).double()
    into, out = Basis.of(36, 0, "in"), Basis.of(24, 0, "out")
    for change, by, wanted in (
        (fold, gain, weight @ torch.diag(gain)),
        (rotate_in, into, weight @ dense(into)),
        (rotate_out, out, dense(out).T @ weight),
    ):
        got = weight.clone()
        change(got, by)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [*SIZES, 256, 1536, 11008, 28672])
def test_sizes_are_split_near_their_root(n):
    a, b = split(n)
    powers = [2**k for k in range(20) if n % 2**k == 0]
    assert a * b == n
    assert b == min((size for size in powers if size**2 >= n), default=powers[-1])
