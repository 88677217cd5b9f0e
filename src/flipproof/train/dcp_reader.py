"""Reading the files of a checkpoint so that none of them can run anything.

DCP keeps its index as a pickle, and so each value that is not a tensor. Whoever unpickles such a file calls what it
names, and a manifest of hashes is no signature: whoever plants a file computes its hash, too. So the index may name
nothing but what DCP makes an index of, values go through torch's own reader of weights, and both only point at files
that the manifest names.
"""

import errno
import io
import itertools
import os
import pickle
from collections.abc import Container
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

INDEX = ".metadata"
_WITH_STATE = {
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    TensorProperties,
    _StorageInfo,
}
_INDEX_NAMES = {
    *((kind.__module__, kind.__name__) for kind in (*_WITH_STATE, _MEM_FORMAT_ENCODING, torch.Size)),
    ("torch.serialization", "_get_layout"),
    # Python 3.13 keeps the classes of pathlib elsewhere
    *itertools.product(
        ("pathlib", "pathlib._local"), ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    ),
}
"""What an index is made of: classes that hold values and do nothing, as long as nobody changes them."""


class NotACheckpoint(ValueError):
    """A file holds what no checkpoint holds."""


class Planted(NotACheckpoint):
    """It holds what would run something where it was opened with less care: damage hardly does that."""


class _IndexUnpickler(pickle._Unpickler):  # the one in Python, whose steps can be looked at
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and (module, name) not in _INDEX_NAMES:
            raise Planted(f"it names {module}.{name}, which is no part of an index")
        return super().find_class(module, name)

    def load_build(self) -> None:
        """Gives an object its attributes: never a class, whose attributes are what all its objects do."""
        if type(self.stack[-2]) not in _WITH_STATE:
            raise Planted(f"it would change {self.stack[-2]!r}")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build


class SafeReader(FileSystemReader):
    """Reads an index that holds values alone and points at ``files`` alone.

    Raises:
        NotACheckpoint: where it does not, or is none.
    """

    def __init__(self, path: Path, files: Container[str]) -> None:
        super().__init__(path)
        self.index_file, self.files = path / INDEX, files

    def read_metadata(self, *_args: Any, **_more: Any) -> Metadata:
        try:
            if not self.index_file.is_file():  # to open a pipe would wait for ever
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.index_file))
            with self.index_file.open("rb") as file:
                index = _IndexUnpickler(file).load()
            places = _places(index)
            index.storage_meta = StorageMeta()
        except OSError:
            raise
        except Exception as error:  # what a pickle raises that is none is whatever its bytes happen to mean
            kind = Planted if isinstance(error, Planted) else NotACheckpoint
            raise kind(f"{INDEX} is no index of a checkpoint ({' '.join(str(error).split())[:200]})") from error
        for place in places:
            if place not in self.files:
                raise NotACheckpoint(f"{INDEX} points at {place!r}, which is no file of this checkpoint")
        return index

    def check_values(self, rank: int = 0, size: int = 1) -> None:
        """Look at what is no tensor, of ``size`` processes as that of number ``rank``; before anything is loaded, and
        also where it will not be."""
        index = self.read_metadata()
        values = [
            (key.fqn, place)
            for key, place in index.storage_data.items()
            if isinstance(index.state_dict_metadata.get(key.fqn), BytesStorageMetadata)
        ]
        for name, place in values[rank::size]:
            path = self.index_file.parent / place.relative_path
            if not path.is_file() or place.offset + place.length > path.stat().st_size:
                raise NotACheckpoint(f"{name} is beyond the end of {place.relative_path}")
            with path.open("rb") as file:
                file.seek(place.offset)
                _plain(name, io.BytesIO(file.read(place.length)))


def _plain(name: str, data: io.BytesIO) -> Any:
    """A value that is no tensor, read as weights are. Raises NotACheckpoint where it is more than numbers and text."""
    try:
        return torch.load(data, weights_only=True)
    except pickle.UnpicklingError as error:  # torch's words say how to run what is in it
        raise Planted(f"{name} is no plain value, or damaged") from error
    except Exception as error:  # as above
        raise NotACheckpoint(f"{name} is no plain value, or damaged") from error


def _places(index: Any) -> list[str]:
    """The files that an index points at. Raises TypeError where it is none: objects may say one thing to who asks first
    and another to DCP."""
    _check_type(index, Metadata)
    _check_type(index.state_dict_metadata, dict)
    _check_type(index.storage_data, dict)
    for key, place in index.storage_data.items():
        _check_type(key, MetadataIndex)
        _check_type(key.fqn, str)
        _check_type(place, _StorageInfo)
        _check_type(place.relative_path, str)
        for number in (place.offset, place.length):
            _check_type(number, int)
            if number < 0:
                raise ValueError(f"{number} bytes")
    return [place.relative_path for place in index.storage_data.values()]


def _check_type(value: object, kind: type) -> None:
    if type(value) is not kind:
        raise TypeError(f"{type(value).__name__} in the place of {kind.__name__}")


class SafePlanner(DefaultLoadPlanner):
    """Reads what is no tensor as weights are read: numbers, text and their lists.

    Raises:
        NotACheckpoint: naming the value, where it is more.
    """

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(_plain(read_item.dest_index.fqn, value), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)  # which unpickles: bytes of our own, now
