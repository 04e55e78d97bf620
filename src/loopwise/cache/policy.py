"""Cache policies: which visits of a layer share one store of keys and values.

| kind | iteration i reads and writes | exact |
|---|---|---|
| own | its own store | yes |
| selected | its own store, which holds only the tokens that a router let in (MoR 2507.10524) | yes |
| ring(k) | store i mod k: earlier tokens as their last iteration congruent to i left them | no |
| stride(k) | store i // k: earlier tokens as the last iteration of the same k left them | no |
| last | ring(1): earlier tokens as their last iteration left them (Ouro's decoding, 2510.25741) | no |
| first | the keys and values of iteration 0, the current tokens' too (recursive sharing, MoR 2507.10524) | no |

A policy is a pair (prefill, decode). `last`, `ring` and `stride` make a token read what *later* iterations of earlier
tokens wrote, so their prefill goes position by position; `own/last` prefills exactly in parallel and keeps only the
last iteration from the first decoded token on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from loopwise.plan.nodes import Slot

StoreKey = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """One half of a policy.

    Attributes:
        kind: own, selected, first, ring or stride.
        size: number of stores of a ring, or of iterations that share a store of a stride.
    """

    kind: str = "own"
    size: int = 0

    @classmethod
    def parse(cls, text: str) -> Sharing:
        """Read `own`, `selected`, `first`, `last` or `ring(k)`; anything else is a `ValueError`."""
        if text in ("own", "selected", "first"):
            return cls(kind=text)
        if text == "last":
            return cls(kind="ring", size=1)
        match = re.fullmatch(r"(ring|stride)\(([0-9]{1,6})\)", text)
        if match is None or int(match[2]) < 1:
            raise ValueError(
                f"cache policy {text!r} is unknown: use own, selected, last, first, ring(k), stride(k), or a pair "
                "such as own/last"
            )
        return cls(kind=match[1], size=int(match[2]))

    def __str__(self) -> str:
        return f"{self.kind}({self.size})" if self.size else self.kind

    def place(self, iteration: int) -> int:
        """The number of the store that an iteration uses."""
        match self.kind:
            case "ring":
                return iteration % self.size
            case "stride":
                return iteration // self.size
            case "first":
                return 0
        return iteration

    def store(self, slot: Slot) -> StoreKey:
        """The key of the store that a slot uses."""
        return slot.position, tuple(map(self.place, slot.iterations))

    def reads_only(self, slot: Slot) -> bool:
        """True when the slot reads what another iteration wrote for the same token."""
        return self.kind == "first" and any(slot.iterations)

    @property
    def is_shared(self) -> bool:
        """True when several visits use one store."""
        return self.kind in ("first", "ring", "stride")

    @property
    def is_sequential(self) -> bool:
        """True when tokens depend on later iterations of earlier tokens, so that they are computed one by one."""
        return self.kind in ("ring", "stride")


@dataclass(frozen=True, kw_only=True)
class CachePolicy:
    """How repeated depth is cached.

    Attributes:
        prefill: sharing while several tokens are computed in one call.
        decode: sharing from the first single-token call on.
        on_deeper: what to do when a call visits slots that earlier tokens of the cache did not: "refuse", or
            "catch_up", which
            recomputes the earlier tokens at the new depth (exact).
    """

    prefill: Sharing = Sharing()
    decode: Sharing = Sharing()
    on_deeper: str = "refuse"

    def __post_init__(self) -> None:
        if self.on_deeper not in ("refuse", "catch_up"):
            raise ValueError(f"on_deeper is {self.on_deeper!r}: use 'refuse' or 'catch_up'")
        if self.prefill != self.decode and self.prefill.kind != "own":
            raise ValueError(
                "a cache policy pair must start with own, such as own/last: other prefills fix the decoding"
            )
        if "selected" in (self.prefill.kind, self.decode.kind) and self.prefill != self.decode:
            raise ValueError("cache policy selected is no part of a pair: use selected for prefill and decoding")
        if self.on_deeper == "catch_up" and self.prefill.kind == "selected":
            raise ValueError("on_deeper='catch_up' is not available with cache policy selected: use 'refuse'")
        if self.on_deeper == "catch_up" and not self.is_exact:
            raise ValueError("on_deeper='catch_up' goes with cache policy own: shared stores need no catching up")

    @classmethod
    def parse(cls, text: str, on_deeper: str = "refuse") -> CachePolicy:
        """Read `own`, `selected`, `last`, `first`, `ring(k)` or a pair `prefill/decode`."""
        if not isinstance(text, str):
            raise ValueError(f"cache policy must be text such as 'own' or 'own/last', not {type(text).__name__}")
        prefill, slash, decode = text.partition("/")
        decode = decode if slash else prefill
        return cls(prefill=Sharing.parse(prefill), decode=Sharing.parse(decode), on_deeper=on_deeper)

    def __str__(self) -> str:
        return str(self.prefill) if self.prefill == self.decode else f"{self.prefill}/{self.decode}"

    @property
    def is_exact(self) -> bool:
        """True when cached decoding equals full recomputation of the model under its plan."""
        return not self.prefill.is_shared and not self.decode.is_shared
