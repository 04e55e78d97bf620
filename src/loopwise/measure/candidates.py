"""Which edits of a stack are worth a try, from measured arrays: the rules of the literature, each with its number.

L is the number of layers. Nothing is run here; `propose` measures what comes out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal, get_args

import numpy as np

from loopwise.edit.operators import DepthOperator
from loopwise.edit.surgery import Prune, Recursive, Repeat, Retrofit, Sharing, Tie
from loopwise.measure.influence import Influence, Split
from loopwise.measure.similarity import Cosines
from loopwise.plan import Loop, Plan, Span

Kind = Literal["prune", "loop", "retrofit", "tie", "tie_block"]
# Blocks of an eighth of the layers: shorter ones hardly change the depth, 7 of 80 is what relayering found useful.
EIGHTH = 8
_OVER: tuple[tuple[Literal["last", "all"], str], ...] = (("last", "at the last tokens"), ("all", "over all tokens"))


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An edit to try.

    Attributes:
        kind: what it does.
        count: layers pruned, or times that a block is run, or layers that become one.
        operator: the edit.
        alias: the plan of the old model that does the same without any new tensor.
        reason: why, in words.
        evidence: the numbers in it, by name.
    """

    kind: Kind
    count: int
    operator: DepthOperator
    alias: Plan
    reason: str
    evidence: dict[str, float]

    @property
    def text(self) -> str:
        """The operator as `loopwise edit --op` takes it."""
        return self.operator.text()


def candidate(
    kind: Kind, count: int, operator: DepthOperator, num_layers: int, reason: str, evidence: dict[str, Any]
) -> Candidate:
    """A candidate with the plan under which it can be measured."""
    played = operator
    if isinstance(operator, Retrofit):  # its adapter keeps the state at first, so the bare loop does the same
        played = replace(operator, adapter="none", iterations=count)
    alias = played.edit(Plan.identity(num_layers), num_layers).alias_plan()
    numbers = {name: float(value) for name, value in evidence.items()}
    return Candidate(kind=kind, count=count, operator=operator, alias=alias, reason=reason, evidence=numbers)


