"""Which capabilities of the library run together: the claim "orthogonal, thus composable", pair by pair.

Each pair of capabilities that exist either has a law test (`tests/loop/test_compose.py` runs one per pair marked
"runs") or is refused by name. A capability adds its row when it is built; until then its pairs say "absent".
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations


@dataclass(frozen=True, kw_only=True)
class Capability:
    """One way to change how a decoder spends computation.

    Attributes:
        name: its name in the matrix.
        what: one line on what it is.
        built: whether this version has it.
    """

    name: str
    what: str
    built: bool = False


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is known of a pair: `status` is "runs", "refused" or "absent"; `reason` says why where it does not run."""

    status: str
    reason: str = ""


CAPABILITIES = (
    Capability(name="loop", what="a plan that visits layers several times", built=True),
    Capability(name="growth", what="edits of depth between training stages", built=True),
    Capability(name="tie + delta", what="shared layers with low-rank offsets per visit", built=True),
    Capability(name="halting", what="a number of visits that depends on the token", built=True),
    Capability(name="routing", what="visits by the tokens that a router chooses", built=True),
    Capability(name="chunk", what="levels that run on chunks of tokens"),
    Capability(name="mixer", what="recurrent token mixers of our own decoder"),
    Capability(name="thought", what="latent positions on the token axis"),
    Capability(name="sampler", what="sampling and beam search of generate", built=True),
    Capability(name="speculation", what="prompt lookup and assisted generation", built=True),
    Capability(name="early exit", what="tokens that stop early while decoding, in loops and plain models", built=True),
    Capability(name="wavefront", what="later tokens refined while earlier ones still are", built=True),
    Capability(name="self-speculation", what="drafts with fewer iterations, verified at full depth", built=True),
    Capability(name="depth batching", what="requests at different iterations in one batch", built=True),
    Capability(name="adapters", what="LoRA through PEFT, before or after attach", built=True),
    Capability(name="sharding", what="FSDP2 with the loop as one unit", built=True),
)
_DECODERS = ("speculation", "early exit", "wavefront", "self-speculation", "depth batching")
_ROUTED = "a loop with routers is not taken apart: the model's own generate decodes it"
_REFUSED: dict[frozenset[str], str] = {
    frozenset(("routing", "early exit")): _ROUTED,
    frozenset(("routing", "wavefront")): _ROUTED,
    frozenset(("routing", "self-speculation")): _ROUTED,
    frozenset(("halting", "wavefront")): "a wave freezes positions by rules of its own",
    frozenset(("halting", "self-speculation")): "drafts are verified at full depth, which no token leaves early",
    frozenset(("tie + delta", "wavefront")): "positions at different iterations run in one call, offsets are per call",
    frozenset(("growth", "adapters")): "an edit makes new layers, whose adapters would be others: merge them first",
    frozenset(("halting", "routing")): "a loop with a router has no exit gate: its router already says who goes on",
}
# A decoder runs by itself; requests of a batch may leave early.
_REFUSED |= {
    frozenset((first, second)): "one decoder at a time"
    for first, second in combinations(_DECODERS, 2)
    if (first, second) != ("early exit", "depth batching")
}


def matrix() -> dict[tuple[str, str], Cell]:
    """Every unordered pair of capabilities, in the order of `CAPABILITIES`."""
    return {(first.name, second.name): _cell(first, second) for first, second in combinations(CAPABILITIES, 2)}


def _cell(first: Capability, second: Capability) -> Cell:
    missing = [item.name for item in (first, second) if not item.built]
    if missing:
        return Cell(status="absent", reason=f"{' and '.join(missing)} not built yet")
    reason = _REFUSED.get(frozenset((first.name, second.name)))
    return Cell(status="runs") if reason is None else Cell(status="refused", reason=reason)
