"""Jacobi decoding: guess a block of tokens and iterate to the fixed point at full depth (2305.10427).

Every pass computes all tokens of the block at once and puts its greedy prediction in the place of each guess. What
follows a right prefix is right, so at least one token per pass is final, and those that were guessed right come free.
The wavefront iterates on latents at partial depth; this iterates on tokens at full depth, and is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from loopwise.decode.cache import Span
from loopwise.decode.drafts import Drafts
from loopwise.decode.result import Decoded, OnToken, Output, prompt_span
from loopwise.decode.runner import Runner
from loopwise.decode.sampling import GREEDY, Samplers, Sampling


@torch.no_grad()
def decode_jacobi(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    block: int = 8,
    guess: int | None = None,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    stop_ids: Sequence[int] = (),
    on_token: OnToken | None = None,
    reference: Sequence[Sequence[int]] | None = None,
    **options: Any,
) -> Decoded:
    """Decode a batch of prompts block by block; rows go at their own pace. The tokens are those of sequential decoding.

    Tokens of a block that are final are not computed again; the next block begins when all of them are.

    Args:
        model: see `Runner`; it needs no loop.
        prompts: token ids of every row.
        max_new_tokens: limit of each row.
        block: tokens that are computed together.
        guess: first guess at every token of a block; None repeats the row's last token.
        sampling: greedy; others have no fixed point.
        stop_ids: tokens that end a row; they are part of what comes back.
        on_token: called with (row, token) as soon as a token is final.
        reference: tokens of every row that the notes count as right; the final ones, which are the same, if None.
        **options: of `Runner`, such as cache or loops.

    Returns:
        Besides what every decoder gives, in `notes`: `outer_passes`; `prefill_passes`; and what `Drafts.notes` counts,
        first guesses included.

    Raises:
        ValueError: bad input, sampling that is not greedy, or a cache policy whose tokens see later iterations of
            earlier tokens.
    """
    if block < 1:
        raise ValueError(f"block {block}: at least 1 token")
    samplers = Samplers(sampling, len(prompts))
    if not all(settings.is_greedy for settings in samplers.rows):
        raise ValueError("Jacobi decoding iterates to a fixed point, which sampling has not: use temperature 0")
    out = Output(len(prompts), max_new_tokens, stop_ids, on_token)
    capacity = max(map(len, prompts), default=0) + max_new_tokens
    runner = Runner(model, num_rows=len(prompts), capacity=capacity, **options)
    if runner.policy.decode.is_sequential:
        raise ValueError(
            f"cache policy {runner.policy}: its tokens see later iterations of earlier ones, a block computed together "
            "does not: use own or first"
        )
    _, logits_BV = runner.prefill(prompt_span(prompts, runner.device))
    before, drafts, num_passes = (runner.passes, runner.visits), Drafts(len(prompts)), 0
    out.begin()
    blocks = [_Block(len(prompt), block, guess) for prompt in prompts]
    for row, token in enumerate(logits_BV.argmax(-1).tolist()):
        if out.add(row, token, runner.ladder.num_rungs):
            blocks[row].begin(token, max_new_tokens - 1)
    while out.running:
        rows = out.running
        for row in rows:
            for index, token in enumerate(blocks[row].tokens[1:]):
                drafts.guess(row, len(out.tokens[row]) + index, token)
        predicted = _full_depth(runner, rows, [blocks[row] for row in rows])
        num_passes += 1
        for row, tokens in zip(rows, predicted, strict=True):
            _take(out, row, blocks[row], tokens, runner.ladder.num_rungs)
    notes = drafts.notes(out.tokens, reference)
    return out.decoded(
        passes=runner.passes - before[0],
        visits=runner.visits - before[1],
        cache_bytes=runner.cache.bytes_per_token,
        outer_passes=num_passes,
        prefill_passes=before[0],
        **notes,
    )


class _Block:
    """The tokens of one row that are computed together: the first is final, the others are guesses.

    Args:
        start: position of the first.
        size: of a whole block.
        guess: first guess, or None.
    """

    def __init__(self, start: int, size: int, guess: int | None):
        self.start, self.size, self.guess = start, size, guess
        self.tokens: list[int] = []

    def begin(self, token: int, left: int) -> None:
        """A new block after a final token, of which at most `left` predictions are wanted."""
        guess = token if self.guess is None else self.guess
        self.tokens = [token] + [guess] * (min(self.size, left) - 1)


def _full_depth(runner: Runner, rows: Sequence[int], blocks: Sequence[_Block]) -> list[list[int]]:
    """What each token of the blocks predicts."""
    width = max(len(block.tokens) for block in blocks)
    holes = [width - len(block.tokens) for block in blocks]
    tokens = [[*block.tokens, *[0] * hole] for block, hole in zip(blocks, holes, strict=True)]
    positions = [
        [*range(block.start, block.start + len(block.tokens)), *[-1] * hole]
        for block, hole in zip(blocks, holes, strict=True)
    ]
    span = Span(
        rows_b=torch.tensor(list(rows), device=runner.device),
        tokens_bt=torch.tensor(tokens, device=runner.device),
        positions_bt=torch.tensor(positions, device=runner.device),
    )
    carry = runner.enter(span)
    for rung in range(runner.ladder.num_rungs):
        carry = runner.climb(span, carry, rung)
    best = runner.leave(span, carry).argmax(-1).tolist()
    return [row[: len(block.tokens)] for row, block in zip(best, blocks, strict=True)]


def _take(out: Output, row: int, block: _Block, predicted: Sequence[int], depth: int) -> None:
    """Let out what is final now; the rest of the predictions are the next guesses."""
    wrong = (i for i in range(1, len(predicted)) if predicted[i - 1] != block.tokens[i])
    num_final = next(wrong, len(predicted))
    for token in predicted[:num_final]:
        if not out.add(row, token, depth):
            return
    block.start += num_final
    if num_final == len(predicted):
        block.begin(predicted[-1], out.max_new_tokens - len(out.tokens[row]))
    else:
        block.tokens = list(predicted[num_final - 1 : -1])
