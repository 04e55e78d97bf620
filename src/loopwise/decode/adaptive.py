"""Token by token, each as deep as a rule lets it go.

The prompt runs through all rungs. Every new token climbs until its rule stops it; rows that have stopped are not
computed any more, rows that go on run together. What a token leaves behind at the depth that it skipped is the cache
policy's choice, see `rules` and `skipped`.

Shapes: B rows, b rows of a call (one token each), n new tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from loopwise.decode.cache import Span
from loopwise.decode.halting import Halter
from loopwise.decode.result import Decoded, OnToken, Output, next_span, prompt_span
from loopwise.decode.rules import StorePolicy
from loopwise.decode.runner import Runner
from loopwise.decode.sampling import GREEDY, Samplers, Sampling
from loopwise.decode.skipped import SkippedDepth
from loopwise.loop.config import Component

PER = ("token", "row")


class Climber:
    """Takes one token of each of some rows through the model, as deep as a rule says.

    Args:
        runner: runs the model.
        halter: the rule.
        max_rungs: no token goes deeper; all rungs if None.
        per: "token", or "row": a row keeps the depth of the first token that it is given here.

    Raises:
        ValueError: an unknown `per`, or `max_rungs` out of range.
    """

    def __init__(self, runner: Runner, halter: Halter, *, max_rungs: int | None = None, per: str = "token"):
        rungs = runner.ladder.num_rungs
        if per not in PER:
            raise ValueError(f"per={per!r}: use {' or '.join(PER)}")
        if max_rungs is not None and not halter.min_rungs <= max_rungs <= rungs:
            raise ValueError(f"max_rungs {max_rungs}: from min_rungs, {halter.min_rungs}, to {rungs}")
        self.runner, self.halter, self.skipped = runner, halter, SkippedDepth(runner)
        self.max_rungs, self.per = rungs if max_rungs is None else max_rungs, per
        self._kept: dict[int, int] = {}

    def run(
        self, span: Span, progress: Sequence[float] = (), depths: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, list[int]]:
        """Run new tokens.

        Args:
            span: one token of each row, no row twice.
            progress: how far each row's text is, see `Halter.start`; empty for none.
            depths: how many rungs each runs, in the place of what the rule says.

        Returns:
            Logits `[b, V]`, and how many rungs each token has run.
        """
        runner, halter, rows = self.runner, self.halter, span.rows_b.tolist()
        given = [self._kept.get(row) for row in rows] if depths is None else list(depths)
        is_given = torch.tensor([depth is not None for depth in given], device=runner.device)
        limits = [self.skipped.limit(row) for row in rows]
        if any(depth is not None and depth > limit for depth, limit in zip(given, limits, strict=True)):
            raise ValueError(f"depths {given}: with cache policy monotone no token goes deeper than {limits} here")
        ends = [min(self.max_rungs, limit) for limit in limits]
        ends_b = torch.tensor([end if depth is None else depth for end, depth in zip(ends, given, strict=True)])
        ends_b = ends_b.to(runner.device)
        carry = runner.enter(span)
        halter.start(span.rows_b, carry, list(progress) or 0.0)
        going, part, state = torch.arange(len(rows), device=runner.device), span, carry
        depth_b = torch.zeros_like(ends_b)
        logits: dict[int, torch.Tensor] = {}
        rung = 0
        while len(going):
            halter.enter(part, state, rung)
            state = self.skipped.climb(part, state, rung)
            rung += 1
            last = stops = ends_b[going] == rung
            read = None
            if halter.mixes_states or not bool((last | is_given[going]).all()):
                verdict = halter.judge(part, state, rung - 1, last)
                stops, read = torch.where(is_given[going], last, verdict.stops_b), verdict.logits_bV
            index = stops.nonzero()[:, 0]
            if len(index):
                depth_b[going[index]] = rung
                carry = carry.put(going[index], state.take(index))
                if read is not None:
                    logits |= dict(zip(going[index].tolist(), read[index], strict=True))
                index = (~stops).nonzero()[:, 0]
                going, part, state = going[index], part.take(index), state.take(index)
        unread = torch.tensor([b for b in range(len(rows)) if b not in logits], dtype=torch.int64, device=runner.device)
        if len(unread):
            leaving = span.take(unread)
            read = runner.leave(leaving, halter.output(leaving, carry.take(unread)))[:, 0]
            logits |= dict(zip(unread.tolist(), read, strict=True))
        self.skipped.left(span, carry, depth_b)
        found = depth_b.tolist()
        if self.per == "row":
            self._kept |= dict(zip(rows, found, strict=True))
        return torch.stack([logits[b] for b in range(len(rows))]), found


@torch.no_grad()
def decode_adaptive(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    halting: Component | str,
    max_new_tokens: int,
    min_rungs: int = 1,
    max_rungs: int | None = None,
    per: Literal["token", "row"] = "token",
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    stop_ids: Sequence[int] = (),
    on_token: OnToken | None = None,
    **options: Any,
) -> Decoded:
    """Decode a batch of prompts, every new token to the depth at which a rule stops it.

    The first new token comes from the prompt, which has full depth. Rows do not depend on each other.

    Args:
        model: see `Runner`.
        prompts: token ids of every row.
        halting: a rule, see `halting.parse_halting`, or its text.
        max_new_tokens: limit of each row.
        min_rungs: no token stops before.
        max_rungs: no new token goes deeper; all rungs if None.
        per: "token", or "row": a row keeps the depth of the first new token that enters the model.
        sampling: for all rows, or one per row.
        stop_ids: tokens that end a row; they are part of what comes back.
        on_token: called with (row, token) as soon as a token is final.
        **options: of `Runner`, such as cache (what skipped depth leaves behind), loops, or the exits of a plain model.

    Returns:
        What was made; its notes have `readouts`, how many predictions were read only to judge them.

    Raises:
        ValueError: bad input, a model that cannot be taken apart, or a rule that needs a gate which the model lacks.
    """
    out = Output(len(prompts), max_new_tokens, stop_ids, on_token)
    samplers = Samplers(sampling, len(prompts))
    climber = _climber(model, prompts, halting, max_new_tokens, min_rungs, max_rungs, per, samplers, options)

    def take(rows: list[int], logits_bV: torch.Tensor, depths: list[int]) -> None:
        for row, token, depth in zip(rows, samplers.pick(logits_bV, rows).tolist(), depths, strict=True):
            out.add(row, token, depth)

    counted = _generate(climber, prompts, out, take)
    return out.decoded(**counted, cache_bytes=climber.runner.cache.bytes_per_token, readouts=climber.halter.readouts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Followed:
    """Given texts, run token by token as `decode_adaptive` would.

    Attributes:
        logits: per row, the predictions of its given new tokens, floating `[n, V]`.
        depths: per row and new token, how many rungs the position that predicts it ran.
        passes: see `Decoded`.
        visits: see `Decoded`.
    """

    logits: list[torch.Tensor]
    depths: list[list[int]]
    passes: int
    visits: int


@torch.no_grad()
def follow_adaptive(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    *,
    halting: Component | str,
    depths: Sequence[Sequence[int]] | None = None,
    min_rungs: int = 1,
    max_rungs: int | None = None,
    per: Literal["token", "row"] = "token",
    **options: Any,
) -> Followed:
    """What `decode_adaptive` predicts where the new tokens are given: to compare and to calibrate.

    Args:
        model: see `Runner`.
        prompts: token ids of every row, at full depth.
        texts: new tokens of every row, at least one each.
        halting: see `decode_adaptive`.
        depths: per row and new token (the first, which the prompt predicts, is not read), in the place of what the rule
            says.
        min_rungs: see `decode_adaptive`.
        max_rungs: see `decode_adaptive`.
        per: see `decode_adaptive`.
        **options: of `Runner`.

    Raises:
        ValueError: see `decode_adaptive`; or texts and prompts differ in number.
    """
    if len(texts) != len(prompts) or any(len(text) == 0 for text in texts):
        raise ValueError(f"{len(texts)} texts for {len(prompts)} prompts: one each, of at least one token")
    longest = max(map(len, texts))
    samplers = Samplers(GREEDY, len(prompts))
    climber = _climber(model, prompts, halting, longest, min_rungs, max_rungs, per, samplers, options)
    out = Output(len(prompts), longest)
    found: list[list[torch.Tensor]] = [[] for _ in prompts]

    def take(rows: list[int], logits_bV: torch.Tensor, depths: list[int]) -> None:
        for row, logits_V, depth in zip(rows, logits_bV, depths, strict=True):
            found[row].append(logits_V)
            place = len(out.tokens[row])
            out.add(row, texts[row][place], depth)
            if place + 1 == len(texts[row]):
                out.finish[row] = "length"

    counted = _generate(climber, prompts, out, take, depths)
    return Followed(logits=[torch.stack(row) for row in found], depths=out.depths, **counted)


def _climber(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    halting: Component | str,
    max_new_tokens: int,
    min_rungs: int,
    max_rungs: int | None,
    per: str,
    samplers: Samplers,
    options: dict[str, Any],
) -> Climber:
    capacity = max(map(len, prompts), default=0) + max_new_tokens
    runner = Runner(model, num_rows=len(prompts), capacity=capacity, **options)
    halter = Halter(runner, halting, min_rungs=min_rungs, seeds=[setting.seed for setting in samplers.rows])
    return Climber(runner, halter, max_rungs=max_rungs, per=per)


def _generate(
    climber: Climber,
    prompts: Sequence[Sequence[int]],
    out: Output,
    take: Callable[[list[int], torch.Tensor, list[int]], None],
    depths: Sequence[Sequence[int]] | None = None,
) -> dict[str, int]:
    """Prompt and new tokens; `take` adds the next token of rows to `out`, from their logits and depths."""
    runner = climber.runner
    _, logits_bV = runner.prefill(prompt_span(prompts, runner.device))
    before = runner.passes, runner.visits
    out.begin()
    rows, found = out.running, [runner.ladder.num_rungs] * len(prompts)
    while True:
        take(rows, logits_bV, found)
        rows = out.running
        if not rows:
            return {"passes": runner.passes - before[0], "visits": runner.visits - before[1]}
        done = [len(out.tokens[row]) for row in rows]
        where = [len(prompts[row]) + count - 1 for row, count in zip(rows, done, strict=True)]
        span = next_span(rows, [out.tokens[row][-1] for row in rows], where, runner.device)
        given = None if depths is None else [depths[row][count] for row, count in zip(rows, done, strict=True)]
        logits_bV, found = climber.run(span, [count / out.max_new_tokens for count in done], given)


@dataclass(frozen=True, kw_only=True)
class PolicyError:
    """How far a policy for skipped depth is from full keys and values, on the same tokens at the same depths.

    Attributes:
        policy: the policy.
        tokens: how many predictions were compared.
        mean_depth: mean number of rungs of the positions that made them, the prompts' not counted.
        max_abs: largest difference of a logit.
        mean_kl: mean of KL(exact || policy) in nats.
        same_top1: share of predictions with the same most likely token.
    """

    policy: str
    tokens: int
    mean_depth: float
    max_abs: float
    mean_kl: float
    same_top1: float

    def __str__(self) -> str:
        if StorePolicy.parse(self.policy).is_exact:
            return f"cache policy {self.policy} is exact at the depths that tokens have"
        what = "defines another model" if self.policy == "absent" else "is approximate"
        return (
            f"cache policy {self.policy} {what}: over {self.tokens} new tokens of mean depth {self.mean_depth:.3g} the "
            f"largest logit difference from catch_up is {self.max_abs:.3g}, mean KL {self.mean_kl:.3g} nats, same top "
            f"token {self.same_top1:.1%}"
        )


def policy_error(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    decoded: Decoded,
    *,
    cache: StorePolicy | str,
    halting: Component | str = "fixed",
    **options: Any,
) -> PolicyError:
    """Measure a policy for skipped depth on what was decoded: its predictions against those of `catch_up`.

    Both run the very tokens at the very depths that `decoded` has, so that nothing but the stores differs.

    Args:
        model: see `Runner`.
        prompts: as they were decoded.
        decoded: what `decode_adaptive` made of them.
        cache: the policy.
        halting: the rule; of consequence only for `act`, whose outputs are means.
        **options: of `Runner`, as they were.

    Raises:
        ValueError: see `decode_adaptive`.
    """
    policy = StorePolicy.parse(cache) if isinstance(cache, str) else cache
    texts, depths = decoded.tokens, decoded.depths
    got, exact = (
        torch.cat(follow_adaptive(model, prompts, texts, halting=halting, depths=depths, cache=kind, **options).logits)
        for kind in (policy, "catch_up")
    )
    got, exact = got.float(), exact.float()
    log_got, log_exact = got.log_softmax(-1), exact.log_softmax(-1)
    later = [depth for row in depths for depth in row[1:]]
    return PolicyError(
        policy=str(policy),
        tokens=len(got),
        mean_depth=sum(later) / len(later) if later else float("nan"),
        max_abs=(got - exact).abs().max().item(),
        mean_kl=(log_exact.exp() * (log_exact - log_got)).sum(-1).mean().item(),
        same_top1=(got.argmax(-1) == exact.argmax(-1)).float().mean().item(),
    )
