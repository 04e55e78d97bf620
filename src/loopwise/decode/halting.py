"""When a token goes no deeper, judged rung by rung while decoding.

| rule | a token stops after a rung when | needs |
|---|---|---|
| fixed(n) | it has run n rungs | nothing |
| latent, cosine, second_difference | its state hardly changes | nothing |
| kl, minp_kl, entropy, argmax | its prediction hardly changes | a read-out at every rung |
| confidence | its prediction is certain | a read-out at every rung |
| hazard, ponder | the cumulated probability of its gate reaches a threshold; at random | an exit gate |
| act | the summed probabilities of its gate reach 1; what leaves is the weighted mean of its states | an exit gate |
| q | the gate, read as the logit of "stop", is above 0 (TRM, 2510.04871) | an exit gate |

States are those that the loop carries, before its exit norm and the coda, and the first comparison is with the state
before the first rung, as in Huginn's evaluators (2502.05171). A read-out runs the tail of the ladder and the head of
the model: its visits are counted. Predictions have no value before the first rung, so rules that compare them stop
after two rungs at the earliest.

Shapes: B rows of the cache, b rows of a call (one token each), D width, V vocabulary.
"""

# ruff: noqa: N802 -- shape suffixes in names

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, cast

import torch

from loopwise.decode.cache import Span
from loopwise.decode.runner import Carry, Runner
from loopwise.loop.act import ActHalting, ActState
from loopwise.loop.config import Component, suggest
from loopwise.loop.criteria import (
    ArgmaxHalting,
    ConfidenceHalting,
    CosineHalting,
    Criterion,
    EntropyHalting,
    KlHalting,
    LatentHalting,
    MinpKlHalting,
    SecondDifferenceHalting,
)
from loopwise.loop.halting import FixedHalting, HaltState, HazardHalting, PonderHalting


@dataclass(frozen=True, kw_only=True)
class FixedDepth(Component):
    """Stop after so many rungs.

    Attributes:
        rungs: how many; 0 for all.
    """

    kind: ClassVar[str | None] = "halting.fixed_depth"
    rungs: int = 0

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        self.require(self.rungs >= 0, "rungs", "must be at least 1, or 0 for all")


@dataclass(frozen=True, kw_only=True)
class QHalting(Component):
    """Stop when the gate's logit is above a threshold: the gate is read as a Q-head's "stop", not as a hazard.

    Attributes:
        threshold: of the logit; 0 is a probability of one half.
    """

    kind: ClassVar[str | None] = "halting.q"
    threshold: float = 0.0


RULES: dict[str, type[Component]] = {
    "fixed": FixedDepth,
    "latent": LatentHalting,
    "second_difference": SecondDifferenceHalting,
    "cosine": CosineHalting,
    "kl": KlHalting,
    "minp_kl": MinpKlHalting,
    "entropy": EntropyHalting,
    "argmax": ArgmaxHalting,
    "confidence": ConfidenceHalting,
    "hazard": HazardHalting,
    "ponder": PonderHalting,
    "act": ActHalting,
    "q": QHalting,
}
_FIRST = {"fixed": "rungs", "argmax": "patience", "act": "epsilon", "ponder": None}  # others: threshold
_OF_GATES = (HazardHalting, PonderHalting, ActHalting, QHalting)


def parse_halting(text: str) -> Component:
    """Read a rule such as `kl`, `kl(threshold=1e-3, patience=2)`, `hazard(0.5)`, `fixed(4)` or `confidence(0.9)`.

    A value without a name is the rule's first field: the threshold, or the rungs of `fixed`, the patience of `argmax`,
    the epsilon of `act`.

    Raises:
        ValueError: not such a text, an unknown rule or field, or a value that the rule refuses.
    """
    match = re.fullmatch(r"\s*([\w-]+)\s*(?:\((.*)\)\s*)?", text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"halting {text!r}: write a rule such as 'kl', 'hazard(0.5)' or 'kl(threshold=1e-3)'")
    name = match[1].replace("-", "_")
    if name not in RULES:
        raise ValueError(f"halting rule {name!r} is unknown: use {', '.join(RULES)}")
    rule, given = RULES[name], {}
    known = [field.name for field in fields(rule)]
    for place, part in enumerate((match[2] or "").split(",") if (match[2] or "").strip() else []):
        field, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            field, value = _FIRST.get(name, "threshold"), field
            if place or field is None:
                raise ValueError(f"halting {text!r}: {value!r} needs a name, one of {', '.join(known) or 'none'}")
        if field not in known:
            raise ValueError(f"halting rule {name} has no field {field!r}{suggest(str(field), known)}")
        if field in given:
            raise ValueError(f"halting {text!r}: {field} is given twice")
        given[str(field)] = _value(value)
    return rule(**given)


