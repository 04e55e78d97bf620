"""What an iteration costs in decoding: seconds per token over loop counts, and the line `a + b r` through them.

A small random model of Huginn's shape (2 layers before the loop, 4 in it, 2 after it) decodes greedily with a cache at
loop counts from 1 to 32. All counts are measured in every round, in a new order each time, so that a machine that slows
down favours none. The line goes through the medians over rounds; its interval comes from resampling whole rounds.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _timing import exact_entry, finish, parser, seconds

import loopwise
from loopwise.checkpoints.huginn import HUGINN

LOOPS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28, 32)
MIN_R2 = 0.99
MAX_DEVIATION = 0.10
CONFIG = {
    "model_type": "huginn_raven",
    "injection_type": "linear",
    "n_embd": 128,
    "n_heads": 4,
    "intermediate_size": 352,
    "n_layers_in_prelude": 2,
    "n_layers_in_recurrent_block": 4,
    "n_layers_in_coda": 2,
    "mean_recurrence": 32,
    "vocab_size": 512,
    "block_size": 256,
    "rope_base": 50000.0,
    "qk_bias": True,
}
ZERO_STATE = torch.zeros(1)

Rounds = list[dict[int, float]]


def huginn_shaped() -> Any:
    """Two layers, four that loop, two: norms on the stream, a state that meets the input by a linear map."""
    torch.manual_seed(0)
    return HUGINN.build(CONFIG, frozenset({"transformer.prelude.0.norm_3.weight"})).eval()


@torch.inference_mode()
def seconds_per_token(model: Any, loops: int, prompt: torch.Tensor, steps: int) -> float:
    """Time of a cached greedy step at one loop count, the mean of `steps` steps after a prompt."""
    call = {"loops": loops, "initial_state": ZERO_STATE, "use_cache": True}
    out = model(prompt, logits_to_keep=1, **call)

    def work() -> None:
        token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        for _ in range(steps):
            step = model(token, past_key_values=cache, **call)
            token, cache = step.logits[:, -1:].argmax(-1), step.past_key_values

    return seconds(work) / steps


def measure(work: Callable[[int], float], counts: Sequence[int], rounds: int) -> Rounds:
    """Every count once per round, in an order of its own each time; one round before is thrown away."""
    order = random.Random(0)
    for count in counts:
        work(count)
    measured = []
    for _ in range(rounds):
        drawn = order.sample(list(counts), len(counts))
        measured.append({count: work(count) for count in drawn})
    return measured


def fit(rounds: Rounds) -> dict[str, float]:
    """The least-squares line through the medians over rounds: a, b, R^2 and the largest relative deviation from it."""
    counts = sorted(rounds[0])
    times = [statistics.median(each[count] for each in rounds) for count in counts]
    line = statistics.linear_regression(counts, times)
    fitted = [line.intercept + line.slope * count for count in counts]
    mean = statistics.fmean(times)
    left = sum((time - value) ** 2 for time, value in zip(times, fitted, strict=True))
    return {
        "a": line.intercept,
        "b": line.slope,
        "r2": 1 - left / sum((time - mean) ** 2 for time in times),
        "deviation": max(abs(time / value - 1) for time, value in zip(times, fitted, strict=True)),
    }


def interval(values: Sequence[float]) -> list[float]:
    """The middle 95 % of resampled values."""
    ordered = sorted(values)
    return [ordered[int(0.025 * len(ordered))], ordered[int(0.975 * len(ordered))]]


def entry(name: str, value: float, ci95: list[float], target: float | None, holds: bool) -> dict[str, Any]:
    """A result; a target of None is a number that is reported and has none."""
    short = [float(f"{number:.5g}") for number in (value, *ci95)]
    return {"name": name, "value": short[0], "ci95": short[1:], "target": target, "holds": holds}


def line_entries(rounds: Rounds, resamples: int = 2000) -> list[dict[str, Any]]:
    """The fitted constants and how well they hold, with intervals from resampled rounds."""
    draw = random.Random(0)
    again = [fit(draw.choices(rounds, k=len(rounds))) for _ in range(resamples)]
    value, ci95 = fit(rounds), {name: interval([each[name] for each in again]) for name in again[0]}
    return [
        entry("decode: R^2 of seconds per token = a + b r", value["r2"], ci95["r2"], MIN_R2, ci95["r2"][0] >= MIN_R2),
        entry(
            "decode: largest relative deviation from the line",
            value["deviation"],
            ci95["deviation"],
            MAX_DEVIATION,
            ci95["deviation"][1] <= MAX_DEVIATION,
        ),
        entry("decode: a, seconds per token outside the loop", value["a"], ci95["a"], None, True),
        entry("decode: b, seconds per token and iteration", value["b"], ci95["b"], None, True),
    ]


def speed_entries(rounds: Rounds, resamples: int = 2000) -> list[dict[str, Any]]:
    """Tokens per second at every loop count."""
    draw, entries = random.Random(0), []
    for count in sorted(rounds[0]):
        speeds = [1 / each[count] for each in rounds]
        ci95 = interval([statistics.median(draw.choices(speeds, k=len(speeds))) for _ in range(resamples)])
        entries.append(entry(f"decode: tokens/s at r = {count}", statistics.median(speeds), ci95, None, True))
    return entries


@torch.inference_mode()
def cache_entries(model: Any, loops: int, steps: int) -> list[dict[str, Any]]:
    """How the cache looks after decoding: one contiguous tensor of keys and one of values for every slot."""
    prompt = torch.arange(8)[None]
    call = {"loops": loops, "initial_state": ZERO_STATE, "use_cache": True}
    cache = model(prompt, **call).past_key_values
    for _ in range(steps):
        cache = model(prompt[:, :1], past_key_values=cache, **call).past_key_values
    slots = loopwise.plan_of(model).with_loops(loops).num_slots
    return [
        exact_entry(f"decode: cache entries at r = {loops}", len(cache.layers), target=slots),
        exact_entry("decode: cache entries that are not contiguous", scattered(cache, 8 + steps), target=0),
    ]


def scattered(cache: Any, num_tokens: int) -> int:
    """Entries whose keys or values are not one contiguous tensor of all tokens in a storage of its own."""
    seen: set[int] = set()
    bad = 0
    for layer in cache.layers:
        tensors = (layer.keys, layer.values)
        places = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        whole = all(tensor.is_contiguous() and tensor.shape[-2] == num_tokens for tensor in tensors)
        bad += not whole or len(places) != 2 or not places.isdisjoint(seen)
        seen |= places
    return bad


def main() -> int:
    options = parser(__doc__.splitlines()[0], "decode")
    options.add_argument("--steps", type=int, default=4, help="tokens decoded per measurement")
    options.set_defaults(pairs=120)  # many short rounds: a busy moment then spoils few of them
    given = options.parse_args()
    torch.set_num_threads(1)  # one token's matrices are too small to share, and a second thread adds noise
    model = huginn_shaped()
    prompt = torch.randint(CONFIG["vocab_size"], (1, 8), generator=torch.Generator().manual_seed(0))
    print(f"plan {loopwise.plan_of(model)}, r = {', '.join(map(str, LOOPS))}: {given.pairs} rounds", flush=True)
    rounds = measure(lambda loops: seconds_per_token(model, loops, prompt, given.steps), LOOPS, given.pairs)
    entries = [*line_entries(rounds), *speed_entries(rounds), *cache_entries(model, max(LOOPS), given.steps)]
    steps = f" --steps {given.steps}" if given.steps != 4 else ""
    return finish(entries, given.out, f"python benchmarks/decode.py --pairs {given.pairs}{steps}")


if __name__ == "__main__":
    sys.exit(main())
