"""Reachability in a directed graph: which of two nodes can be reached from a root (ProsQA without the words).

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from loopwise.tasks.base import IGNORE, PAD, Rows, Task

_NEXT, _ASK, _COLON, _END = range(1, 5)
_FIRST_SYMBOL = 5
_MAX_TRIES = 2000


@dataclass(frozen=True, kw_only=True)
class Reachability(Task):
    """Read the edges `a b ;` of a graph in random order and `? x y root :`, then say which of x and y root leads to.

    The graphs of ProsQA (2412.06769): nodes join one by one with a Poisson(1.5) number of edges from earlier nodes,
    from deep ones more often; the node to find is the deepest that the first root alone reaches, the other one the
    deepest that the second root alone reaches, so that how deep they lie does not tell them apart.

    Attributes:
        num_symbols: names of nodes to choose from.
        num_nodes: nodes of a graph.
        max_edges: graphs with more edges are drawn again; None is 2 * num_nodes.
        min_hops: fewest edges on the shortest path from root to x.
        max_hops: most edges on it.
        steps: the answer is the path, node by node, and "." (a chain of thought); else the node x alone. Where several
            paths lead to x one of the shortest stands in the row, and `verify` accepts all.
    """

    kind: ClassVar[str | None] = "task.reachability"
    num_symbols: int = 64
    num_nodes: int = 23
    max_edges: int | None = None
    min_hops: int = 3
    max_hops: int = 6
    steps: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require(self.num_nodes >= 4, "num_nodes", "must be at least 4")
        self.require(
            self.num_symbols >= self.num_nodes, "num_symbols", f"must be at least num_nodes ({self.num_nodes})"
        )
        self.require(self.num_edges >= self.num_nodes // 2, "max_edges", "must be at least half of num_nodes")
        self.require(1 <= self.min_hops <= self.max_hops, "min_hops", f"must be from 1 to {self.max_hops} (max_hops)")
        self.require(2 * self.min_hops + 2 <= self.num_nodes, "min_hops", "must leave two disjoint paths in num_nodes")

    @property
    def num_edges(self) -> int:
        """The most edges of a graph."""
        return 2 * self.num_nodes if self.max_edges is None else self.max_edges

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Padding, four marks, names of nodes."""
        return ("<pad>", ";", "?", ":", ".", *(f"n{number}" for number in range(1, self.num_symbols + 1)))

    @property
    def length(self) -> int:
        """Three tokens for each edge, five for the question, and the path."""
        return 3 * self.num_edges + 5 + (self.max_hops if self.steps else 0)

    @property
    def chance(self) -> float:
        """One of two; with steps, one of two by a path whose every node has at least one way on."""
        return 0.5

    def draw(self, rng: np.random.Generator, size: int) -> Rows:
        """Graphs with their question; `keys` are the hops."""
        quick = random.Random(int(rng.integers(2**63)))
        tokens_BT = np.full((size, self.length), PAD)
        targets_BT = np.full((size, self.length), IGNORE)
        hops_B = np.zeros(size, np.int64)
        for row in range(size):
            edges, path, other = self._graph(quick)
            names = quick.sample(range(_FIRST_SYMBOL, _FIRST_SYMBOL + self.num_symbols), self.num_nodes)
            quick.shuffle(edges)
            asked = [names[path[-1]], names[other]]
            quick.shuffle(asked)
            tokens = [token for a, b in edges for token in (names[a], names[b], _NEXT)]
            tokens += [_ASK, *asked, names[path[0]], _COLON]
            answer = [*(names[node] for node in path[1:]), _END] if self.steps else [names[path[-1]]]
            targets_BT[row, len(tokens) - 1 : len(tokens) - 1 + len(answer)] = answer
            tokens += answer[:-1]
            tokens_BT[row, : len(tokens)] = tokens
            hops_B[row] = len(path) - 1
        return Rows(tokens_BT=tokens_BT, targets_BT=targets_BT, keys={"hops": hops_B})

    def _graph(self, rng: random.Random) -> tuple[list[tuple[int, int]], list[int], int]:
        """Edges, a shortest path from node 0 to the node to find, and the node not to be found."""
        for _ in range(_MAX_TRIES):
            edges, depths = _grow(rng, self.num_nodes)
            if len(edges) > self.num_edges:
                continue
            found, other = (self._deepest(rng, depths, root) for root in (0, 1))
            if found is not None and other is not None:
                path = [found]
                while path[0] != 0:
                    depth = depths[path[0]][0]
                    path.insert(0, rng.choice([a for a, b in edges if b == path[0] and depths[a].get(0) == depth - 1]))
                return edges, path, other
        raise ValueError(
            f"task.reachability: none of {_MAX_TRIES} graphs of {self.num_nodes} nodes has two nodes that are "
            f"{self.min_hops} to {self.max_hops} hops deep; choose a smaller min_hops or a larger num_nodes"
        )

    def _deepest(self, rng: random.Random, depths: list[dict[int, int]], root: int) -> int | None:
        """One of the deepest nodes that only this root reaches; None where they are not as deep as asked for."""
        own = [node for node in range(2, len(depths)) if list(depths[node]) == [root]]
        hops = max((depths[node][root] for node in own), default=0)
        if not self.min_hops <= hops <= self.max_hops:
            return None
        return rng.choice([node for node in own if depths[node][root] == hops])

    def solve(self, tokens_T: np.ndarray) -> tuple[int, ...]:
        """A shortest path from the root to the node it leads to (and "."), or that node, by breadth-first search."""
        edges, asked, root = self._read(tokens_T)
        came_from, order = {root: root}, [root]
        for node in order:
            for a, b in edges:
                if a == node and b not in came_from:
                    came_from[b] = node
                    order.append(b)
        node = next(node for node in asked if node in came_from)
        path = [node]
        while came_from[path[0]] != root:
            path.insert(0, came_from[path[0]])
        return (*path, _END) if self.steps else (node,)

    def verify(self, tokens_T: np.ndarray, answer: Sequence[int] | np.ndarray) -> bool:
        """Whether the answer is the node that the root leads to; with steps, whether it is a path there and "."."""
        given = tuple(int(token) for token in answer)
        if not self.steps:
            return given == self.solve(tokens_T)
        edges, asked, root = self._read(tokens_T)
        if len(given) < 2 or given[-1] != _END or given[-2] not in asked:
            return False
        return set(zip((root, *given[:-2]), given[:-1], strict=True)) <= set(edges)

    def prompt(self, rows: Rows) -> np.ndarray:
        """Root, the two nodes in rising order, and the edges in rising order."""
        prompt_BN = np.full((len(rows), 3 + self.num_edges), PAD)
        for row, tokens_T in enumerate(rows.tokens_BT):
            edges, asked, root = self._read(tokens_T)
            codes = sorted(a * len(self.vocabulary) + b for a, b in edges)
            prompt_BN[row, : 3 + len(codes)] = [root, *sorted(asked), *codes]
        return prompt_BN

    def _read(self, tokens_T: np.ndarray) -> tuple[list[tuple[int, int]], list[int], int]:
        """Edges, the two nodes asked for, and the root."""
        tokens = tokens_T.tolist()
        ask = tokens.index(_ASK)
        return list(zip(tokens[0:ask:3], tokens[1:ask:3], strict=True)), tokens[ask + 1 : ask + 3], tokens[ask + 3]


