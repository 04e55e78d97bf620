"""Random order without storing it: any position of a permutation is computed from its key alone.

A short permutation sorts hashes. For a long one, a balanced Feistel network permutes the smallest even power of two
that holds all positions; a value that falls outside is sent through again until it is inside (cycle walking, Black and
Rogaway 2002). Both keep the map a permutation.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 8
# Up to here sorting is as fast, and the network has too few round functions to shuffle a handful of positions.
_SORTED = 1024
_WORD = (1 << 64) - 1


def mix64(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: a fixed bijection of 64-bit words, uint64 of any shape to the same shape."""
    mixed = values.astype(np.uint64, copy=True)
    mixed += np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def key_of(*numbers: int) -> int:
    """One 64-bit key from integers of any sign; their order counts."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = mix64(key ^ mix64(np.array([number & _WORD], np.uint64)))
    return int(key[0])


def permuted(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a random permutation of range(size) sends the positions.

    Args:
        positions: integers in range(size), any shape.
        size: how many positions there are.
        key: chooses the permutation; see `key_of`.

    Returns:
        int64, the same shape; all positions together give every number of range(size) once.
    """
    assert size >= 1
    out = np.array(positions, np.uint64)
    assert not out.size or int(out.max()) < size, "a position outside the permutation"
    if size <= _SORTED:
        hashes = mix64(np.uint64(key & _WORD) ^ mix64(np.arange(size)))
        return np.argsort(hashes, kind="stable")[out.astype(np.int64)]
    half = -(-(size - 1).bit_length() // 2)
    round_keys = mix64(np.uint64(key & _WORD) ^ np.arange(1, _ROUNDS + 1, dtype=np.uint64))
    outside = np.ones(out.shape, bool)
    while outside.any():
        out[outside] = _feistel(out[outside], half, round_keys)
        outside = out >= np.uint64(size)
    return out.astype(np.int64)


def _feistel(values: np.ndarray, half: int, round_keys: np.ndarray) -> np.ndarray:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (mix64(right ^ round_key) & mask)
    return left << shift | right
