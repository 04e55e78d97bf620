"""Safetensors files as byte ranges: which tensors a folder holds and where, without loading one.

A file is an 8-byte little-endian length, a JSON header of that length, and the bytes of the tensors one after the
other (github.com/huggingface/safetensors). Loads neither torch nor numpy.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER = 100_000_000  # the limit of the safetensors library
_PIECE = 1 << 20
# Bits of one number. Some types are smaller than a byte.
_BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
_NO_KERNEL_COPY = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EBADF)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """One tensor of a file.

    Attributes:
        file: name of the file in its folder.
        dtype: as safetensors spells it, such as `BF16`.
        shape: its shape.
        start, stop: its bytes in the file, counted from the file's first.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return self.stop - self.start

    @property
    def bits(self) -> int:
        """Bits of one number; 8 for a type that is not known here."""
        return _BITS.get(self.dtype, 8)


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """A file and its header.

    Attributes:
        path: where it is.
        tensors: by name, in the order of their bytes.
        metadata: the texts that the header carries.
        digest: SHA-256 of the header.
        stamp: (size, time of the last change in nanoseconds), which differ once the file is another one.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    digest: str
    stamp: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The weights of a folder.

    Attributes:
        folder: the folder.
        files: by name.
        tensors: all of them, by name.
        index: what the index says beside the map; empty for a single file.
    """

    folder: Path
    files: dict[str, TensorFile]
    tensors: dict[str, Tensor]
    index: dict[str, Any]

    @property
    def is_sharded(self) -> bool:
        """Whether the folder has an index."""
        return (self.folder / INDEX).exists()

    def changed(self) -> str | None:
        """Name of a file that is not what it was when its header was read, or None."""
        for name, file in self.files.items():
            if not file.path.exists() or _stamp(file.path) != file.stamp:
                return name
        return None


def read_checkpoint(folder: Path | str) -> Checkpoint:
    """The headers of a folder's safetensors files, checked against each other and the files' sizes.

    Raises:
        ValueError: no safetensors in the folder (how to get there is said for pickles), a file that is missing,
            truncated or no safetensors, or an index that does not fit.
    """
    folder = Path(folder)
    if (folder / INDEX).exists():
        return _read_sharded(folder)
    if (folder / SINGLE).exists():
        file = read_file(folder / SINGLE)
        return Checkpoint(folder=folder, files={SINGLE: file}, tensors=file.tensors, index={})
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise ValueError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which is code: load it in transformers and "
            f"save it again with save_pretrained, which writes safetensors"
        )
    raise ValueError(f"{folder} holds no weights: neither {SINGLE} nor {INDEX}")


def _read_sharded(folder: Path) -> Checkpoint:
    index = read_json(folder / INDEX)
    where = index.get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map: write the checkpoint again")
    files: dict[str, TensorFile] = {}
    for name in sorted(set(where.values())):
        if Path(name).name != name:
            raise ValueError(f"{folder / INDEX} names {name}, which is not a file beside it")
        if not (folder / name).exists():
            raise ValueError(f"{folder / INDEX} names {name}, which is not there: the checkpoint is incomplete")
        files[name] = read_file(folder / name)
    for tensor, name in where.items():
        if tensor not in files[name].tensors:
            raise ValueError(f"{folder / INDEX} says that {tensor} is in {name}, which does not hold it")
    for name, file in files.items():
        extra = next((tensor for tensor in file.tensors if where.get(tensor) != name), None)
        if extra is not None:
            raise ValueError(
                f"{folder / name} holds {extra}, which the index does not say: the index is of other files"
            )
    tensors = {name: tensor for file in files.values() for name, tensor in file.tensors.items()}
    return Checkpoint(folder=folder, files=files, tensors=tensors, index=index)


def read_file(path: Path) -> TensorFile:
    """The header of one safetensors file.

    Raises:
        ValueError: it is truncated or no safetensors file.
    """
    stamp = _stamp(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little") if stamp[0] >= 8 else -1
        if not 2 <= length <= _MAX_HEADER:
            raise ValueError(f"{path} is not a safetensors file: its first bytes are no length of a header")
        if 8 + length > stamp[0]:
            raise ValueError(f"{path} is truncated: its header has {length} bytes, the file {stamp[0]}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", None) or {}
        tensors = {name: _tensor(path.name, item, 8 + length) for name, item in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is not a safetensors file: its header cannot be read") from None
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)))
    end = 8 + length
    for name, tensor in ordered.items():
        if tensor.start != end or tensor.stop < tensor.start or not _is_sized(tensor):
            raise ValueError(f"{path} is not a safetensors file: the bytes of {name} are not where they should be")
        end = tensor.stop
    if end != stamp[0]:
        what = "is truncated" if end > stamp[0] else "has bytes that no tensor names"
        raise ValueError(f"{path} {what}: its header names {end} bytes, the file has {stamp[0]}")
    return TensorFile(
        path=path, tensors=ordered, metadata=metadata, digest=hashlib.sha256(raw).hexdigest(), stamp=stamp
    )


def _tensor(file: str, item: Mapping[str, Any], offset: int) -> Tensor:
    start, stop = item["data_offsets"]
    return Tensor(
        file=file,
        dtype=str(item["dtype"]),
        shape=tuple(int(size) for size in item["shape"]),
        start=offset + int(start),
        stop=offset + int(stop),
    )


def _is_sized(tensor: Tensor) -> bool:
    bits = _BITS.get(tensor.dtype)
    return bits is None or math.prod(tensor.shape) * bits == tensor.num_bytes * 8


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is not a file")
    return found.st_size, found.st_mtime_ns


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError names the file when it holds none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError):
        raise ValueError(f"{path} is not JSON: it is damaged or incomplete") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object")
    return values


def header_bytes(tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]) -> bytes:
    """Length and header of a file that holds these tensors one after the other, padded to a multiple of 8 bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, tensor in tensors:
        offsets = [position, position + tensor.num_bytes]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def copy_range(source: int, target: int, start: int, position: int, length: int) -> None:
    """Copy bytes between two open files inside the kernel where it can, else through a small buffer.

    Args:
        source: descriptor of the file to read.
        target: descriptor of the file to write.
        start: first byte in the source.
        position: where it goes in the target.
        length: how many.

    Raises:
        ValueError: the source ends early.
        OSError: what the system says, such as a full disk.
    """
    done = 0
    in_kernel = hasattr(os, "copy_file_range")
    while done < length:
        if in_kernel:
            try:
                count = os.copy_file_range(source, target, length - done, start + done, position + done)
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
                in_kernel = False
                continue
        else:
            count = write_at(target, os.pread(source, min(_PIECE, length - done), start + done), position + done)
        if count == 0:
            raise ValueError("a source file has become shorter while it was copied: start again")
        done += count


def write_at(target: int, data: bytes | bytearray | memoryview, position: int) -> int:
    """Write all of the data at a place in an open file; returns its size."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += os.pwrite(target, view[done:], position + done)
    return done
