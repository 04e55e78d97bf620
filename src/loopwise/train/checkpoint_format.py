"""Files of a checkpoint as torch.distributed.checkpoint (DCP) writes them, read without trusting their pickle."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from loopwise.io.folders import checksum

INDEX = ".metadata"
_KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
}


class CheckpointError(OSError, ValueError):
    """A checkpoint cannot be written, or what was written cannot be read; one line that names the path."""


@dataclass(frozen=True)
class _Written(WriteResult):
    """What a rank tells the first one about an item: also size and CRC-32 of the file that holds it."""

    file: tuple[int, int]


class Writer(FileSystemWriter):
    """DCP's writer, which also says what it wrote.

    Attributes:
        files: on the first rank after the save, name -> (bytes, CRC-32) of every file of every rank.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, sync_files=True, overwrite=False)
        self.files: dict[str, tuple[int, int]] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the items of this rank.

        Raises:
            OSError: the disk refuses. torch's zip writer hides it behind a RuntimeError, which loses its cause on the
                way to other ranks.
        """
        try:
            written = super().write_data(plan, planner).value()
        except RuntimeError as error:
            raise cause_of(error) from error
        names = {item.storage_data.relative_path for item in written}
        sums = {name: checksum(Path(self.path) / name) for name in names}
        done: Future[list[WriteResult]] = Future()
        done.set_result(
            [
                _Written(item.index, item.size_in_bytes, item.storage_data, sums[item.storage_data.relative_path])
                for item in written
            ]
        )
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, on the first rank."""
        super().finish(metadata, results)
        written = [item for part in results for item in part]
        self.files = {item.storage_data.relative_path: item.file for item in written if isinstance(item, _Written)}
        self.files[INDEX] = checksum(Path(self.path) / INDEX)

    def storage_meta(self) -> StorageMeta:
        """Without the path of the folder, which is a temporary one and of no use elsewhere."""
        return StorageMeta(save_id=self.save_id)


class Reader(FileSystemReader):
    """DCP's reader over an index that was already read by `read_index`."""

    def __init__(self, path: Path, index: Metadata) -> None:
        super().__init__(path)
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index given; nothing is unpickled."""
        return self._index


class _LimitedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if name not in _KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an index of tensors")
        return super().find_class(module, name)


def read_index(path: Path) -> Metadata:
    """DCP's index of a step folder: which tensor lies where.

    Raises:
        CheckpointError: it is absent, damaged, or holds anything but descriptions of tensors.
    """
    try:
        index = _LimitedUnpickler(io.BytesIO((path / INDEX).read_bytes())).load()
        if not isinstance(index, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(index).__name__}")
        if index.storage_meta is None:
            index.storage_meta = StorageMeta()
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"{path / INDEX} is damaged or no index of tensors: {error}") from error
    return index


def cause_of(error: BaseException) -> BaseException:
    """The OSError that led to an error, else the error itself."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OSError):
        seen = seen.__cause__ or seen.__context__
    return error if seen is None else seen
