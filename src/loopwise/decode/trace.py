"""One pass over a text at full depth that notes, for every token and rung, what halting rules look at.

The setting is teacher forced: the tokens before have the keys and values of every rung, as with the cache policy
catch_up. `calibrate` says what follows from the numbers.

Shapes: R rungs, N tokens that are predicted, b rows and t tokens of a call, V vocabulary.
"""

# ruff: noqa: N802, N806, N815 -- shape suffixes in names

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from loopwise.decode.halting import FixedDepth, QHalting, halting_text, parse_halting, refuse_rule
from loopwise.decode.result import prompt_span
from loopwise.decode.runner import Carry, Runner
from loopwise.loop.config import Component
from loopwise.loop.criteria import ArgmaxHalting, ConfidenceHalting, Criterion
from loopwise.loop.halting import HazardHalting

_LOGITS_AT_ONCE = 2**24


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """What one pass over a text recorded.

    Attributes:
        loss_RN: negative log likelihood of the next token, read out after each rung, float32 in nats.
        best_RN: the most likely next token after each rung, int64.
        values: for every rule what it compares with its threshold, float32 `[R, N]`; not a number where it has none.
        block_N: which block of neighbours each token is in, int64.
        visits_R: visits of layers of a token that leaves after 1, 2, ... rungs.
        num_tail: visits of one read-out.
    """

    loss_RN: np.ndarray
    best_RN: np.ndarray
    values: dict[str, np.ndarray]
    block_N: np.ndarray
    visits_R: np.ndarray
    num_tail: int

    @property
    def num_rungs(self) -> int:
        """R."""
        return len(self.loss_RN)

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.loss_RN.shape[1]


def text_rows(ids: Sequence[int], length: int) -> list[list[int]]:
    """Cut a text into rows that predict `length` tokens each; a row begins with the last token of the row before.

    Raises:
        ValueError: fewer than two tokens, or a length below 1.
    """
    if length < 1:
        raise ValueError(f"length {length}: rows of at least 1 token")
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens: at least 2 are needed, the first is not predicted")
    return [list(ids[start : start + length + 1]) for start in range(0, len(ids) - 1, length)]


