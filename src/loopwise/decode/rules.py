"""What a token that leaves early leaves behind in the stores of the depths that it did not reach.

| rule | a deeper query finds, for a token that left after n rungs | exact |
|---|---|---|
| copy | keys and values of rung n - 1, copied to the deeper stores | no |
| latest | the same, looked up at every reading: the deepest store that the token has | no |
| propagate | keys and values made at every deeper rung from the state with which it left (CALM, 2207.07061) | no |
| absent | nothing: the token is not seen (MoR, 2507.10524) | defines the model |
| monotone | nothing is missing: no later token goes deeper (SkipDecode, 2307.02628) | yes |
| catch_up | its own, computed when a later token first needs them (FREE, 2310.05424) | yes |

Rungs with the same weights and rungs with weights of their own are different cases: a copy between iterations of a loop
is what the loop itself would nearly have made (path independence), a copy between distinct layers is what another
function made. `propagate` is meant for the second case, `copy` for the first; each runs for both and says so.

Stores that iterations share (first, last, ring, stride) hold the latest iteration of each token that used them; where a
token left before it used one, that one holds a copy of its last. They exist for the iterations of a loop only.

With every rule a row is independent of the others of its batch.

Exact means equal to a computation without a cache in which every token has exactly the depth that it had: for
`monotone` a later token sees earlier ones at its own depths only, for `catch_up` at full depth.
"""

from __future__ import annotations

from dataclasses import dataclass

from loopwise.cache.policy import Sharing

SKIPPED = ("copy", "latest", "propagate", "absent", "monotone", "catch_up")


@dataclass(frozen=True, kw_only=True)
class StorePolicy:
    """How depth is stored while decoding.

    Attributes:
        prefill: which rungs share a store while a prompt is computed.
        decode: which rungs share a store from the first new token on.
        skipped: what a token that leaves early leaves behind, see the table above; not read by stores that hold each
            token's latest rung (last, ring(1)) or first (first).
    """

    prefill: Sharing = Sharing()
    decode: Sharing = Sharing()
    skipped: str = "copy"

    def __post_init__(self) -> None:
        if self.skipped not in SKIPPED:
            raise ValueError(f"rule for skipped depth {self.skipped!r} is unknown: use {', '.join(SKIPPED)}")
        for half in (self.prefill, self.decode):
            if half.kind == "selected":
                raise ValueError("cache policy selected is called absent here: use cache='absent'")
        if self.prefill != self.decode and self.prefill.kind != "own":
            raise ValueError("a cache policy pair must start with own, such as own/last")
        if self.skipped not in ("copy",) and self.decode.kind != "own":
            raise ValueError(f"cache policy {self.decode} stores no depth apart: the rule {self.skipped!r} needs own")

    @classmethod
    def parse(cls, text: str) -> StorePolicy:
        """Read `own` (the same as copy), a rule of the table, `last`, `first`, `ring(k)`, `stride(k)`, or own/last."""
        if not isinstance(text, str):
            raise ValueError(f"cache policy must be text such as 'copy' or 'last', not {type(text).__name__}")
        if text in SKIPPED:
            return cls(skipped=text)
        prefill, slash, decode = text.partition("/")
        try:
            return cls(prefill=Sharing.parse(prefill), decode=Sharing.parse(decode if slash else prefill))
        except ValueError as error:
            raise ValueError(f"{error}; for depth that is skipped also {', '.join(SKIPPED)}") from None

    def __str__(self) -> str:
        if self.decode.kind == "own":
            return self.skipped
        decode = "last" if self.decode == Sharing.parse("last") else str(self.decode)
        return decode if self.prefill == self.decode else f"{self.prefill}/{decode}"

    @property
    def is_exact(self) -> bool:
        """True when what is decoded equals a computation without a cache, see the table above."""
        return self.decode.kind == "own" and self.skipped in ("monotone", "catch_up")

    @property
    def has_depths(self) -> bool:
        """True when how deep each token went is looked up at every reading."""
        return self.skipped in ("latest", "absent")
