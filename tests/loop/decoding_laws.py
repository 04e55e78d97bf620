"""Laws of pairs in which one is a decoder: early exit, wavefront, self-speculation, batching over depth.

Each law takes a model and prompts: full depth is what the model's own `generate` gives, and whatever a decoder does on
the way, rows do not depend on their mates (law 8).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from loopwise.decode.adaptive import decode_adaptive
from loopwise.decode.calibrate import sweep
from loopwise.decode.engine import Engine
from loopwise.decode.freezing import WaveConfig
from loopwise.decode.request import Request
from loopwise.decode.sampling import GREEDY, Sampling
from loopwise.decode.sequential import decode_sequential
from loopwise.decode.speculative import decode_speculative
from loopwise.decode.trace import record
from loopwise.decode.wavefront import decode_wavefront
from loopwise.models.attach import plan_of

NUM_NEW = 8
SETTLED = WaveConfig(freeze="fixed", inner=1, width=4, restart=True)
Build = Callable[[], Any]


def at_full_depth(model: Any, ids_BT: torch.Tensor) -> list[list[int]]:
    found = model.generate(
        input_ids=ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        max_new_tokens=NUM_NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return found[:, ids_BT.shape[1] :].tolist()


def half_way(model: Any, rows: list[list[int]], rule: str) -> Any:
    """The rule at a threshold at which about half of the depth is saved."""
    trace = record(model, rows, [rule])
    curve = sweep(trace, rule)
    return curve.rules[int(np.abs(curve.depth_G - (1 + trace.num_rungs) / 2).argmin())]


def exits_early(build: Build, ids_BT: torch.Tensor, rule: str = "latent", never: str = "latent(0)") -> None:
    model, rows = build(), ids_BT.tolist()
    want = at_full_depth(model, ids_BT)

    def decoded(rule: Any, rows: list[list[int]] = rows, **options: Any) -> Any:
        return decode_adaptive(model, rows, halting=rule, max_new_tokens=NUM_NEW, cache="catch_up", **options)

    assert decoded(never).tokens == want
    chosen = half_way(model, rows, rule)
    found = decoded(chosen)
    assert found.mean_depth < decoded(never).mean_depth
    alone = [decoded(chosen, [row]) for row in rows]
    assert found.tokens == [one.tokens[0] for one in alone] and found.depths == [one.depths[0] for one in alone]
    hot = Sampling(temperature=0.8, top_k=20)
    sampled = decoded(never, sampling=[hot] * len(rows)).tokens
    assert sampled == decode_sequential(model, rows, max_new_tokens=NUM_NEW, sampling=[hot] * len(rows)).tokens


def waves(build: Build, ids_BT: torch.Tensor) -> None:
    model, rows = build(), ids_BT.tolist()
    want = at_full_depth(model, ids_BT)
    assert decode_wavefront(model, rows, max_new_tokens=NUM_NEW, wave=SETTLED).tokens == want
    loose = WaveConfig(inner=1, threshold=0.5)
    together = decode_wavefront(model, rows, max_new_tokens=NUM_NEW, wave=loose).tokens
    assert together == [decode_wavefront(model, [row], max_new_tokens=NUM_NEW, wave=loose).tokens[0] for row in rows]


def speculates(build: Build, ids_BT: torch.Tensor) -> None:
    model, rows = build(), ids_BT.tolist()
    found = decode_speculative(model, rows, draft_rungs=1, max_new_tokens=NUM_NEW)
    assert found.tokens == at_full_depth(model, ids_BT) and found.notes["drafted"] > 0


def batches(build: Build, ids_BT: torch.Tensor, sampling: Sampling = GREEDY) -> None:
    """Requests at other depths, in less slots than there are requests, get what they get alone."""
    model, rows = build(), ids_BT.tolist()
    plan = plan_of(model)
    assert plan is not None
    counts = [1, None] if len(plan.loops) == 1 else [None]
    asked = [
        Request(prompt=row, max_new_tokens=NUM_NEW, loops=loops, sampling=sampling) for row in rows for loops in counts
    ]
    together, alone = answers(model, asked), [answers(model, [one])[0] for one in asked]
    assert together == alone
    if sampling.is_greedy:
        assert together[len(counts) - 1 :: len(counts)] == at_full_depth(model, ids_BT)


def answers(model: Any, asked: list[Request]) -> list[list[int]]:
    engine = Engine(model, max_requests=3, capacity=64)
    ids = [engine.submit(one) for one in asked]
    tokens: dict[int, list[int]] = {number: [] for number in ids}
    while engine.has_work:
        for event in engine.step():
            if event.token is not None:
                tokens[event.request_id].append(event.token)
    return [tokens[number] for number in ids]


def sampled(build: Build, ids_BT: torch.Tensor, decode: Callable[..., Any], **options: Any) -> None:
    """Rows draw from generators of their own; from one possible token everything is greedy."""
    model, rows = build(), ids_BT.tolist()
    certain = [Sampling(temperature=0.8, top_k=1, seed=seed) for seed in range(len(rows))]
    assert decode(model, rows, max_new_tokens=NUM_NEW, sampling=certain, **options).tokens == at_full_depth(
        model, ids_BT
    )
    hot = [Sampling(temperature=1.5, seed=seed) for seed in range(len(rows))]
    together = decode(model, rows, max_new_tokens=NUM_NEW, sampling=hot, **options).tokens
    alone = [
        decode(model, [row], max_new_tokens=NUM_NEW, sampling=[one], **options).tokens[0]
        for row, one in zip(rows, hot, strict=True)
    ]
    assert together == alone


def wave_and_sampler(build: Build, ids_BT: torch.Tensor) -> None:
    """A settled wave draws the very tokens of sequential decoding."""
    sampled(build, ids_BT, decode_wavefront, wave=SETTLED)
    model, rows, hot = build(), ids_BT.tolist(), Sampling(temperature=1.5)
    want = decode_sequential(model, rows, max_new_tokens=NUM_NEW, sampling=hot).tokens
    assert decode_wavefront(model, rows, max_new_tokens=NUM_NEW, sampling=hot, wave=SETTLED).tokens == want


def shards_decode(rank: int, build: Build, decoder: str) -> bool:
    """A rank decodes prompts of its own at depths of its own: once gathered, none waits for another."""
    from loopwise.train.parallel import shard

    generator = torch.Generator().manual_seed(rank)
    rows = torch.randint(1, 60, (1 + rank, 5), generator=generator).tolist()
    more: dict[str, Any] = {"max_new_tokens": 3 + 3 * rank}
    if decoder == "early exit":
        decode: Callable[..., Any] = decode_adaptive
        more |= {"halting": f"fixed({1 + rank})", "cache": "catch_up"}
    elif decoder == "wavefront":
        decode, more = decode_wavefront, more | {"wave": SETTLED}
    elif decoder == "self-speculation":
        decode, more = decode_speculative, more | {"draft_rungs": 1}
    else:
        asked = [Request(prompt=row, **more) for row in rows]
        return answers(shard(build()), asked) == answers(build(), asked)
    return decode(shard(build()), rows, **more).tokens == decode(build(), rows, **more).tokens
