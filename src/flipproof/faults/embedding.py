"""The faulty embedding: its table suffers bit flips whenever rows of it are looked up.

Embeddings of other classes scale, or remember where padding is; so the class of the very module is changed, to one that
has its own as its base. This is the one place where that is done: nothing else keeps what others hold of the module.
"""

from functools import cache
from typing import Any

from torch import Tensor, nn

from flipproof.faults.draw import FaultData
from flipproof.faults.fault import Fault
from flipproof.faults.fitted import Guards
from flipproof.faults.linear import key_device
from flipproof.faults.spec import BitFlipSpec
from flipproof.faults.state import FaultSite, FaultState


class FaultyEmbedding(FaultSite):
    """Mixed into the class of an embedding, whose table suffers bit flips; what else it does, as scaling, stays."""

    kind, keyed = "embedding", ("key",)
    plain: type[Any]
    """The class that it had before."""
    weight: Tensor
    fault: FaultData
    _parameters: dict[str, Any]

    @staticmethod
    def make(embedding: nn.Embedding, site: str, fault: Fault, state: FaultState) -> None:
        """Make an embedding faulty, in place; ``unmake`` undoes it."""
        faulty: Any = embedding
        faulty.__class__ = _faulty_embedding(faulty.__class__)
        faulty.site, faulty.state = site, state
        faulty.fault = faulty.data_of("w", fault, state.guards, (embedding.num_embeddings, 1))
        faulty.refresh_keys()

    def unmake(self) -> None:
        self.__class__ = self.plain
        for name in ("site", "fault", "state", "key"):
            delattr(self, name)

    def __reduce_ex__(self, _protocol: Any) -> Any:
        return _new_faulty_embedding, (self.plain,), self.__dict__

    def faults_of(self, spec: BitFlipSpec | None, guards: Guards | None) -> dict[str, Any]:
        return {"fault": self.data_of("w", spec.w if spec else Fault(), guards, (len(self.weight), 1))}

    def refresh_keys(self) -> None:
        device = key_device(self.weight)
        self.key = self._key(self.draw_name("w"), device)
        self.fault.move_to(device)
        self.state.move_to(device)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[misc]
        self.refresh_keys()
        return self

    def forward(self, *args: Any) -> Tensor:
        weight = self.weight
        self._parameters["weight"] = self._flipped("w", weight, self.fault, self.key, 0, self.next_run())
        try:
            rows: Tensor = super().forward(*args)  # type: ignore[misc]
        finally:
            self._parameters["weight"] = weight
        return rows


@cache
def _faulty_embedding(plain: Any) -> Any:
    return type(f"Faulty{plain.__name__}", (FaultyEmbedding, plain), {"plain": plain})


def _new_faulty_embedding(plain: Any) -> Any:
    """Empty, for pickle."""
    return object.__new__(_faulty_embedding(plain))
