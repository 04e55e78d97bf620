"""Depo: hops along a shuffled directed cycle (Physics of Language Models 4.1).

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from loopwise.tasks.base import IGNORE, Rows, Task, padded

_BOS, _ANSWER = 1, 2
_FIRST_PIECE = 3


@dataclass(frozen=True, kw_only=True)
class Depo(Task):
    """Read the edges of one cycle in random order, then name the node k steps on, for several queries.

    The row is "<bos>", the names of both ends of every edge, and the queries `<k> name = answer`; every token of the
    answers is scored and nothing else. A name is a run of pieces, the last of which is of another kind ("3 1 2."), so
    names end by themselves. The names of a row are drawn afresh; a cycle of n nodes takes k modulo n steps.

    The published generator (`facebookresearch/PhysicsLM4`) trains on n in 3 .. N with probability proportional to
    1 / (n + sqrt(N)) and k uniform in 1 .. K, and tests with n = N and k a power of two: `published_test`. Its first
    form has names of 1-2 pieces out of 50, N = 225, 300, 375 and K = 8; its second 5-7 pieces out of 3, N = 75, 100,
    125 and K = 16. The key "hops" is the largest k of a row.

    Attributes:
        nodes: largest number of nodes, N, at least 3.
        hops: largest number of steps, K.
        queries: queries of a row, about different nodes; fewer where the cycle is smaller.
        pieces: kinds of pieces of a name; each has a second form that ends the name.
        name_sizes: numbers of pieces in a name, one number for each name; at most 12.
        published_test: whether every row has N nodes and k is a power of two, or K.

    Raises:
        ValueError: a size is out of range, or there are too few names.
    """

    kind = "task.depo"

    nodes: int = 75
    hops: int = 16
    queries: int = 10
    pieces: int = 3
    name_sizes: tuple[int, ...] = (5, 6, 7)
    published_test: bool = False

    def __post_init__(self) -> None:
        """Check the sizes."""
        super().__post_init__()
        self.require(self.nodes >= 3, "nodes", "must be at least 3")
        self.require(self.hops >= 1, "hops", "must be at least 1")
        self.require(self.queries >= 1, "queries", "must be at least 1")
        self.require(self.pieces >= 1, "pieces", "must be at least 1")
        self.require_counts("name_sizes", least=1, most=12)
        num_names = sum(self.pieces**count for count in self.name_sizes)
        self.require(num_names >= 2 * self.nodes, "nodes", f"must be at most half of the {num_names} possible names")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Padding, the start, "=", pieces inside a name, pieces that end one, then a token for each k."""
        inner = (str(piece) for piece in range(1, self.pieces + 1))
        last = (f"{piece}." for piece in range(1, self.pieces + 1))
        return ("<pad>", "<bos>", "=", *inner, *last, *(f"<{count}>" for count in range(1, self.hops + 1)))

    @property
    def length(self) -> int:
        """A row of N nodes in which every name is as long as possible; the last piece of it is only a target."""
        longest = max(self.name_sizes)
        return 2 * self.nodes * longest + min(self.queries, self.nodes) * (2 + 2 * longest)

    @property
    def chance(self) -> float:
        """Guessing one of the nodes for every query of a full row."""
        return float(self.nodes) ** -min(self.queries, self.nodes)

    def draw(self, rng: np.random.Generator, size: int) -> Rows:
        """Random cycles and queries."""
        nodes_B = np.full(size, self.nodes)
        if not self.published_test:
            choices = np.arange(3, self.nodes + 1)
            weights = 1 / (choices + self.nodes**0.5)
            nodes_B = rng.choice(choices, size=size, p=weights / weights.sum())
        # Python's generator is several times faster than numpy's at single numbers.
        scalar = random.Random(int(rng.integers(2**62)))
        drawn = [self._row(scalar, nodes) for nodes in nodes_B.tolist()]
        return Rows(
            tokens_BT=padded([tokens for tokens, _, _ in drawn], self.length),
            targets_BT=padded([targets for _, targets, _ in drawn], self.length, IGNORE),
            keys={"nodes": nodes_B, "hops": np.array([hops for _, _, hops in drawn])},
        )

    def solve(self, tokens_T: np.ndarray) -> tuple[int, ...]:
        """Read the edges and walk them one at a time."""
        words = self._words([int(token) for token in tokens_T[1:] if token])
        first_query = next(place for place, word in enumerate(words) if self._is_hops(word[0]))
        after = dict(zip(words[0:first_query:2], words[1:first_query:2], strict=True))
        answer: list[int] = []
        for place in range(first_query, len(words)):
            if not self._is_hops(words[place][0]):
                continue
            node = words[place + 1]
            for _ in range(words[place][0] - self._first_hops + 1):
                node = after[node]
            answer += node
        return tuple(answer)

    @property
    def _first_hops(self) -> int:
        return _FIRST_PIECE + 2 * self.pieces

    def _is_hops(self, token: int) -> bool:
        return token >= self._first_hops

    def _words(self, tokens: list[int]) -> list[tuple[int, ...]]:
        """Names, and single tokens for everything else; an unfinished name at the end is left out."""
        words: list[tuple[int, ...]] = []
        name: list[int] = []
        for token in tokens:
            if token < _FIRST_PIECE or self._is_hops(token):
                words.append((token,))
                continue
            name.append(token)
            if token >= _FIRST_PIECE + self.pieces:
                words.append(tuple(name))
                name = []
        return words

    def _row(self, scalar: random.Random, nodes: int) -> tuple[list[int], list[int], int]:
        """Tokens, targets and the largest number of hops."""
        cycle = self._names(scalar, nodes)
        tokens = [_BOS]
        for node in scalar.sample(range(nodes), nodes):
            tokens += [*cycle[node], *cycle[(node + 1) % nodes]]
        targets = [IGNORE] * len(tokens)
        powers = sorted({2**power for power in range(self.hops.bit_length())} | {self.hops})
        largest = 0
        for node in scalar.sample(range(nodes), min(self.queries, nodes)):
            hops = scalar.choice(powers) if self.published_test else scalar.randint(1, self.hops)
            largest = max(largest, hops)
            start, answer = cycle[node], cycle[(node + hops) % nodes]
            tokens += [self._first_hops + hops - 1, *start, _ANSWER, *answer]
            targets += [*[IGNORE] * (1 + len(start)), *answer, IGNORE]
        return tokens[:-1], targets[:-1], largest

    def _names(self, scalar: random.Random, num: int) -> list[tuple[int, ...]]:
        """Different names in random order."""
        inner = range(_FIRST_PIECE, _FIRST_PIECE + self.pieces)
        last = range(_FIRST_PIECE + self.pieces, self._first_hops)
        names: dict[tuple[int, ...], None] = {}
        while len(names) < num:
            pieces = scalar.choices(inner, k=scalar.choice(self.name_sizes) - 1)
            names[*pieces, scalar.choice(last)] = None
        return list(names)