def _grow(rng: random.Random, num_nodes: int) -> tuple[list[tuple[int, int]], list[dict[int, int]]]:
    """A graph over nodes 0, 1, ... by the rule of ProsQA: edges, and per node its depth below roots 0 and 1."""
    edges: list[tuple[int, int]] = []
    depths: list[dict[int, int]] = [{0: 0}, {1: 0}]
    for node in range(2, num_nodes):
        chance = rng.random()
        barred = 1 if chance <= 0.35 else 0 if chance <= 0.7 else None
        left = [earlier for earlier in range(node) if barred not in depths[earlier]]
        depth: dict[int, int] = {}
        for _ in range(min(_poisson(rng, 1.5), len(left))):
            # Deeper nodes go on more often, so that paths grow long.
            weights = [1.5 * min(depths[earlier].values(), default=0) + 1 for earlier in left]
            chosen = left.pop(rng.choices(range(len(left)), weights)[0])
            edges.append((chosen, node))
            for root, above in depths[chosen].items():
                depth[root] = min(depth.get(root, above + 1), above + 1)
        depths.append(dict(sorted(depth.items())))
    return edges, depths


def _poisson(rng: random.Random, mean: float) -> int:
    """A Poisson number, as the number of exponential waits that fit into 1."""
    count, time = 0, rng.expovariate(mean)
    while time < 1:
        count, time = count + 1, time + rng.expovariate(mean)
    return count
