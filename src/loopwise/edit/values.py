"""Bytes of tensors that are no plain copies: zeros, means, multiples. Works in small parts; loads torch for numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from loopwise.edit.pieces import Piece

_PART = 1 << 20  # bytes; a multiple of the size of every number
_TORCH_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def parts_of(piece: Piece, files: Mapping[str, int]) -> Iterator[bytes]:
    """The bytes of a tensor from first to last, in parts of at most a mebibyte.

    Args:
        piece: the tensor.
        files: open descriptors of the old files, by name.

    Raises:
        ValueError: a mean of whole numbers that differ, or a source file that ends early.
    """
    total = piece.like.num_bytes
    for start in range(0, total, _PART):
        length = min(_PART, total - start)
        if piece.zero:
            yield bytes(length)
            continue
        raws = [_read(files[tensor.file], tensor.start + start, length) for tensor in piece.sources]
        if piece.is_copy or (piece.scale == 1 and all(raw == raws[0] for raw in raws)):
            yield raws[0]
        elif piece.like.dtype not in _TORCH_TYPES:
            raise ValueError(f"no mean for {piece.name}: its numbers are {piece.like.dtype}, and they differ")
        else:
            yield _computed(raws, piece)


def _computed(raws: list[bytes], piece: Piece) -> bytes:
    import torch

    dtype = getattr(torch, _TORCH_TYPES[piece.like.dtype])
    values = [torch.frombuffer(bytearray(raw), dtype=dtype) for raw in raws]
    result = mean(values) * piece.scale if piece.scale != 1 else mean(values)
    return result.to(dtype).view(torch.uint8).numpy().tobytes()


def mean(values: list[Any]) -> Any:
    """Add the mean distance from the first tensor to it: the mean of equal tensors is exactly that tensor.

    Args:
        values: floating tensors of one shape and type.

    Returns:
        In float32, or in float64 where they are.
    """
    import torch

    first = values[0].to(torch.promote_types(values[0].dtype, torch.float32))
    if len(values) == 1:
        return first
    rest = torch.zeros_like(first)
    for value in values[1:]:
        rest += value.to(first) - first
    return first + rest / len(values)


def _read(file: int, start: int, length: int) -> bytes:
    data = os.pread(file, length, start)
    while len(data) < length:
        more = os.pread(file, length - len(data), start + len(data))
        if not more:
            raise ValueError("a source file has become shorter while it was read: start again")
        data += more
    return data
