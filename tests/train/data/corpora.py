"""Small corpora for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from hypothesis import settings

from loopwise.train.data.build import write
from loopwise.train.data.documents import Piece
from loopwise.train.data.encoding import ByteEncoder, Encoder
from loopwise.train.data.shards import Shards

# Examples write files: few of them, and without a limit on the time of each.
law = settings(deadline=None, max_examples=25)


class NumberEncoder(Encoder):
    """Text "3 1 4" is ids 3 1 4; ids count upwards over a corpus, so that each token can be told from all others."""

    kind = "numbers"
    bos, eos, pad = 1, 0, 2
    sha256 = "numbers"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array([int(word) for word in text.split()], np.int64) for text in texts]

    def save(self, folder: Path) -> None:
        """Nothing to write."""


def numbered(folder: Path, lengths: Sequence[int], *, shard_tokens: int = 50) -> Shards:
    """Documents of these lengths, end tokens included, whose tokens are their places in the stream plus 3."""
    pieces, start = [], 0
    for length in lengths:
        # Pieces are never empty; a document of the end token alone is written as white space.
        pieces.append(
            Piece(text=" ".join(str(3 + place) for place in range(start, start + length - 1)) or " ", ends=True)
        )
        start += length
    return write(folder, pieces, NumberEncoder(sum(lengths) + 3), shard_tokens=shard_tokens)


def of_bytes(folder: Path, texts: Sequence[str], *, shard_tokens: int = 1 << 20) -> Shards:
    """Texts in byte tokens."""
    return write(folder, [Piece(text=text, ends=True) for text in texts], ByteEncoder(), shard_tokens=shard_tokens)