def halting_text(rule: Component) -> str:
    """The text of a rule, as `parse_halting` reads it: fields that differ from their defaults."""
    name = next((name for name, found in RULES.items() if type(rule) is found), None)
    if name is None:
        return str(rule.kind).removeprefix("halting.")
    told, first = [], _FIRST.get(name, "threshold")
    for field in fields(rule):
        value = getattr(rule, field.name)
        if field.default is MISSING or value != field.default:
            told.append((field.name != first, f"{value}" if field.name == first else f"{field.name}={value}"))
    return f"{name}({', '.join(text for _, text in sorted(told))})" if told else name


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdict:
    """What a rule says after a rung.

    Attributes:
        stops_b: bool `[b]`, the token goes no deeper.
        logits_bV: the prediction after this rung, where the rule has read it; None otherwise.
    """

    stops_b: torch.Tensor
    logits_bV: torch.Tensor | None = None


class Halter:
    """A rule at work on some rows, each with one token on its way up, at whatever rung.

    What it remembers is per row of the cache, so rows may join and leave between two calls and a row's verdict does not
    depend on the others of a call. The order for a token, after `runner.enter`:

        halter.start(span.rows_b, carry)
        while True:
            halter.enter(span, carry, rung)
            carry = runner.climb(span, carry, rung)
            verdict = halter.judge(span, carry, rung, last=...)
        logits_btV = runner.leave(span, halter.output(span, carry))     # or those of the verdict

    Args:
        runner: runs the model.
        rule: see `parse_halting`, or its text.
        min_rungs: no token stops before.
        seeds: one number per row, of the draws of `ponder`.

    Attributes:
        rule: the rule.
        readouts: predictions read so far to judge them, summed over tokens.

    Raises:
        ValueError: the rule cannot judge this model.
    """

    def __init__(
        self, runner: Runner, rule: Component | str, *, min_rungs: int = 1, seeds: Sequence[int] | None = None
    ):
        self.rule: Component = parse_halting(rule) if isinstance(rule, str) else rule
        self.runner, self.min_rungs, self.readouts = runner, min_rungs, 0
        refuse_rule(self.rule, runner)
        if not 1 <= min_rungs <= runner.ladder.num_rungs:
            raise ValueError(f"min_rungs {min_rungs}: from 1 to {runner.ladder.num_rungs}")
        if self.mixes_states and min_rungs > 1:
            raise ValueError(f"min_rungs {min_rungs}: with act the weights of a token sum to 1 when it stops, use 1")
        num_rows, device = runner.num_rows, runner.device
        self._survival_B = torch.ones(num_rows, device=device)
        self._streak_B = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._seen_B = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._progress_B = torch.zeros(num_rows, device=device)
        self._signals: list[torch.Tensor] = []  # of the latest rungs, oldest first, each [B, D or V]
        self._act: dict[str, torch.Tensor] = {}
        self._generators = [torch.Generator() for _ in range(num_rows)] if isinstance(self.rule, PonderHalting) else []
        for row in range(num_rows):
            self.reset(row, 0 if seeds is None else seeds[row])

    @property
    def mixes_states(self) -> bool:
        """True when what leaves is made of several states, so that a verdict is needed at every rung."""
        return isinstance(self.rule, ActHalting)

    def reset(self, row: int, seed: int = 0) -> None:
        """Give a row to someone else: its draws start anew. What `start` resets needs nothing here."""
        if self._generators:
            # Another stream than the one that draws tokens with the same seed.
            self._generators[row].manual_seed((seed ^ 0x9E3779B97F4A7C15) & (2**63 - 1))

    def start(self, rows_b: torch.Tensor, carry: Carry, progress: float | Sequence[float] = 0.0) -> None:
        """A new token of these rows has entered.

        Args:
            rows_b: rows of the cache, each once.
            carry: what `runner.enter` gave, one token per row.
            progress: how far the text is, from 0 to 1, one number or one per row; for a threshold that falls.
        """
        self._survival_B[rows_b] = 1.0
        self._streak_B[rows_b] = 0
        self._seen_B[rows_b] = 0
        self._progress_B[rows_b] = torch.as_tensor(progress, dtype=torch.float32, device=self.runner.device)
        if isinstance(self.rule, Criterion) and self.rule.reads == "state":
            self._observe(rows_b, carry.state_btD[:, 0])
        for tensor in self._act.values():
            tensor[rows_b] = torch.zeros((), dtype=tensor.dtype, device=tensor.device)

    def enter(self, span: Span, carry: Carry, rung: int | torch.Tensor, counts: int | torch.Tensor = 0) -> None:
        """A rung is about to be run: adaptive computation time reads its gate here, as its papers do."""
        if isinstance(self.rule, ActHalting):
            p_b = self._gate(self.runner.entering(span, carry, rung, counts)).sigmoid()
            self._act_memory("p", p_b, p_b.shape[1:])[span.rows_b] = p_b

    def judge(self, span: Span, carry: Carry, rung: int | torch.Tensor, last: bool | torch.Tensor = False) -> Verdict:
        """Who stops after a rung.

        Args:
            span: one token of each row, no row twice.
            carry: what they have after the rung.
            rung: its number from 0, or one per row, int64 `[b]`.
            last: they go no deeper whatever the rule says, one or bool `[b]`.
        """
        rows_b = span.rows_b
        assert span.positions_bt.shape[1] == 1
        done_b = torch.as_tensor(rung, device=self.runner.device).expand(len(rows_b)) + 1
        last_b = torch.as_tensor(last, device=self.runner.device).expand(len(rows_b))
        logits_bV = None
        if isinstance(self.rule, Criterion):
            stops_b, logits_bV = self._judge_change(self.rule, span, carry, done_b)
        elif isinstance(self.rule, FixedDepth):
            stops_b = done_b >= self.rule.rungs if self.rule.rungs else torch.zeros_like(last_b)
        elif isinstance(self.rule, QHalting):
            stops_b = self._gate(carry.state_btD) > self.rule.threshold
        elif isinstance(self.rule, ActHalting):
            stops_b = self._mix(self.rule, rows_b, carry.state_btD[:, 0], last_b)
        elif isinstance(self.rule, FixedHalting):
            stops_b = torch.zeros_like(last_b)
        else:
            stops_b = self._judge_hazard(cast(HazardHalting, self.rule), rows_b, self._gate(carry.state_btD).sigmoid())
        return Verdict(stops_b=last_b | (stops_b & (done_b >= self.min_rungs)), logits_bV=logits_bV)

    def output(self, span: Span, carry: Carry) -> Carry:
        """What tokens leave with: the carry, or with adaptive computation time the weighted mean of their states."""
        if not self.mixes_states:
            return carry
        return Carry(state_btD=self._act["output"][span.rows_b][:, None], injected_btD=carry.injected_btD)

    # The rules.

    def _gate(self, state_btD: torch.Tensor) -> torch.Tensor:
        """Logits of one token per row, `[b]`."""
        return cast(Any, self.runner.module).gate(state_btD)[:, 0]

    def _observe(self, rows_b: torch.Tensor, signal_bX: torch.Tensor) -> list[torch.Tensor]:
        """Remember a signal; returns the latest ones, oldest first."""
        signal_bX = signal_bX.float()
        if not self._signals:
            size = self.runner.num_rows, signal_bX.shape[1]
            self._signals = [signal_bX.new_zeros(size) for _ in range(cast(Criterion, self.rule).num_signals)]
        for older, newer in zip(self._signals, self._signals[1:], strict=False):
            older[rows_b] = newer[rows_b]
        self._signals[-1][rows_b] = signal_bX
        self._seen_B[rows_b] += 1
        return [*(signal[rows_b] for signal in self._signals[:-1]), signal_bX]

    def _judge_change(
        self, rule: Criterion, span: Span, carry: Carry, done_b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows_b, logits_bV = span.rows_b, None
        if rule.reads == "logits":
            # Before that no value can count for a stop after the fewest rungs.
            if int(done_b.max()) < self.min_rungs - (rule.num_signals - 1) - (rule.patience - 1):
                return torch.zeros_like(done_b, dtype=torch.bool), None
            logits_bV = self.runner.leave(span, carry)[:, 0]
            self.readouts += len(rows_b)
        signals = self._observe(rows_b, carry.state_btD[:, 0] if logits_bV is None else logits_bV)
        if isinstance(rule, ConfidenceHalting):
            holds_b = rule.value(*signals) >= rule.threshold_at(self._progress_B[rows_b])
        else:
            holds_b = rule.halts(*signals)
        holds_b = holds_b & (self._seen_B[rows_b] >= rule.num_signals)
        self._streak_B[rows_b] = torch.where(holds_b, self._streak_B[rows_b] + 1, 0)
        return self._streak_B[rows_b] >= rule.patience, logits_bV

    def _judge_hazard(
        self, rule: HazardHalting | PonderHalting, rows_b: torch.Tensor, lambda_b: torch.Tensor
    ) -> torch.Tensor:
        lambda_b = lambda_b.float()
        before = HaltState(
            halted_BT=torch.zeros_like(rows_b, dtype=torch.bool)[:, None],
            n_updates_BT=torch.zeros_like(rows_b)[:, None],
            survival_BT=self._survival_B[rows_b, None],
        )
        if isinstance(rule, HazardHalting):
            after = rule.step(before, lambda_b[:, None])
            self._survival_B[rows_b] = after.survival_BT[:, 0]
            return after.halted_BT[:, 0]
        draws = [float(torch.rand((), generator=self._generators[row])) for row in rows_b.tolist()]
        return torch.tensor(draws, device=lambda_b.device) < lambda_b

    def _act_memory(self, name: str, like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        if name not in self._act:
            self._act[name] = like.new_zeros(self.runner.num_rows, *shape)
        return self._act[name]

    def _mix(
        self, rule: ActHalting, rows_b: torch.Tensor, state_bD: torch.Tensor, last_b: torch.Tensor
    ) -> torch.Tensor:
        output_BD = self._act_memory("output", state_bD, state_bD.shape[1:])
        mass_B = self._act_memory("mass", state_bD, ())
        halted_B = self._act_memory("halted", rows_b.bool(), ())
        for is_last in (False, True):
            index = (last_b == is_last).nonzero()[:, 0]
            if not len(index):
                continue
            rows = rows_b[index]
            zeros_n1 = torch.zeros_like(mass_B[rows, None])
            before = ActState(
                output_BTD=output_BD[rows, None],
                mass_BT=mass_B[rows, None],
                remainder_BT=zeros_n1,
                n_updates_BT=torch.zeros_like(rows[:, None]),
                halted_BT=halted_B[rows, None],
                weight_BT=zeros_n1,
            )
            after = rule.step(before, self._act["p"][rows, None], state_bD[index, None], last=is_last)
            output_BD[rows], mass_B[rows] = after.output_BTD[:, 0], after.mass_BT[:, 0]
            halted_B[rows] = after.halted_BT[:, 0]
        return halted_B[rows_b]


def refuse_rule(rule: Component, runner: Runner) -> None:
    """Raise ValueError for a rule that cannot judge the model of a runner."""
    name = halting_text(rule)
    if not isinstance(rule, (*_OF_GATES, Criterion, FixedDepth, FixedHalting)):
        raise ValueError(f"halting rule {name} judges no single tokens: use {', '.join(RULES)}")
    if isinstance(rule, _OF_GATES) and (runner.module is None or runner.module.gate is None):
        free = [other for other, kind in RULES.items() if not issubclass(kind, _OF_GATES)]
        raise ValueError(
            f"halting rule {name} is driven by an exit gate, which the main loop of this model lacks: use "
            f"{', '.join(free)}"
        )
    if isinstance(rule, FixedDepth) and rule.rungs > runner.ladder.num_rungs:
        raise ValueError(f"halting rule {name}: this model has {runner.ladder.num_rungs} rungs")


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip("'\"")
