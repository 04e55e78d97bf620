"""The wavefront decoder: later tokens are refined while earlier ones still are (diffusion forcing, 2510.14961).

A token's successor is read off a half-finished state and starts at once, so that the positions in work form a diagonal
wave through position and depth. One outer pass embeds the wave, runs r' iterations of the core on all of it, predicts
every next token anew, freezes positions that have settled and lets new ones in. Every position and every iteration
counts by its *absolute* position: state, injected tensor, iterations run, earlier states.

Freezing a position fixes its state, its keys and values, and the token that it predicts. A position whose input token
was revised in the same pass is not frozen with its neighbour: its keys would be those of another token.

What is exact: with freeze "fixed" and cache own or first the tokens are those of sequential decoding when `restart` is
true, whatever the width, headway and r', for the last run of every position then has its final input and sees, at every
iteration, keys of that iteration from the last runs of earlier positions; with width 1 under every cache policy and in
any case, for no token is guessed. Sampled tokens are the same too: token k of a row uses draw k of its generator,
however often it is predicted. State noise and continued states give all of that up.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from loopwise.decode.freezing import WaveConfig
from loopwise.decode.published import PublishedWave
from loopwise.decode.result import Decoded, OnToken, Output, prompt_span
from loopwise.decode.runner import Carry, Runner
from loopwise.decode.sampling import GREEDY, Samplers, Sampling
from loopwise.decode.wave import Wave
from loopwise.loop.state import NormalState


@torch.no_grad()
def decode_wavefront(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    wave: WaveConfig | None = None,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    stop_ids: Sequence[int] = (),
    on_token: OnToken | None = None,
    reference: Sequence[Sequence[int]] | None = None,
    **options: Any,
) -> Decoded:
    """Decode a batch of prompts with a wave of positions per row; rows go at their own pace.

    Prompts run at full depth first. A stop token counts when it is final; nothing after it comes out.

    Models without injection are allowed, although the paper asks for it: `notes["injects"]` is then 0 and a revised
    token starts its position over, see `WaveConfig.restart`.

    Args:
        model: see `Runner`; its rungs must share their weights, so that positions at different iterations run in one
            call.
        prompts: token ids of every row.
        max_new_tokens: limit of each row.
        wave: how the wave goes; defaults if None.
        sampling: for all rows, or one per row.
        stop_ids: tokens that end a row; they are part of what comes back.
        on_token: called with (row, token) as soon as a token is final.
        reference: tokens of every row that the notes count as right, such as those of sequential decoding.
        **options: of `Runner`, such as cache or loops, which is also the most iterations of a position. Cache own has a
            store for every iteration; own/last one for all of them, as published (the default of compat "reference").

    Returns:
        Besides what every decoder gives, in `notes`: `outer_passes`; `prefill_passes`; `iterations`, summed over
        positions; `restarts`, of positions; `injects`; and what `Drafts.notes` counts.

    Raises:
        ValueError: bad input, or a model, cache policy or noise that the wave cannot have.
    """
    config = wave or WaveConfig()
    is_published = config.compat == "reference"
    if is_published:
        options.setdefault("cache", "own/last")
    out = Output(len(prompts), max_new_tokens, () if is_published else stop_ids, on_token)
    capacity = max(map(len, prompts), default=0) + max_new_tokens
    if is_published:  # its wave goes on beyond the last token that is wanted
        capacity += config.width + config.headway
    runner = Runner(model, num_rows=len(prompts), capacity=capacity, **options)
    refuse_unfit_wave(runner, config)
    samplers = Samplers(sampling, len(prompts))
    span = prompt_span(prompts, runner.device)
    carry, logits_BV = runner.prefill(span)
    before = runner.passes, runner.visits
    if is_published:
        moving: Wave = PublishedWave(runner, config, samplers, out, prompts, injects(runner, carry), stop_ids)
    else:
        moving = Wave(runner, config, samplers, out, prompts, injects(runner, carry))
    out.begin()
    moving.begin(logits_BV)
    while out.running:
        moving.run()
    notes = moving.notes | moving.drafts.notes(out.tokens, reference) | {"prefill_passes": before[0]}
    return out.decoded(
        passes=runner.passes - before[0],
        visits=runner.visits - before[1],
        cache_bytes=runner.cache.bytes_per_token,
        **notes,
    )


def refuse_unfit_wave(runner: Runner, config: WaveConfig) -> None:
    """Raise ValueError for what the wave cannot have, with the reason."""
    if not runner.mixes:
        raise ValueError(
            "the wavefront runs positions at different iterations in one call: it needs a loop whose iterations share "
            "weights and arguments"
        )
    policy = runner.policy
    if policy.skipped in ("monotone", "catch_up"):
        raise ValueError(f"cache policy {policy.skipped} has no wavefront: use own, latest, propagate or own/last")
    if config.state_noise and not _has_random_state(runner):
        raise ValueError(
            f"state_noise={config.state_noise} mixes in fresh random states, the first state of this loop is not "
            "random: use state_noise=0"
        )


def injects(runner: Runner, carry: Carry) -> bool:
    """True when the loop's update, before or after its layers, depends on what re-enters."""
    module, injected = runner.module, carry.injected_btD
    if module is None or injected is None:
        return False
    state, other = carry.state_btD[:1, :1], injected[:1, :1] + 1
    where = {"iteration": 0, "num_iterations": runner.ladder.num_rungs}
    first, second = (module.update(state, e, **where) for e in (injected[:1, :1], other))
    left, right = (module.update.leave(state, state, e, **where) for e in (injected[:1, :1], other))
    return not (torch.equal(first, second) and torch.equal(left, right))


def _has_random_state(runner: Runner) -> bool:
    state = runner.module.state if runner.module is not None else None
    return isinstance(state, NormalState) and state.scale > 0
