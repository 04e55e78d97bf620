"""Pointer chasing: a random function is listed, then asked about after several applications.

Shapes: B rows, N nodes, Q queries, K hop counts of a query, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loopwise.tasks.base import IGNORE, Rows, Task

_QUERY = 1
_FIRST_NODE = 2


@dataclass(frozen=True, kw_only=True)
class Pointer(Task):
    """Read a function as shuffled pairs, then say where k applications of it lead.

    The row is `x f(x)` for all N nodes in random order, "?", and the queries. A dense query is a start followed by one
    token for each hop count in increasing order, and at each of them the node that many hops away is to be said. No
    answer is ever part of the row, so k hops have to be made by depth, while few hops teach the many: a sibling of
    p-hop induction that small models learn quickly. Otherwise a query is a start and one hop count drawn for it.

    Attributes:
        nodes: number of nodes, at least 2.
        hops: the hop counts asked about.
        queries: starts asked about in a row; all different in dense rows.
        dense: whether each start is asked with every hop count.
        bijective: whether the function is a permutation, so that no node is a likelier answer than others.

    Raises:
        ValueError: a size is out of range.
    """

    kind = "task.pointer"

    nodes: int = 16
    hops: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    queries: int = 1
    dense: bool = True
    bijective: bool = True

    def __post_init__(self) -> None:
        """Check the sizes."""
        super().__post_init__()
        self.require(self.nodes >= 2, "nodes", "must be at least 2")
        self.require_counts("hops", least=0)
        self.require(self.hops == tuple(sorted(self.hops)), "hops", "must increase")
        self.require(self.queries >= 1, "queries", "must be at least 1")
        self.require(not self.dense or self.queries <= self.nodes, "queries", "must be at most the number of nodes")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Padding, "?", the nodes, then a token for each hop count."""
        nodes = (f"n{node}" for node in range(self.nodes))
        return ("<pad>", "?", *nodes, *(f"+{count}" for count in self.hops))

    @property
    def length(self) -> int:
        """The table, "?" and the queries."""
        return 2 * self.nodes + 1 + self.queries * (1 + (len(self.hops) if self.dense else 1))

    @property
    def chance(self) -> float:
        """Guessing nodes; of a function that is not bijective, nodes that many lead to are likelier."""
        return float(self.nodes) ** -(self.queries * (len(self.hops) if self.dense else 1))

    def draw(self, rng: np.random.Generator, size: int) -> Rows:
        """Random tables and starts, labelled by applying the function."""
        num = self.nodes
        function_BN = _orders(rng, size, num) if self.bijective else rng.integers(num, size=(size, num))
        order_BN = _orders(rng, size, self.nodes)
        if self.dense:
            starts_BQ = _orders(rng, size, self.nodes)[:, : self.queries]
            which_BQK = np.broadcast_to(np.arange(len(self.hops)), (size, self.queries, len(self.hops)))
        else:
            starts_BQ = rng.integers(self.nodes, size=(size, self.queries))
            which_BQK = rng.integers(len(self.hops), size=(size, self.queries, 1))
        reached_BQH = self._reached(function_BN, starts_BQ)
        pairs_BN2 = np.stack([order_BN, np.take_along_axis(function_BN, order_BN, axis=1)], axis=2) + _FIRST_NODE
        query_BQ = np.concatenate([starts_BQ[..., None], which_BQK + self.nodes], axis=2) + _FIRST_NODE
        answer_BQ = np.full_like(query_BQ, IGNORE)
        answer_BQ[:, :, 1:] = np.take_along_axis(reached_BQH, which_BQK, axis=2) + _FIRST_NODE
        table = (size, 2 * self.nodes)
        return Rows(
            tokens_BT=np.concatenate(
                [pairs_BN2.reshape(table), np.full((size, 1), _QUERY), query_BQ.reshape(size, -1)], axis=1
            ),
            targets_BT=np.concatenate([np.full((size, table[1] + 1), IGNORE), answer_BQ.reshape(size, -1)], axis=1),
            keys={"hops": np.array(self.hops)[which_BQK].max(axis=(1, 2))},
        )

    def solve(self, tokens_T: np.ndarray) -> tuple[int, ...]:
        """Apply the listed function one hop at a time."""
        tokens = [int(token) for token in tokens_T]
        table, queries = tokens[: 2 * self.nodes], tokens[2 * self.nodes + 1 :]
        function = dict(zip(table[::2], table[1::2], strict=True))
        answer: list[int] = []
        start = -1
        for token in queries:
            if token < _FIRST_NODE + self.nodes:
                start = token
                continue
            node = start
            for _ in range(self.hops[token - _FIRST_NODE - self.nodes]):
                node = function[node]
            answer.append(node)
        return tuple(answer)

    def _reached(self, function_BN: np.ndarray, starts_BQ: np.ndarray) -> np.ndarray:
        """The node that each hop count of `hops` leads to from each start, int64 `[B, Q, K]`."""
        reached: list[np.ndarray] = []
        node_BQ = starts_BQ
        for hop in range(max(self.hops) + 1):
            if hop in self.hops:
                reached.append(node_BQ)
            node_BQ = np.take_along_axis(function_BN, node_BQ, axis=1)
        return np.stack(reached, axis=2)


def _orders(rng: np.random.Generator, size: int, num: int) -> np.ndarray:
    """Independent random permutations of 0 .. num - 1, int64 `[size, num]`."""
    return rng.permuted(np.tile(np.arange(num), (size, 1)), axis=1)
