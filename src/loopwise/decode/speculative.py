"""Self-speculation: draft tokens with the first rungs, verify them at full depth in one parallel pass.

LayerSkip (2404.16710) does this between distinct layers; between iterations of a loop it is the same thing. Drafting
and verifying share their work: a drafted token stops after `draft_rungs` rungs, the verification takes its state from
there to full depth. That is exact because the first rungs of a token do not depend on how deep earlier tokens went,
wherever every rung has a store of its own; what the drafts left in the stores of the tail is written again.

One round, for a row whose last token is at position p and has not run yet:

1. Run p shallow, read a draft for p + 1, run that shallow, and so on to p + K, which needs no reading.
2. Run all K + 1 tokens through the other rungs, one parallel call per rung.
3. Keep the drafts up to the first that full depth would not have chosen, and one token of full depth after them.

So a round costs one sequential pass at full depth and gives 1 to K + 1 tokens. With sampling a draft x is kept with
probability min(1, p(x) / q(x)) and otherwise replaced by a draw from max(p - q, 0), which leaves the distribution p of
full depth as it is (2211.17192, 2302.01318); for greedy rows this says that the likeliest token must be the draft.

Shapes: b rows in a round, t tokens of the longest, D width, V vocabulary, R rungs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from loopwise.decode.cache import Span
from loopwise.decode.result import Decoded, OnToken, Output, next_span, prompt_span
from loopwise.decode.runner import Carry, Runner
from loopwise.decode.sampling import GREEDY, Samplers, Sampling


@torch.no_grad()
def decode_speculative(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    draft_rungs: int,
    lookahead: int = 4,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    stop_ids: Sequence[int] = (),
    on_token: OnToken | None = None,
    **options: Any,
) -> Decoded:
    """Decode a batch of prompts: greedy rows give what `decode_sequential` gives, sampled rows its distribution.

    Several tokens in one call round differently from one at a time, by a few 1e-7 in float32: as far as that goes.

    Args:
        model: see `Runner`. In a loop that is told the time, drafts run the first iterations of the full schedule.
        prompts: token ids of every row.
        max_new_tokens: limit of each row.
        draft_rungs: after how many rungs a draft is read, from 1 to R - 1.
        lookahead: K, how many tokens are drafted in a round; fewer before the limit of a row and after a drafted stop
            token.
        sampling: for all rows, or one per row; drafts are drawn with the same settings.
        stop_ids: tokens that end a row; they are part of what comes back.
        on_token: called with (row, token) as soon as a token is final.
        **options: of `Runner`, such as exits or loops. Cache policies in which rungs of a loop take turns in a store
            (last, ring, stride) are refused: there a token needs the last rungs of those before it. `first` is exact.

    Returns:
        Depths are R for every token. The notes count, over the whole batch: `full_passes`, sequential passes at full
        depth (one per verification, however many rows; plain decoding has one per token after the first) and
        `full_passes_per_token` of the longest row; `draft_passes`, sequential passes through the first rungs;
        `drafted` and `accepted` tokens, `acceptance_rate`; `verifications`, summed over rows.

    Raises:
        ValueError: bad input, a model that cannot be taken apart, or a cache policy that does not fit.
    """
    out = Output(len(prompts), max_new_tokens, stop_ids, on_token)
    capacity = max(map(len, prompts), default=0) + max_new_tokens
    runner = Runner(model, num_rows=len(prompts), capacity=capacity, **options)
    _refuse_unfit(runner, draft_rungs, lookahead)
    samplers = Samplers(sampling, len(prompts))
    depth, lengths = runner.ladder.num_rungs, [len(prompt) for prompt in prompts]
    _, logits_BV = runner.prefill(prompt_span(prompts, runner.device))
    before = runner.passes, runner.visits
    out.begin()
    for row, token in enumerate(samplers.pick(logits_BV).tolist()):
        out.add(row, token, depth)
    rounds = draft_passes = verifications = drafted = accepted = 0
    while rows := out.running:
        blocks = [
            Block(
                row=row,
                start=lengths[row] + len(out.tokens[row]) - 1,
                # Of the tokens that are left the last one comes from the verification.
                limit=min(lookahead, max_new_tokens - len(out.tokens[row]) - 1),
                tokens=[out.tokens[row][-1]],
            )
            for row in rows
        ]
        span, carry = _draft(runner, samplers, blocks, draft_rungs, out.stop_ids)
        for rung in range(draft_rungs, depth):
            carry = runner.climb(span, carry, rung)
        logits_btV = runner.leave(span, carry)
        rounds, draft_passes = rounds + 1, draft_passes + span.tokens_bt.shape[1]
        verifications += len(blocks)
        for block, logits_tV in zip(blocks, logits_btV, strict=True):
            tokens, kept = accept(samplers, block, logits_tV[: block.num_run])
            drafted, accepted = drafted + len(block.drafts), accepted + kept
            for token in tokens:
                out.add(block.row, token, depth)
    return out.decoded(
        passes=runner.passes - before[0],
        visits=runner.visits - before[1],
        cache_bytes=runner.cache.bytes_per_token,
        full_passes=rounds,
        full_passes_per_token=rounds / max(map(len, out.tokens)),
        draft_passes=draft_passes,
        verifications=verifications,
        drafted=drafted,
        accepted=accepted,
        acceptance_rate=accepted / max(1, drafted),
    )


@dataclass(kw_only=True, eq=False)
class Block:
    """What one row has in one round.

    Attributes:
        row: of the cache.
        start: position of the first token.
        limit: how many tokens may be drafted.
        tokens: the row's last final token, then the drafts.
        chances: for every draft the distribution from which it was drawn, float32 `[V]`; None for greedy rows.
        num_run: how many of the tokens ran: all but a drafted stop token, after which nothing is wanted.
    """

    row: int
    start: int
    limit: int
    tokens: list[int]
    chances: list[torch.Tensor | None] = field(default_factory=list)
    num_run: int = 0

    @property
    def drafts(self) -> list[int]:
        """The drafted tokens."""
        return self.tokens[1:]


def accept(samplers: Samplers, block: Block, logits_tV: torch.Tensor) -> tuple[list[int], int]:
    """The final tokens of a round.

    Args:
        samplers: of the batch; draws come from the row's own generator.
        block: of the row.
        logits_tV: at full depth, of the tokens that ran.

    Returns:
        The drafts that are kept and, unless the last of them is a stop token, one more; and how many were kept.
    """
    setting = samplers.rows[block.row]
    if setting.is_greedy:
        best = logits_tV.argmax(-1).tolist()
        kept = 0
        while kept < len(block.drafts) and block.drafts[kept] == best[kept]:
            kept += 1
        return block.drafts[:kept] + best[kept : kept + 1], kept
    for kept, (token, q_V) in enumerate(zip(block.drafts, block.chances, strict=True)):
        assert q_V is not None
        p_V = setting.probabilities(logits_tV[kept]).cpu()
        if samplers.uniform(block.row) * float(q_V[token]) < float(p_V[token]):
            continue
        rest_V = (p_V - q_V).clamp(min=0)
        # Rounding can leave nothing where both are the same.
        return [*block.drafts[:kept], samplers.draw(block.row, rest_V if rest_V.any() else p_V)], kept
    count = len(block.drafts)
    more = [samplers.draw(block.row, setting.probabilities(logits_tV[-1]))] if len(logits_tV) > count else []
    return block.drafts + more, count


def _draft(
    runner: Runner, samplers: Samplers, blocks: Sequence[Block], draft_rungs: int, stop_ids: frozenset[int]
) -> tuple[Span, Carry]:
    """Fill the blocks; returns all their tokens, and what these have after the first rungs."""
    parts: list[tuple[torch.Tensor, Carry]] = []
    going = list(range(len(blocks)))
    while going:
        place, device = len(parts), runner.device
        active = [blocks[b] for b in going]
        rows, tokens = [block.row for block in active], [block.tokens[place] for block in active]
        span = next_span(rows, tokens, [block.start + place for block in active], device)
        carry = runner.enter(span)
        for rung in range(draft_rungs):
            carry = runner.climb(span, carry, rung)
        parts.append((torch.tensor(going, device=device), carry))
        for block in active:
            block.num_run += 1
        more = [n for n, block in enumerate(active) if place < block.limit]
        if more:
            index = torch.tensor(more, device=device)
            logits_bV = runner.leave(span.take(index), carry.take(index))[:, 0]
            _choose(samplers, [active[n] for n in more], logits_bV)
        going = [going[n] for n in more if active[n].tokens[-1] not in stop_ids]
    return _joined(blocks, parts, runner.device)


def _choose(samplers: Samplers, blocks: Sequence[Block], logits_bV: torch.Tensor) -> None:
    best_b = logits_bV.argmax(-1).tolist()
    for block, best, logits_V in zip(blocks, best_b, logits_bV, strict=True):
        setting = samplers.rows[block.row]
        q_V = None if setting.is_greedy else setting.probabilities(logits_V).cpu()
        block.chances.append(q_V)
        block.tokens.append(best if q_V is None else samplers.draw(block.row, q_V))


def _joined(
    blocks: Sequence[Block], parts: Sequence[tuple[torch.Tensor, Carry]], device: torch.device
) -> tuple[Span, Carry]:
    """Tokens that ran one after the other as one span, and their carry; shorter rows end in places without a token."""
    size = len(parts)
    ran = [(block, range(block.num_run), size - block.num_run) for block in blocks]
    span = Span(
        rows_b=torch.tensor([block.row for block in blocks], device=device),
        tokens_bt=torch.tensor([block.tokens[: len(at)] + [0] * rest for block, at, rest in ran], device=device),
        positions_bt=torch.tensor(
            [[block.start + n for n in at] + [-1] * rest for block, at, rest in ran], device=device
        ),
    )

    def join(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        joined = tensors[0].new_zeros(len(blocks), size, tensors[0].shape[-1])
        for place, ((index, _), tensor) in enumerate(zip(parts, tensors, strict=True)):
            joined[index, place] = tensor[:, 0]
        return joined

    injected = [carry.injected_btD for _, carry in parts if carry.injected_btD is not None]
    return span, Carry(
        state_btD=join([carry.state_btD for _, carry in parts]), injected_btD=join(injected) if injected else None
    )


def _refuse_unfit(runner: Runner, draft_rungs: int, lookahead: int) -> None:
    rungs, policy = runner.ladder.num_rungs, runner.policy
    if rungs < 2:
        raise ValueError(f"self-speculation needs 2 rungs or more to draft with fewer, this model has {rungs}")
    for name, value in (("draft_rungs", draft_rungs), ("lookahead", lookahead)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} {value!r}: a whole number is needed")
    if not 1 <= draft_rungs < rungs:
        raise ValueError(f"draft_rungs {draft_rungs}: from 1 to {rungs - 1}, fewer than the {rungs} of full depth")
    if lookahead < 1:
        raise ValueError(f"lookahead {lookahead}: at least 1 token must be drafted")
    if runner.ladder.is_shared and policy.decode.is_sequential:
        raise ValueError(
            f"cache policy {policy}: a token needs the last rungs of those before it, so drafts cannot be verified "
            "together; use own or first, or decode sequentially"
        )
