"""Hashes of the files of a directory that flipproof wrote, beside them as coreutils' ``b2sum`` writes and checks them.

Where there are some, whoever opens the directory compares: a tool about flipped bits notices those in its own models.
They find accidents, not forgers (docs/security.md).
"""

import hashlib
import os
import re
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist

from flipproof.errors import ConfigError
from flipproof.files import write_atomically

SUMS = "B2SUMS"
_LINE = re.compile(r"([0-9a-f]{128})  (.+)")


def write_sums(directory: Path, unfinished: Collection[str] = ()) -> None:
    """Hash all files of a directory, but those of these names, which are still to change."""
    files = (str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    names = sorted(name for name in files if name not in unfinished)
    hashes = _hashes(directory / name for name in names)
    write_atomically(directory / SUMS, "".join(f"{mark}  {name}\n" for mark, name in zip(hashes, names, strict=True)))


def check_sums(directory: Path, what: str, weights: bool = True) -> None:
    """Raises ConfigError where a file is not what the directory's sums say, if it has any. Of several processes each
    looks at some of the files.

    Args:
        what: what a message calls the directory.
        weights: look at safetensors, too, which may be large.
    """
    if not (directory / SUMS).exists():
        return
    lines = [_LINE.fullmatch(line) for line in (directory / SUMS).read_text("utf-8", "replace").splitlines()]
    if not lines or not all(lines):
        raise ConfigError([f"{what}: {SUMS} is damaged; write the directory anew, or delete {SUMS} if you trust it"])
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = [(match[1], match[2]) for match in lines[rank::size] if match]
    mine = [(mark, name) for mark, name in mine if weights or not name.endswith(".safetensors")]
    try:
        hashes = _hashes(directory / name for _, name in mine)
        changed = [name for (mark, name), now in zip(mine, hashes, strict=True) if now != mark]
    except OSError as error:
        raise ConfigError([f"{what}: {error.filename}, which {SUMS} names: {error.strerror}"]) from error
    if changed:
        raise ConfigError(
            [
                f"{what}: {name} is not as it was written ({SUMS}); write the directory anew, or delete {SUMS} if you "
                "changed it yourself"
                for name in changed
            ]
        )


def _hashes(files: Iterable[Path]) -> list[str]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(_hash, files))


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()
