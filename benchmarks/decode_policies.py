"""What each decoder and each cache policy costs and gives: one recurrent-depth model, one run, one table.

The recipe `refine` trains a prelude and a core that re-reads its input at every iteration, at random depths, on walks
whose stops are written one after the other. Its test answers are then decoded by every decoder under every policy that
fits, at 16 iterations. Counted for each: right tokens, sequential passes of the core and visits of layers per token,
mean depth, bytes of keys and values per token; measured beside it: tokens per second.

Thresholds are chosen on validation rows: per rule the cheapest whose loss there is inside the margin with 95 %
confidence, and the cheapest of those bears the target. What is claimed is measured on test rows:

    wavefront    at least 3 times fewer sequential core passes, at most 1 point of token accuracy lost
    adaptive     at least 1.5 times fewer visits, at most 0.5 point lost
    speculative  the same tokens as sequential decoding, at least 1.3 times fewer sequential passes at full depth

Passes are those of a whole batch: its slowest row decides. Their intervals are bootstrap intervals over batches. Loss
is paired, token by token against sequential decoding, and its bound is one-sided at 95 %, over rows and not over tokens
(tokens of a row share its fate), with one more row counted that loses everything, so that no loss seen is not taken for
a bound of 0.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _timing import RESULTS, exact_entry, finish

import loopwise
from loopwise.cli.common import quiet_libraries
from loopwise.cli.main import main as command
from loopwise.cli.main import one_line
from loopwise.decode.adaptive import decode_adaptive
from loopwise.decode.freezing import WaveConfig
from loopwise.decode.jacobi import decode_jacobi
from loopwise.decode.result import Decoded
from loopwise.decode.sequential import decode_sequential
from loopwise.decode.speculative import decode_speculative
from loopwise.decode.wavefront import decode_wavefront
from loopwise.recipes.refine import LOOPS, TASK
from loopwise.tasks.base import IGNORE, rows
from loopwise.train.run import CONFIG

Decode = Callable[..., Decoded]
BATCH = 128
MIN_ITEMS = 5000
FEWER_PASSES, LOST_BY_WAVE = 3.0, 1.0
FEWER_VISITS, LOST_BY_EXIT = 1.5, 0.5
FEWER_FULL = 1.3
RESAMPLES = 5000
Z_ONE_SIDED = 1.6449
SEED = 1  # of the rows; those that evaluation uses while training have seed 0


@dataclass(frozen=True, kw_only=True)
class Way:
    """One line of the table.

    Attributes:
        decoder: name of the decoder with its rule.
        cache: policy.
        decode: the function.
        options: its keyword arguments besides the cache.
    """

    decoder: str
    cache: str
    decode: Decode
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """What came out of one way: arrays over batches and over rows.

    Attributes:
        way: how.
        tokens_RA: new tokens, int64 `[rows, answer]`.
        right_RA: which of them are right.
        done: the batches.
    """

    way: Way
    tokens_RA: np.ndarray
    right_RA: np.ndarray
    done: list[Decoded]

    def per_batch(self, count: Callable[[Decoded], float]) -> np.ndarray:
        """A count of every batch."""
        return np.array([count(one) for one in self.done])

    def line(self, against: Measured) -> dict[str, Any]:
        """The line of the table."""
        tokens = self.tokens_RA.size
        lost, bound = lost_points(against, self)
        found: dict[str, Any] = {
            "decoder": self.way.decoder,
            "cache": self.way.cache,
            "token_accuracy": round(float(self.right_RA.mean()), 5),
            "exact_accuracy": round(float(self.right_RA.all(axis=1).mean()), 5),
            "points_lost": round(lost, 3),
            "points_lost_bound95": round(bound, 3),
            "core_passes_per_token": round(float(self.per_batch(lambda one: one.passes_per_token).mean()), 3),
            "visits_per_token": round(float(self.per_batch(lambda one: one.visits).sum()) / tokens, 3),
            "mean_depth": round(float(self.per_batch(lambda one: one.mean_depth).mean()), 3),
            "cache_bytes_per_token": round(float(self.per_batch(lambda one: one.cache_bytes).mean()), 1),
            "tokens_per_second": round(tokens / float(self.per_batch(lambda one: one.seconds).sum()), 1),
        }
        kept = ("full_passes_per_token", "acceptance_rate")
        summed = ("tokens_revised", "wrong_to_right", "right_to_wrong", "readouts")
        notes = [one.notes for one in self.done]
        found |= {name: round(float(np.mean([note[name] for note in notes])), 4) for name in kept if name in notes[0]}
        return found | {name: sum(note[name] for note in notes) for name in summed if name in notes[0]}


def train(work: Path) -> Any:
    """The model of the recipe; what is trained already, or in part, is not trained again."""
    folder = work / "refine"
    if not (folder / "model").exists():
        words = [str(folder)] if (folder / CONFIG).exists() else ["refine", "--out", str(folder)]
        print("$ loopwise train", *words, flush=True)
        if command(["train", *words, "--device", "cpu"]):
            raise ValueError("loopwise train failed")
    return loopwise.load(folder / "model", dtype="float32").eval()


def problems(split: str, number: int) -> tuple[list[list[int]], np.ndarray]:
    """Prompts, and the right answers, int64 `[rows, answer]`."""
    drawn = rows(TASK, seed=SEED, index=0, size=number, split=split)
    scored_RT = drawn.targets_BT != IGNORE
    first = int(scored_RT[0].argmax()) + 1
    return drawn.tokens_BT[:, :first].tolist(), drawn.targets_BT[scored_RT].reshape(number, -1)


def measure(model: Any, ways: Sequence[Way], given: tuple[list[list[int]], np.ndarray]) -> list[Measured]:
    """Decode all prompts in every way, batch by batch, so that a machine that slows down slows all ways."""
    prompts, answers_RA = given
    done: list[list[Decoded]] = [[] for _ in ways]
    for first in range(0, len(prompts), BATCH):
        for way, of_way in zip(ways, done, strict=True):
            options = {"max_new_tokens": answers_RA.shape[1], "cache": way.cache, "loops": LOOPS} | way.options
            of_way.append(way.decode(model, prompts[first : first + BATCH], **options))
        print(f"  {min(first + BATCH, len(prompts))} of {len(prompts)} rows in {len(ways)} ways", flush=True)
    found = []
    for way, of_way in zip(ways, done, strict=True):
        tokens_RA = np.array([row for one in of_way for row in one.tokens])
        found.append(Measured(way=way, tokens_RA=tokens_RA, right_RA=tokens_RA == answers_RA, done=of_way))
    return found


def lost_points(reference: Measured, other: Measured, worst: int = 1) -> tuple[float, float]:
    """Points of token accuracy that the other loses, and the one-sided 95 % bound with so many rows all lost added."""
    lost_R = (reference.right_RA.mean(axis=1) - other.right_RA.mean(axis=1)) * 100
    more = np.append(lost_R, [100.0] * worst)
    return float(lost_R.mean()), float(more.mean() + Z_ONE_SIDED * more.std(ddof=1) / len(more) ** 0.5)


def ratio(top_N: np.ndarray, bottom_N: np.ndarray) -> tuple[float, list[float]]:
    """Ratio of sums, and its 95 % bootstrap interval over the pairs (percentiles, fixed seed)."""
    drawn_SN = np.random.default_rng(0).integers(len(top_N), size=(RESAMPLES, len(top_N)))
    found_S = top_N[drawn_SN].sum(axis=1) / bottom_N[drawn_SN].sum(axis=1)
    low, high = np.quantile(found_S, [0.025, 0.975])
    return float(top_N.sum() / bottom_N.sum()), [round(float(low), 4), round(float(high), 4)]


# What is tried.

RULES = {
    "latent": [f"latent({value:g})" for value in (0.5, 0.2, 0.1, 0.05, 0.02)],
    "kl": [f"kl({value:g})" for value in (0.1, 0.03, 0.01, 1e-3, 1e-4)],
    "confidence": [f"confidence({value:g})" for value in (0.9, 0.99, 0.999)],
    "argmax": [f"argmax(patience={value})" for value in (1, 2, 3)],
}
FIXED = [f"fixed({value})" for value in (2, 3, 4, 6, 8)]
SKIPPED = ("latest", "propagate", "absent", "monotone", "catch_up", "own/last", "last")
FROZEN = [WaveConfig(threshold=value) for value in (0.3, 0.1, 0.03)] + [
    WaveConfig(freeze="stable", patience=value) for value in (1, 2)
]
FROZEN_EARLIER = [WaveConfig(inner=2, threshold=value) for value in (0.3, 0.1, 0.03)]
DRAFTS = [(2, 4), (2, 8), (3, 8), (4, 8), (2, 16), (3, 16)]
SEQUENTIAL = Way(decoder="sequential", cache="own", decode=decode_sequential)


def exits(rule: str, cache: str = "copy") -> Way:
    """Adaptive exit by a rule."""
    return Way(decoder=f"adaptive {rule}", cache=cache, decode=decode_adaptive, options={"halting": rule})


def waves(config: WaveConfig, cache: str) -> Way:
    """The wavefront."""
    told = f"patience={config.patience}" if config.freeze == "stable" else f"{config.threshold:g}"
    name = f"wavefront {config.freeze}({told}) inner={config.inner}"
    return Way(decoder=name, cache=cache, decode=decode_wavefront, options={"wave": config})


def drafts(rungs: int, lookahead: int) -> Way:
    """Self-speculation."""
    options = {"draft_rungs": rungs, "lookahead": lookahead}
    name = f"speculative draft={rungs} ahead={lookahead}"
    return Way(decoder=name, cache="own", decode=decode_speculative, options=options)


@dataclass(kw_only=True)
class Chosen:
    """What validation chose: a way for every rule, and the one that bears the target (the first)."""

    exits: list[Way]
    waves: list[Way]
    drafts: Way


def choose(model: Any, given: tuple[list[list[int]], np.ndarray]) -> Chosen:
    """Thresholds by validation rows: of every group the cheapest way that surely keeps its accuracy."""
    by_rule = [[exits(rule) for rule in group] for group in RULES.values()]
    by_wave = [[waves(config, cache) for config in FROZEN] for cache in ("own", "own/last")]
    by_wave.append([waves(config, "own/last") for config in FROZEN_EARLIER])
    by_draft = [[drafts(*pair) for pair in DRAFTS]]
    ways = [way for group in (*by_rule, *by_wave, *by_draft) for way in group]
    reference, *others = measure(model, [SEQUENTIAL, *ways], given)
    found = {label(item.way): item for item in others}

    def best(groups: Sequence[Sequence[Way]], cost: Callable[[Decoded], float], allowed: float) -> list[Way]:
        kept = []
        for group in groups:
            costs = {}
            for way in group:
                item = found[label(way)]
                (lost, bound), spent = lost_points(reference, item, worst=0), float(item.per_batch(cost).sum())
                print(f"  valid: {label(way):<56} lost {lost:7.3f}, at most {bound:6.3f}, cost {spent:.6g}")
                costs |= {label(way): spent} if bound <= allowed else {}
            kept += [min((way for way in group if label(way) in costs), key=lambda way: costs[label(way)])] * bool(
                costs
            )
        if not kept:
            raise ValueError("no threshold keeps its accuracy on validation rows: is the model trained?")
        return sorted(kept, key=lambda way: found[label(way)].per_batch(cost).sum())

    return Chosen(
        exits=best(by_rule, _visits, LOST_BY_EXIT),
        waves=best(by_wave, _passes, LOST_BY_WAVE),
        drafts=best(by_draft, _full_drafted, LOST_BY_EXIT)[0],
    )


def table(chosen: Chosen) -> list[Way]:
    """Everything that is measured on test rows; the reference comes first."""
    shared = ["own/last", "own/ring(2)", "own/ring(4)", "own/stride(2)", "own/stride(4)", "own/first", "last", "first"]
    first, wave = chosen.exits[0], chosen.waves[0]
    found = [SEQUENTIAL, *(replace(SEQUENTIAL, cache=cache) for cache in shared), *chosen.exits]
    found += [replace(first, cache=cache) for cache in SKIPPED]
    found += [exits(rule) for rule in FIXED]
    found += [*chosen.waves, waves(WaveConfig(), "own/last"), waves(WaveConfig(freeze="fixed", restart=True), "own")]
    two = replace(wave.options["wave"], headway=2)
    found += [replace(wave, decoder=f"{wave.decoder} headway=2", options={"wave": two})]
    for size in (4, 12):
        found.append(Way(decoder=f"jacobi block={size}", cache="own", decode=decode_jacobi, options={"block": size}))
    return found + [chosen.drafts] + [drafts(2, 4)] * (chosen.drafts != drafts(2, 4))


def entries(found: dict[str, Measured], chosen: Chosen) -> list[dict[str, Any]]:
    """The results that have a target; the first also holds the table."""
    reference = found[label(SEQUENTIAL)]
    wave, early, draft = (found[label(way)] for way in (chosen.waves[0], chosen.exits[0], chosen.drafts))
    items = reference.tokens_RA.size

    def fewer(name: str, item: Measured, cost: Callable[[Decoded], float], least: float) -> dict[str, Any]:
        value, interval = ratio(reference.per_batch(cost if item is not draft else _full), item.per_batch(cost))
        holds = interval[0] >= least
        return {"name": name, "value": round(value, 4), "ci95": interval, "target": least, "holds": holds}

    def loss(name: str, item: Measured, most: float) -> dict[str, Any]:
        lost, bound = lost_points(reference, item)
        holds = bound <= most and items >= MIN_ITEMS
        return {"name": name, "value": round(lost, 4), "ci95": [None, round(bound, 4)], "target": most, "holds": holds}

    different = int((draft.tokens_RA != reference.tokens_RA).sum())
    made = [
        fewer("wavefront: times fewer sequential core passes", wave, _passes, FEWER_PASSES),
        loss("wavefront: points of accuracy lost, one-sided bound", wave, LOST_BY_WAVE),
        fewer("adaptive exit: times fewer visits", early, _visits, FEWER_VISITS),
        loss("adaptive exit: points of accuracy lost, one-sided bound", early, LOST_BY_EXIT),
        exact_entry("self-speculation: tokens that differ", different, target=0),
        fewer("self-speculation: times fewer full-depth passes", draft, _full_drafted, FEWER_FULL),
    ]
    for entry, item in zip(made, (wave, wave, early, early, draft, draft), strict=True):
        speed = float(np.median(reference.per_batch(_seconds) / item.per_batch(_seconds)))
        entry |= {"way": label(item.way), "items": items, "times_faster_wall_clock": round(speed, 3)}
    made[0] |= {"iterations": LOOPS, "batch": BATCH, "table": [item.line(reference) for item in found.values()]}
    return made


def label(way: Way) -> str:
    """Names a way."""
    return f"{way.decoder}, cache {way.cache}"


def _passes(one: Decoded) -> float:
    return one.passes


def _visits(one: Decoded) -> float:
    return one.visits


def _full(one: Decoded) -> float:
    """Sequential passes at full depth of a decoder that makes one for every token but the first."""
    return max(map(len, one.tokens)) - 1


def _full_drafted(one: Decoded) -> float:
    """The same of speculation: one for every verification of the batch."""
    return one.notes["full_passes"]


def _seconds(one: Decoded) -> float:
    return one.seconds


def show(lines: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    heads = ("token", "exact", "lost", "passes", "visits", "depth", "bytes", "tok/s")
    print(f"{'decoder':<44} {'cache':<11}", *(f"{head:>8}" for head in heads))
    for line in lines:
        values = [value for value in line.values() if not isinstance(value, str)]
        kept = [*values[:3], *values[4:9]]
        print(f"{line['decoder']:<44} {line['cache']:<11}", *(f"{value:>8.4g}" for value in kept))


def main() -> int:
    """Train, choose, measure, and write the results; the exit code says whether the targets hold."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--rows", type=int, default=1280, help="test rows that are decoded")
    options.add_argument("--valid", type=int, default=384, help="validation rows that choose thresholds")
    options.add_argument("--work", type=Path, default=Path("runs/bench-decode-policies"), help="where the model goes")
    options.add_argument("--out", type=Path, default=RESULTS / "decode_policies.json", help="result file")
    given = options.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    model = train(given.work)
    began = time.time()
    chosen = choose(model, problems("valid", given.valid))
    print(f"chosen after {(time.time() - began) / 60:.1f} min", flush=True)
    ways = list({label(way): way for way in table(chosen)}.values())
    found = {label(item.way): item for item in measure(model, ways, problems("test", given.rows))}
    made = entries(found, chosen)
    show(made[0]["table"])
    print(f"measured in {(time.time() - began) / 60:.1f} min", flush=True)
    return finish(made, given.out, f"python benchmarks/decode_policies.py --rows {given.rows} --valid {given.valid}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {one_line(error)}")