def merged(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Each edit once, with all reasons for it."""
    found: dict[tuple[Kind, str], Candidate] = {}
    for item in candidates:
        key = item.kind, item.text
        if key in found:
            known = found[key]
            clauses = dict.fromkeys([*known.reason.split("; "), *item.reason.split("; ")])
            item = replace(known, reason="; ".join(clauses), evidence=known.evidence | item.evidence)
        found[key] = item
    return list(found.values())


def prune_candidates(found: Influence, n: int) -> Iterator[Candidate]:
    """Leave n layers out: the block over which the state turns least (2403.17887), the least influential (2403.03853).

    Raises:
        ValueError: no layer would stay, or none would go.
    """
    num_layers = len(found.layers)
    if not 1 <= n < num_layers:
        raise ValueError(f"prune {n} of {num_layers} layers: use a number from 1 to {num_layers - 1}")
    for over, where in _OVER:
        distances = found.distances(n, over)
        start = int(distances.argmin())
        reason = (
            f"the state turns least over {span(start, start + n)}: angular distance {distances[start]:.3f} {where}, "
            f"the smallest of {len(distances)} (median {np.median(distances):.3f})"
        )
        layers = Prune(layers=tuple(range(start, start + n)))
        yield candidate("prune", n, layers, num_layers, reason, {f"angular_distance_{over}": distances[start]})
    least = tuple(sorted(int(layer) for layer in np.argsort(found.influence, kind="stable")[:n]))
    low, high, typical = found.influence[[*least]].min(), found.influence[[*least]].max(), np.median(found.influence)
    value = f"{low:.3f}" if n == 1 else f"{low:.3f} to {high:.3f}"
    what = "the layer" if n == 1 else f"the {n} layers"
    reason = f"{what} with the least block influence: {value} (median of all {typical:.3f})"
    evidence = {"block_influence_max": high, "block_influence_median": typical}
    yield candidate("prune", n, Prune(layers=least), num_layers, reason, evidence)


def loop_candidates(found: Influence, split: Split | None, times: int) -> Iterator[Candidate]:
    """Run a middle block several times: the part between the knees (2510.07358), or a block inside it.

    Blocks over which the state turns least come first: another pass then meets nearly what the first one met.
    """
    num_layers = len(found.layers)
    start, stop = middle(split, num_layers)
    distance = found.distances(stop - start, "all")[start]
    what = f"the part between the knees of the angular distance ({described(split)})" if split else "the middle"
    reason = f"{what}; over it the state turns by {distance:.3f}"
    whole = Repeat(i=start, j=stop, times=times)
    yield candidate("loop", times, whole, num_layers, reason, {"angular_distance_all": distance})
    for size in sorted({max(1, num_layers // EIGHTH), max(1, num_layers // (EIGHTH // 2))}):
        if size >= stop - start:
            continue
        inside = found.distances(size, "all")[start : stop - size + 1]
        calm, centred = start + int(inside.argmin()), (start + stop - size) // 2
        for first in dict.fromkeys((calm, centred)):
            value = inside[first - start]
            rank = (
                f"the least of the {len(inside)} blocks of {size} in the middle" if first == calm else "in the centre"
            )
            reason = f"over {span(first, first + size)} the state turns by {value:.3f}, {rank}"
            block = Repeat(i=first, j=first + size, times=times)
            yield candidate("loop", times, block, num_layers, reason, {"angular_distance_all": value})


def retrofit_candidates(found: Influence, split: Split | None, times: int) -> Iterator[Candidate]:
    """Make the part between the knees a loop with an injection, to be trained to any depth (2511.07384)."""
    if split is None:
        return
    reason = (
        f"the knees of the angular distance divide the stack: {described(split)}; at one pass the model is what it "
        f"was, the loss after is that of {times} passes without training"
    )
    parts = Retrofit(prelude=split.prelude, core=split.core, coda=split.coda)
    curve = found.distances(1, "all")
    inside = curve[split.prelude : split.prelude + split.core].mean()
    evidence = {"angular_distance_core": inside, "angular_distance_mean": curve.mean()}
    yield candidate("retrofit", times, parts, len(found.layers), reason, evidence)


def tie_candidates(found: Influence, weights: Cosines, loops: int) -> list[Candidate]:
    """Make the whole stack a loop (2410.20672), by the two sharings whose layers are most alike.

    Those that divide the depth are ranked by how alike the layers that become one update the state. They start
    stepwise, from copies of layers at even distances: what an average does cannot be measured without making it.
    """
    num_layers, ranked = len(found.layers), []
    for sharing in get_args(Sharing):
        operator = Recursive(loops=loops, sharing=sharing)
        try:
            edit = operator.edit(Plan.identity(num_layers), num_layers)
        except ValueError:
            continue
        groups: dict[int, list[int]] = {}
        for shared, old in zip(edit.plan.layers, edit.origins, strict=True):
            groups.setdefault(shared, []).append(old)
        words, evidence = alike(found, weights, list(groups.values()))
        ranked.append((-evidence["update_cosine"], len(ranked), operator, words, evidence))
    tied = []
    for *_, operator, words, evidence in sorted(ranked, key=lambda item: item[:2])[:2]:
        reason = f"{operator.sharing} sharing, layers that become one: {words}"
        tied.append(candidate("tie", loops, operator, num_layers, reason, evidence))
    return tied


def tie_block_candidates(found: Influence, weights: Cosines, split: Split | None, loops: int) -> Iterator[Candidate]:
    """Make neighbouring blocks of the middle one: those most alike in what they do, and those most alike in weights."""
    num_layers = len(found.layers)
    start, stop = middle(split, num_layers)
    size = min(max(1, num_layers // EIGHTH), (stop - start) // loops)
    if not size:
        return
    places = range(start, stop - loops * size + 1)
    for name, cosines in (("update", found.update_cosine), ("weight", weights.cosine)):
        scores = [_pairs(cosines, _neighbours(first, size, loops)) for first in places]
        if np.isnan(scores).all():
            continue
        first = places[int(np.nanargmax(scores))]
        words, evidence = alike(found, weights, _neighbours(first, size, loops))
        spans = [Span(0, first - 1)] if first else []
        left = num_layers - (loops - 1) * size
        behind = [Span(first + size, left - 1)] if first + size < left else []
        plan = Plan((*spans, Loop((Span(first, first + size - 1),), loops), *behind))
        blocks = " and ".join(span(first + r * size, first + (r + 1) * size) for r in range(loops))
        rank = f"most alike by {name} of {len(places)} places" if len(places) > 1 else "the only neighbours"
        reason = f"{blocks} are {rank}; {words}"
        yield candidate("tie_block", loops, Tie(plan=str(plan), init="first"), num_layers, reason, evidence)


def alike(found: Influence, weights: Cosines, groups: Sequence[Sequence[int]]) -> tuple[str, dict[str, float]]:
    """How alike the layers of each group are, in words and numbers."""
    everything = [list(range(len(found.layers)))]
    update, usual = _pairs(found.update_cosine, groups), _pairs(found.update_cosine, everything)
    evidence = {"update_cosine": update, "update_cosine_usual": usual}
    words = f"they add to the state with cosine {update:.3f} (any two layers {usual:.3f})"
    weight = _pairs(weights.cosine, groups)
    if not np.isnan(weight):
        chance, pairs = _pairs(weights.chance, groups), sum(len(group) * (len(group) - 1) // 2 for group in groups)
        std = math.sqrt(_pairs(weights.chance_std**2, groups) / pairs)  # pairs taken as independent
        evidence |= {"weight_cosine": weight, "weight_chance": chance, "weight_chance_std": std}
        words += f"; cosine of their matrices {weight:.4f} (chance {chance:.4f} +- {std:.4f})"
    return words, evidence


def middle(split: Split | None, num_layers: int) -> tuple[int, int]:
    """First and one past the last layer of the middle: between the knees, or else without the two ends."""
    if split is not None:
        return split.prelude, split.prelude + split.core
    return (1, num_layers - 1) if num_layers > 2 else (0, num_layers)


def described(split: Split) -> str:
    """The parts in words."""
    ends = np.cumsum([0, split.prelude, split.core, split.coda])
    parts = zip(("prelude", "core", "coda"), ends, ends[1:], strict=False)
    return ", ".join(f"{name} {span(int(a), int(b))}" for name, a, b in parts if b > a)


def span(start: int, stop: int) -> str:
    """`layers 3-5` or `layer 3`."""
    return f"layer {start}" if stop == start + 1 else f"layers {start}-{stop - 1}"


def _neighbours(first: int, size: int, loops: int) -> list[list[int]]:
    return [[first + j + r * size for r in range(loops)] for j in range(size)]


def _pairs(cosines: np.ndarray, groups: Sequence[Sequence[int]]) -> float:
    """Mean over all pairs inside the groups; NaN when no pair can be compared."""
    values = np.array([cosines[pair] for group in groups for pair in combinations(group, 2)])
    known = values[~np.isnan(values)] if len(values) else values
    return float(known.mean()) if len(known) else float("nan")
