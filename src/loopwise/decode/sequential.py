"""Token by token at full depth: what every other decoder is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from loopwise.decode.result import Decoded, OnToken, Output, next_span, prompt_span
from loopwise.decode.runner import Runner
from loopwise.decode.sampling import GREEDY, Samplers, Sampling


@torch.no_grad()
def decode_sequential(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    stop_ids: Sequence[int] = (),
    on_token: OnToken | None = None,
    **options: Any,
) -> Decoded:
    """Decode a batch of prompts, every token through all rungs.

    Args:
        model: see `Runner`.
        prompts: token ids of every row.
        max_new_tokens: limit of each row.
        sampling: for all rows, or one per row.
        stop_ids: tokens that end a row; they are part of what comes back.
        on_token: called with (row, token) as soon as a token is final.
        **options: of `Runner`, such as cache or loops.

    Raises:
        ValueError: bad input, or a model that cannot be taken apart.
    """
    out = Output(len(prompts), max_new_tokens, stop_ids, on_token)
    capacity = max(map(len, prompts), default=0) + max_new_tokens
    runner = Runner(model, num_rows=len(prompts), capacity=capacity, **options)
    samplers = Samplers(sampling, len(prompts))
    depth = runner.ladder.num_rungs
    _, logits_BV = runner.prefill(prompt_span(prompts, runner.device))
    before = runner.passes, runner.visits
    out.begin()
    lengths, rows = [len(prompt) for prompt in prompts], out.running
    while True:
        picked = samplers.pick(logits_BV, rows).tolist()
        for row, token in zip(rows, picked, strict=True):
            out.add(row, token, depth)
        rows = out.running
        if not rows:
            break
        last = [out.tokens[row][-1] for row in rows]
        span = next_span(rows, last, [lengths[row] + len(out.tokens[row]) - 1 for row in rows], runner.device)
        carry = runner.enter(span)
        for rung in range(depth):
            carry = runner.climb(span, carry, rung)
        logits_BV = runner.leave(span, carry)[:, 0]
    return out.decoded(
        passes=runner.passes - before[0], visits=runner.visits - before[1], cache_bytes=runner.cache.bytes_per_token
    )
