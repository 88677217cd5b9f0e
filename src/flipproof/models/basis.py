"""Orthogonal bases that spread whatever is large in one channel over all of them, and weights written in such a basis.

A basis of n = m · 2^k dimensions is Q = D · (L ⊗ R): D a diagonal of random signs, L ⊗ R all that is needed of
Hadamard's matrix and, for the odd m, of Hartley's, whose entries cos + sin are at most √2 times as large as they would
be if they were all equal. A unit vector has entries of about 1/√n in it, as in the randomised Hadamard transform of
QuaRot (Ashkboos et al., 2024). L and R are small, so n values take n·(a + b) products, not n², and nothing is drawn but
signs: by the package's own counter RNG, so a basis is a function of (seed, name, n) on any machine.

With hidden states h (row vectors) written as h' = h·Q, a layer W (out, in) that reads h becomes W·Q, one that writes it
Qᵀ·W and its bias b·Q, and rows of an embedding E·Q.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy.linalg import hadamard
from torch import Tensor

from flipproof.faults.philox import derive_key, philox

_ELEMENTS = {"cpu": 2**16, "cuda": 2**24}
"""Values that are worked on at a time: as many as a core's cache holds in float64, or as keep a GPU busy."""


@dataclass(frozen=True)
class Basis:
    """Q = diag(signs) · (left ⊗ right), float64. Orthogonal, unless it was made of other factors than ``of`` makes."""

    signs: Tensor
    """(n,), each 1 or -1."""
    left: Tensor
    """(a, a) with a · b = n."""
    right: Tensor
    """(b, b)."""

    @classmethod
    def of(cls, n: int, seed: int, name: str) -> "Basis":
        """The basis of n dimensions that belongs to a seed (0 to 2^63 - 1) and a name."""
        a, b = split(n)
        return cls(signs(n, seed, name), spread(a), spread(b))

    def to(self, device: torch.device) -> "Basis":
        return Basis(self.signs.to(device), self.left.to(device), self.right.to(device))

    @property
    def size(self) -> int:
        return len(self.signs)

    def apply(self, x: Tensor) -> Tensor:
        """x·Q of rows x (…, n) in float64."""
        return kronecker(x * self.signs, self.left, self.right)

    def undo(self, x: Tensor) -> Tensor:
        """x·Qᵀ of rows x (…, n) in float64."""
        return kronecker(x, self.left.T, self.right.T) * self.signs


def kronecker(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x·(left ⊗ right) of rows x (…, a · b), left (a, a) and right (b, b), all of one dtype."""
    if len(right) == 1:
        return x @ (left * right)
    return (left.T @ (x.reshape(-1, len(left), len(right)) @ right)).reshape(x.shape)


def fold(weight: Tensor, gain: Tensor) -> None:
    """W·diag(gain), in place: a layer (out, in) in float64 that takes over the gain (in,) of the norm before it."""
    weight.mul_(gain)


def rotate_in(weight: Tensor, basis: Basis) -> None:
    """W·Q, in place: a layer (out, in) in float64, or the rows of an embedding, whose in-dimension is written in
    ``basis``."""
    for part in weight.split(max(1, _ELEMENTS[weight.device.type] // weight.shape[1])):
        part.copy_(basis.apply(part))


def rotate_out(weight: Tensor, basis: Basis) -> None:
    """Qᵀ·W, in place: a contiguous layer (out, in) in float64 whose out-dimension is written in ``basis``; a bias as
    (out, 1)."""
    elements, a, b = _ELEMENTS[weight.device.type], len(basis.left), len(basis.right)
    for rows, own in zip(weight.split(b), basis.signs.split(b), strict=True):
        right = (own[:, None] * basis.right).T
        for part in rows.split(max(1, elements // b), 1):
            part.copy_(right @ part)
    for part in weight.view(a, -1).split(max(1, elements // a), 1):
        part.copy_(basis.left.T @ part)


def split(n: int) -> tuple[int, int]:
    """(a, b) with a · b = n: b the first power of 2 that is at least √n, or the largest that n has."""
    b = min(n & -n, 1 << ((n - 1).bit_length() + 1) // 2)
    return n // b, b


@cache
def spread(n: int) -> Tensor:
    """The (n, n) orthogonal matrix of Hartley ⊗ Hadamard, float64: no entry is above √(2/n)."""
    power = n & -n
    m = n // power
    angle = (torch.arange(m).outer(torch.arange(m)) % m).double() * (2 * torch.pi / m)
    hartley = (angle.cos() + angle.sin()) / m**0.5
    return torch.kron(hartley, torch.from_numpy(hadamard(power).astype(np.float64)) / power**0.5)


def signs(n: int, seed: int, name: str) -> Tensor:
    """(n,) random signs in float64, a function of their arguments."""
    zero = np.zeros(1, dtype=np.uint64)
    words = philox(np.arange(n, dtype=np.uint64), zero, zero, zero, derive_key(seed, name))[0]
    return torch.from_numpy((words & np.uint64(1)).astype(np.float64) * 2 - 1)