@torch.no_grad()
def record(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    rules: Iterable[Component | str],
    *,
    block: int = 32,
    seed: int = 0,
    on_rows: Callable[[int, int], object] | None = None,
    **options: Any,
) -> Trace:
    """Run a text at full depth and note what every rule sees.

    Args:
        model: see `Runner`.
        rows: token ids of texts of at least two tokens each; the first of each is not predicted.
        rules: rules, or their texts; `fixed` needs none of what is noted.
        block: how many neighbouring tokens are one block.
        seed: of first states that a loop draws at random: row i of the text has seed + i.
        on_rows: called with (rows done, rows in all).
        **options: of `Runner`: loops, exits, initial_state.

    Raises:
        ValueError: a rule that has no threshold or cannot judge this model, or a model that cannot be taken apart.
    """
    if block < 1:
        raise ValueError(f"block {block}: at least 1 token")
    parsed = [parse_halting(rule) if isinstance(rule, str) else rule for rule in rules]
    longest = max(map(len, rows)) - 1
    config: Any = model.config
    vocabulary = config.get_text_config(decoder=True).vocab_size
    size = max(1, min(len(rows), _LOGITS_AT_ONCE // (longest * vocabulary)))
    runner = Runner(model, num_rows=size, capacity=longest, **options)
    for rule in parsed:
        knob(rule)
        refuse_rule(rule, runner)
    notes, blocks = _Notes(parsed), []
    for start in range(0, len(rows), size):
        runner.seeds = [seed + row for row in range(start, start + size)]
        _record_rows(runner, rows[start : start + size], notes)
        if on_rows is not None:
            on_rows(min(start + size, len(rows)), len(rows))
    for number, row in enumerate(rows):
        blocks += [(number, place // block) for place in range(len(row) - 1)]
    _, block_N = np.unique(np.array(blocks), axis=0, return_inverse=True)
    ladder = runner.ladder
    return Trace(
        loss_RN=notes.joined("loss"),
        best_RN=notes.joined("best"),
        values={name: notes.joined(name) for name in dict.fromkeys(map(looks_at, parsed)) if name},
        block_N=block_N.reshape(-1),
        visits_R=np.array([ladder.visits(rungs + 1) for rungs in range(ladder.num_rungs)]),
        num_tail=len(ladder.tail),
    )


def knob(rule: Component) -> str:
    """The field of a rule that calibration sets: threshold, the patience of argmax, the rungs of fixed.

    Raises:
        ValueError: the rule has none.
    """
    if isinstance(rule, FixedDepth):
        return "rungs"
    if isinstance(rule, ConfidenceHalting) and rule.decay:
        raise ValueError("halting rule confidence: a threshold that falls while a text is decoded (decay) is not"
                         " calibrated, use decay=0")  # fmt: skip
    if isinstance(rule, ArgmaxHalting):
        return "patience"
    if isinstance(rule, (Criterion, HazardHalting, QHalting)):
        return "threshold"
    raise ValueError(f"halting rule {halting_text(rule)} has no threshold to calibrate: use hazard or another rule")


class _Notes:
    """Numbers per rung and token, row by row."""

    def __init__(self, rules: Sequence[Component]):
        self.rules = {looks_at(rule): rule for rule in rules if looks_at(rule)}
        self._parts: dict[str, list[np.ndarray]] = {}

    def add(self, name: str, rungs: Sequence[torch.Tensor], valid_bt: torch.Tensor) -> None:
        """One `[b, t]` per rung; places without a token are left out."""
        values_Rn = torch.stack([values_bt[valid_bt] for values_bt in rungs])
        self._parts.setdefault(name, []).append(values_Rn.cpu().numpy())

    def joined(self, name: str) -> np.ndarray:
        """`[R, N]`."""
        return np.concatenate(self._parts[name], axis=1)


def _record_rows(runner: Runner, rows: Sequence[Sequence[int]], notes: _Notes) -> None:
    span = prompt_span([row[:-1] for row in rows], runner.device)
    goal_bt = prompt_span([row[1:] for row in rows], runner.device).tokens_bt
    carry = runner.enter(span)
    states, logits = [carry.state_btD.float()], []
    found: dict[str, list[torch.Tensor]] = {name: [] for name in ("loss", "best", *notes.rules)}
    survival_bt = torch.ones_like(goal_bt, dtype=torch.float32)
    for rung in range(runner.ladder.num_rungs):
        carry = runner.climb(span, carry, rung)
        logits_btV = runner.leave(span, carry).float()
        # No rule looks further back than two rungs.
        states, logits = [*states[-2:], carry.state_btD.float()], [*logits[-2:], logits_btV]
        loss_N = F.cross_entropy(logits_btV.flatten(0, 1), goal_bt.flatten(), reduction="none")
        found["loss"].append(loss_N.view(goal_bt.shape))
        found["best"].append(logits_btV.argmax(-1))
        for name, rule in notes.rules.items():
            if isinstance(rule, Criterion):
                signals = (logits if rule.reads == "logits" else states)[-rule.num_signals :]
                known = len(signals) == rule.num_signals
                value_bt = rule.value(*signals) if known else torch.full_like(survival_bt, torch.nan)
            else:
                value_bt = _gate(runner, carry)
                if isinstance(rule, HazardHalting):
                    survival_bt = survival_bt * (1 - value_bt.sigmoid().float())
                    value_bt = survival_bt
            found[name].append(value_bt.float())
    for name, values in found.items():
        notes.add(name, values, span.valid_bt)


def _gate(runner: Runner, carry: Carry) -> torch.Tensor:
    return cast(Any, runner.module).gate(carry.state_btD)


def looks_at(rule: Component) -> str:
    """Names what a rule looks at, whatever its threshold and patience; empty where it looks at nothing."""
    if isinstance(rule, FixedDepth):
        return ""
    rest = [f"{f.name}={getattr(rule, f.name)}" for f in fields(rule) if f.name not in ("threshold", "patience")]
    return f"{rule.kind}({', '.join(rest)})"
