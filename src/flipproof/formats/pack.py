"""A stored weight as the tensors of a checkpoint's layer, and back."""

from collections.abc import Mapping

from torch import Tensor

from flipproof.formats.compressed import pack_compressed, unpack_compressed
from flipproof.formats.nf4_file import pack_nf4, unpack_nf4
from flipproof.formats.spec import Format, format_of
from flipproof.formats.stored import Stored


def pack(stored: Stored, plain: bool = False) -> dict[str, Tensor]:
    """The tensors of a layer, by their names in it: those of compressed-tensors, and for nf4 those of bitsandbytes.

    Args:
        plain: as ``pack_compressed`` has it.

    Raises:
        ConfigError: for what has no layout there, as fp8-e5m2.
    """
    return pack_nf4(stored) if stored.format.code == "nf4" else pack_compressed(stored, plain)


def unpack(tensors: Mapping[str, Tensor], format: str | Format) -> Stored:
    """What ``pack`` packed, or a layer of such a checkpoint.

    Args:
        tensors: by their names in the layer; others than the format's are not looked at.
        format: or its name.

    Raises:
        ConfigError: for a tensor that is missing, or of another dtype or shape than the format needs.
    """
    format = format_of(format) if isinstance(format, str) else format
    return unpack_nf4(tensors, format) if format.code == "nf4" else unpack_compressed(tensors, format)
