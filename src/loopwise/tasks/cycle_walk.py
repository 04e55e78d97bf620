"""Walking around a random cycle: k steps from every node, with as many answers in a row as nodes.

Shapes: B rows, N nodes, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loopwise.tasks.base import IGNORE, Rows, Task

FIRST_NODE = 1


@dataclass(frozen=True, kw_only=True)
class CycleWalk(Task):
    """Read the successor of every node of a cycle, then say for every node which one is k steps further.

    The row is the step count k, the successors of nodes 0 .. N - 1 in this order, and all nodes in random order; at
    each of the latter the node k steps further is to be said. As `pointer`, k steps have to be made by depth. The table
    in a fixed order and a cycle, which no walk of fewer than N steps closes, make it the task of this kind that a small
    model learns fastest.

    Attributes:
        nodes: N, at least 2.
        hops: the step counts, one is drawn for each row.

    Raises:
        ValueError: a size is out of range.
    """

    kind = "task.cycle_walk"

    nodes: int = 8
    hops: tuple[int, ...] = (1, 2, 3, 4)

    def __post_init__(self) -> None:
        """Check the sizes."""
        super().__post_init__()
        self.require(self.nodes >= 2, "nodes", "must be at least 2")
        self.require_counts("hops", least=0)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Padding, the nodes, then a token for each step count."""
        return ("<pad>", *(f"n{node}" for node in range(self.nodes)), *(f"+{count}" for count in self.hops))

    @property
    def length(self) -> int:
        """The step count, the table and the nodes."""
        return 1 + 2 * self.nodes

    @property
    def chance(self) -> float:
        """Guessing nodes."""
        return float(self.nodes) ** -self.nodes

    def draw(self, rng: np.random.Generator, size: int) -> Rows:
        """Random cycles, labelled by walking."""
        nodes = np.tile(np.arange(self.nodes), (size, 1))
        order_BN, start_BN = rng.permuted(nodes, axis=1), rng.permuted(nodes, axis=1)
        next_BN = np.empty_like(nodes)
        np.put_along_axis(next_BN, order_BN, np.roll(order_BN, -1, axis=1), axis=1)
        which_B = rng.integers(len(self.hops), size=size)
        hops_B = np.array(self.hops)[which_B]
        end_BN = start_BN
        for hop in range(max(self.hops)):
            end_BN = np.where(hop < hops_B[:, None], np.take_along_axis(next_BN, end_BN, axis=1), end_BN)
        tokens_BT = np.concatenate([self.nodes + which_B[:, None], next_BN, start_BN], axis=1) + FIRST_NODE
        targets_BT = np.full_like(tokens_BT, IGNORE)
        targets_BT[:, 1 + self.nodes :] = end_BN + FIRST_NODE
        return Rows(tokens_BT=tokens_BT, targets_BT=targets_BT, keys={"hops": hops_B})

    def solve(self, tokens_T: np.ndarray) -> tuple[int, ...]:
        """Walk from each node, one step at a time."""
        tokens = [int(token) for token in tokens_T]
        table = tokens[1 : 1 + self.nodes]
        answer = []
        for node in tokens[1 + self.nodes : self.length]:
            for _ in range(self.hops[tokens[0] - self.nodes - FIRST_NODE]):
                node = table[node - FIRST_NODE]
            answer.append(node)
        return tuple(answer)
