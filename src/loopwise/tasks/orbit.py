"""Striding around a random cycle and writing down every stop: an answer of many tokens, each of which needs depth.

Shapes: B rows, N nodes, M stops, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loopwise.tasks.base import IGNORE, Rows, Task

_FIRST_NODE = 1


@dataclass(frozen=True, kw_only=True)
class Orbit(Task):
    """Read the successor of every node of a cycle, then write the stops of a walk that takes k steps at a time.

    The row is the step count k, the successors of nodes 0 .. N - 1 in this order, a start, and the M nodes k, 2 k, ...
    M k steps further. Each stop follows from the one before, so the answer is generated and not read off (`cycle_walk`
    asks the same of every node by itself), and k steps between two stops have to be made by depth. Where the walk would
    come back to its start before it has made all stops, an answer could be copied: sizes that allow it are refused.

    Attributes:
        nodes: N, at least 2.
        hops: the step counts, one is drawn for each row.
        stops: M, the length of the answer.

    Raises:
        ValueError: a size is out of range, or a walk closes within its answer.
    """

    kind = "task.orbit"

    nodes: int = 13
    hops: tuple[int, ...] = (1, 2, 3, 4)
    stops: int = 12

    def __post_init__(self) -> None:
        """Check the sizes."""
        super().__post_init__()
        self.require(self.nodes >= 2, "nodes", "must be at least 2")
        self.require_counts("hops", least=1)
        self.require(self.stops >= 1, "stops", "must be at least 1")
        most = min(self.nodes // np.gcd(self.nodes, count) for count in self.hops) - 1
        self.require(self.stops <= most, "stops", f"must be at most {most}, where a walk comes back to its start")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Padding, the nodes, then a token for each step count."""
        return ("<pad>", *(f"n{node}" for node in range(self.nodes)), *(f"+{count}" for count in self.hops))

    @property
    def length(self) -> int:
        """The step count, the table, the start and the stops but the last, which is only ever a target."""
        return 1 + self.nodes + self.stops

    @property
    def chance(self) -> float:
        """Guessing among the nodes that were not visited yet."""
        return float(np.prod([1 / (self.nodes - made - 1) for made in range(self.stops)]))

    def draw(self, rng: np.random.Generator, size: int) -> Rows:
        """Random cycles; the stops are read off the order in which the cycle was made."""
        nodes = np.tile(np.arange(self.nodes), (size, 1))
        order_BN = rng.permuted(nodes, axis=1)
        next_BN = np.empty_like(nodes)
        np.put_along_axis(next_BN, order_BN, np.roll(order_BN, -1, axis=1), axis=1)
        which_B = rng.integers(len(self.hops), size=size)
        hops_B = np.array(self.hops)[which_B]
        place_BM = rng.integers(self.nodes, size=size)[:, None] + hops_B[:, None] * np.arange(self.stops + 1)
        walk_BM = np.take_along_axis(order_BN, place_BM % self.nodes, axis=1) + _FIRST_NODE
        leading_BT = np.concatenate([self.nodes + which_B[:, None], next_BN], axis=1) + _FIRST_NODE
        return Rows(
            tokens_BT=np.concatenate([leading_BT, walk_BM[:, :-1]], axis=1),
            targets_BT=np.concatenate([np.full_like(leading_BT, IGNORE), walk_BM[:, 1:]], axis=1),
            keys={"hops": hops_B},
        )

    def solve(self, tokens_T: np.ndarray) -> tuple[int, ...]:
        """Walk from the start, one step at a time."""
        tokens = [int(token) for token in tokens_T]
        table, node = tokens[1 : 1 + self.nodes], tokens[1 + self.nodes]
        answer = []
        for _ in range(self.stops):
            for _ in range(self.hops[tokens[0] - self.nodes - _FIRST_NODE]):
                node = table[node - _FIRST_NODE]
            answer.append(node)
        return tuple(answer)
