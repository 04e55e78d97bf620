"""Powers of a random cycle, written out as a table: an answer of many tokens, each of which needs depth of its own.

Shapes: B rows, N nodes, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loopwise.tasks.base import IGNORE, Rows, Task

_EQUALS = 1
_FIRST_NODE = 2


@dataclass(frozen=True, kw_only=True)
class CyclePower(Task):
    """Read the successor of every node of a cycle, then write, node by node, which one is k steps further.

    The row is the step count k, the successors of nodes 0 .. N - 1 in this order, "=", and the nodes k steps after nodes
    0 .. N - 1. `cycle_walk` asks the same of nodes that it names, all at once; here the answer is generated, and what
    stands in it already helps: node f(x), k steps after which the answer says g(f(x)), tells that g(x) is one step
    before that. So some tokens of an answer need as many look-ups as steps and others fewer.

    Attributes:
        nodes: N, at least 2.
        hops: the step counts, one is drawn for each row.

    Raises:
        ValueError: a size is out of range.
    """

    kind = "task.cycle_power"

    nodes: int = 13
    hops: tuple[int, ...] = (1, 2, 3, 4, 5, 6)

    def __post_init__(self) -> None:
        """Check the sizes."""
        super().__post_init__()
        self.require(self.nodes >= 2, "nodes", "must be at least 2")
        self.require_counts("hops", least=0)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Padding, "=", the nodes, then a token for each step count."""
        return ("<pad>", "=", *(f"n{node}" for node in range(self.nodes)), *(f"+{count}" for count in self.hops))

    @property
    def length(self) -> int:
        """The step count, the table, "=" and the answer but its last token, which is only ever a target."""
        return 1 + 2 * self.nodes

    @property
    def chance(self) -> float:
        """Of the powers that may be asked for one: as many answers as step counts."""
        return 1 / len({count % self.nodes for count in self.hops})

    def draw(self, rng: np.random.Generator, size: int) -> Rows:
        """Random cycles; both tables are read off the order in which the cycle was made."""
        nodes_BN = np.tile(np.arange(self.nodes), (size, 1))
        order_BN = rng.permuted(nodes_BN, axis=1)
        which_B = rng.integers(len(self.hops), size=size)
        hops_B = np.array(self.hops)[which_B]

        def table(steps_B: np.ndarray) -> np.ndarray:
            after_BN = np.take_along_axis(order_BN, (nodes_BN + steps_B[:, None]) % self.nodes, axis=1)
            result_BN = np.empty_like(nodes_BN)
            np.put_along_axis(result_BN, order_BN, after_BN + _FIRST_NODE, axis=1)
            return result_BN

        count_B1 = _FIRST_NODE + self.nodes + which_B[:, None]
        prompt_BT = np.concatenate([count_B1, table(np.ones_like(hops_B)), np.full((size, 1), _EQUALS)], axis=1)
        answer_BN = table(hops_B)
        return Rows(
            tokens_BT=np.concatenate([prompt_BT, answer_BN[:, :-1]], axis=1),
            targets_BT=np.concatenate([np.full_like(prompt_BT[:, :-1], IGNORE), answer_BN], axis=1),
            keys={"hops": hops_B},
        )

    def solve(self, tokens_T: np.ndarray) -> tuple[int, ...]:
        """Walk from each node, one step at a time."""
        tokens = [int(token) for token in tokens_T]
        table = tokens[1 : 1 + self.nodes]
        answer = []
        for start in range(self.nodes):
            node = start + _FIRST_NODE
            for _ in range(self.hops[tokens[0] - self.nodes - _FIRST_NODE]):
                node = table[node - _FIRST_NODE]
            answer.append(node)
        return tuple(answer)
