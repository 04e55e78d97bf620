"""The files of an edited folder: which tensors go where, written so that a crash leaves whole files or none."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from loopwise.edit.pieces import Piece
from loopwise.edit.values import parts_of
from loopwise.io.tensors import SINGLE, Checkpoint, copy_range, header_bytes, write_at

# A copy inside the kernel cannot be interrupted: so much at a time.
_STRIDE = 1 << 26
# One file is copied while another is being flushed to the disk.
_WORKERS = 2


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file to write.

    Attributes:
        name: its name.
        pieces: its tensors, in the order of their bytes.
        metadata: texts of its header.
    """

    name: str
    pieces: tuple[Piece, ...]
    metadata: Mapping[str, str]

    @cached_property
    def header(self) -> bytes:
        """Its length field and header."""
        return header_bytes(((piece.name, piece.like) for piece in self.pieces), self.metadata)

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return len(self.header) + sum(piece.like.num_bytes for piece in self.pieces)


def shards_of(pieces: Sequence[Piece], checkpoint: Checkpoint, shard_size: int | None) -> list[Shard]:
    """Tensors shared out to files of at most `shard_size` bytes of tensors; a larger tensor has a file of its own.

    Args:
        pieces: all tensors.
        checkpoint: the old folder, whose way is taken where `shard_size` is None: one file, or several no larger than
            its largest.
        shard_size: bytes; 0 for a single file.
    """
    if shard_size is None:
        largest = max(sum(tensor.num_bytes for tensor in file.tensors.values()) for file in checkpoint.files.values())
        shard_size = largest if checkpoint.is_sharded else 0
    groups: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if shard_size and groups[-1] and size + piece.like.num_bytes > shard_size:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.like.num_bytes
    metadata = next((file.metadata for file in checkpoint.files.values()), {}) or {"format": "pt"}
    count = len(groups)
    names = [SINGLE] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    # Wide numbers first, so that every tensor starts at a multiple of its number's size.
    ordered = [tuple(sorted(group, key=lambda piece: -piece.like.bits)) for group in groups]
    return [Shard(name=n, pieces=group, metadata=metadata) for n, group in zip(names, ordered, strict=True)]


def index_of(shards: Sequence[Shard], checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The index of several files; None for a single one."""
    if len(shards) == 1:
        return None
    pieces = [piece for shard in shards for piece in shard.pieces]
    metadata: dict[str, Any] = {"total_size": sum(piece.like.num_bytes for piece in pieces)}
    if "total_parameters" in (checkpoint.index.get("metadata") or {}):
        metadata["total_parameters"] = sum(piece.like.num_bytes * 8 // piece.like.bits for piece in pieces)
    where = {piece.name: shard.name for shard in shards for piece in shard.pieces}
    return {"metadata": metadata, "weight_map": dict(sorted(where.items()))}


def write_shards(
    shards: Sequence[Shard], checkpoint: Checkpoint, folder: Path, progress: Callable[[int], object]
) -> list[str]:
    """Write files into a folder, each under its name only once it is whole and on the disk.

    Files that are there already are compared with what they should hold, byte for byte, and kept.

    Args:
        shards: what to write.
        checkpoint: where the bytes come from.
        folder: where the files go.
        progress: told the number of bytes after every part.

    Returns:
        Names of the files that were kept.

    Raises:
        ValueError: a file that is there already holds something else.
        OSError: what the system says, such as a full disk.
    """
    stop = threading.Event()
    jobs = []
    with _opened(checkpoint) as files, ThreadPoolExecutor(_WORKERS) as pool:
        try:
            for shard in shards:
                task = _compare if (folder / shard.name).exists() else _write
                jobs.append((shard, task, pool.submit(task, shard, folder, files, progress, stop)))
            wait([job for _, _, job in jobs], return_when=FIRST_EXCEPTION)
        finally:  # after an error or an interrupt the others end at their next part
            stop.set()
            for _, _, job in jobs:
                job.cancel()
    errors = [job.exception() for _, _, job in jobs if not job.cancelled() and job.exception() is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, InterruptedError)):
        assert error is not None
        raise error
    return [shard.name for shard, task, _ in jobs if task is _compare]


@contextmanager
def _opened(checkpoint: Checkpoint) -> Iterator[dict[str, int]]:
    files: dict[str, int] = {}
    try:
        for name, file in checkpoint.files.items():
            files[name] = os.open(file.path, os.O_RDONLY)
        yield files
    finally:
        for handle in files.values():
            os.close(handle)


def _runs(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, int]]:
    """Tensors in order, as (first of a run of copies that lie side by side in an old file, bytes of the run)."""
    run: tuple[Piece, int] | None = None
    for piece in pieces:
        size = piece.like.num_bytes
        if run is not None and piece.is_copy and run[0].is_copy:
            if run[0].like.file == piece.like.file and run[0].like.start + run[1] == piece.like.start:
                run = (run[0], run[1] + size)
                continue
        if run is not None:
            yield run
        run = (piece, size)
    if run is not None:
        yield run


def _write(
    shard: Shard, folder: Path, files: Mapping[str, int], progress: Callable[[int], object], stop: threading.Event
) -> None:
    temporary = folder / f"{shard.name}.part"
    try:
        target = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            position = write_at(target, shard.header, 0)
            for piece, size in _runs(shard.pieces):
                for count in _filled(piece, size, position, target, files):
                    position += count
                    progress(count)
                    if stop.is_set():
                        raise InterruptedError
            os.fsync(target)
        finally:
            os.close(target)
        os.replace(temporary, folder / shard.name)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _filled(piece: Piece, size: int, position: int, target: int, files: Mapping[str, int]) -> Iterator[int]:
    if not piece.is_copy:
        for part in parts_of(piece, files):
            position += write_at(target, part, position)
            yield len(part)
        return
    for start in range(0, size, _STRIDE):
        count = min(_STRIDE, size - start)
        copy_range(files[piece.like.file], target, piece.like.start + start, position + start, count)
        yield count


def _compare(
    shard: Shard, folder: Path, files: Mapping[str, int], progress: Callable[[int], object], stop: threading.Event
) -> None:
    path = folder / shard.name
    with open(path, "rb") as file:
        same = path.stat().st_size == shard.num_bytes and file.read(len(shard.header)) == shard.header
        for piece in shard.pieces if same else ():
            for part in parts_of(piece, files):
                same = same and file.read(len(part)) == part
                progress(len(part))
            if stop.is_set():
                raise InterruptedError
            if not same:
                break
    if not same:
        raise ValueError(f"{path} of an interrupted edit holds something else: remove {folder.parent} and start again")
