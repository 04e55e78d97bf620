"""How branches, first values and learning rates of our own decoder depend on its depth and width.

A parametrisation changes the fields of a decoder before it is built, and gives multipliers per parameter to the
optimizer and the initialisation. Depth is counted for looped plans as follows: the depth of a layer is the position of
its *first* slot, and the depth of the model its number of *slots*, since a branch is added at every visit.

Both follow the plan that the decoder starts with. A plan with more slots, or a layer at another depth, would ask for
other factors, and changing them changes the function; an edit that should preserve it keeps the factors as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from loopwise.loop.config import Component
from loopwise.plan import Plan
from loopwise.train.optim.roles import Multipliers, role_of, rule_for


@dataclass(frozen=True, kw_only=True)
class Parametrisation(Component):
    """Base of the parametrisations."""

    kind: ClassVar[str | None] = None

    def decoder_fields(self, decoder: Mapping[str, Any]) -> dict[str, Any]:
        """All fields of a decoder, those that this parametrisation scales replaced.

        Args:
            decoder: fields of `LoopwiseDecoderConfig` as JSON values, at least `blocks`, `num_hidden_layers`,
                `hidden_size` and `plan` (empty is every layer once).

        Raises:
            ValueError: a decoder that this parametrisation is not defined for.
        """
        raise NotImplementedError

    def multipliers(
        self, named_parameters: Mapping[str, nn.Parameter], decoder: Mapping[str, Any]
    ) -> dict[str, Multipliers]:
        """Factors by parameter name; a name without an entry has none.

        Args:
            named_parameters: parameters of the model by name; only names and shapes are read.
            decoder: fields of the decoder, before or after `decoder_fields`.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class StandardParametrisation(Parametrisation):
    """No factor depends on depth or width."""

    kind: ClassVar[str | None] = "parametrisation.standard"

    def decoder_fields(self, decoder: Mapping[str, Any]) -> dict[str, Any]:
        """The fields as they are."""
        return dict(decoder)

    def multipliers(
        self, named_parameters: Mapping[str, nn.Parameter], decoder: Mapping[str, Any]
    ) -> dict[str, Multipliers]:
        """None."""
        return {}


@dataclass(frozen=True, kw_only=True)
class LayerNormScaling(StandardParametrisation):
    """LayerNorm scaling (2502.05795): what the norms before mixer and MLP give is multiplied by 1 / sqrt(l).

    l is the 1-based depth of the layer. Without it the variance of the stream grows so much with depth that deep layers
    turn into the identity. The authors advise against depth-scaled first values beside it.
    """

    kind: ClassVar[str | None] = "parametrisation.layer_norm_scaling"

    def decoder_fields(self, decoder: Mapping[str, Any]) -> dict[str, Any]:
        """The fields with `norm_scale` set in every block.

        Raises:
            ValueError: a block whose placement is not "pre".
        """
        blocks = _blocks(decoder)
        for block in blocks:
            if block.get("placement", "pre") != "pre":
                raise ValueError(
                    f"{self.kind}: placement={block['placement']!r} has no norm, or one more behind it that undoes "
                    "the scale; use placement 'pre'"
                )
        depths = layer_depths(decoder)
        scaled = [block | {"norm_scale": depth**-0.5} for block, depth in zip(blocks, depths, strict=True)]
        return dict(decoder) | {"blocks": scaled}


@dataclass(frozen=True, kw_only=True)
class CompletePParametrisation(Parametrisation):
    """CompleteP (2505.01618) on top of muP (2203.03466): settings tuned at a base size hold at other sizes.

    With m_N = width / base_width, m_L = slots / base_depth and a = alpha:

        what                           lr              weight decay   first std     other
        matrices of the layers         m_N^-1 m_L^(a-1)  m_N          m_N^-1/2      branches times m_L^-a
        vectors of the layers          m_L^(a-1)
        embeddings, other vectors      1
        heads                          m_N^-1           m_N           m_N^-1
        matrices outside the layers    m_N^-1           m_N           their own

    Adam's epsilon is multiplied by m_N^-1 m_L^-a everywhere, as the authors' code has it, and scores of attention by
    1 / d instead of 1 / sqrt(d). Where that code divides logits by m_N, the head itself starts and moves by as much
    less, which is the same function (with epsilon times m_N); a tied table does so too, and `embedding_scale` takes the
    factor back where the table is read. Multiplying weight decay keeps its product with the learning rate.

    Attributes:
        base_width, base_depth: sizes at which the settings were tuned, at least 1; the depth counts slots.
        alpha: from 1/2 to 1; with 1, layers go on learning features at any depth.
        base_std: standard deviation of random matrices at the base width; None is `base_width ** -0.5`.
        scale_attention: scores times 1 / d; False leaves them as the blocks say.
    """

    kind: ClassVar[str | None] = "parametrisation.complete_p"
    base_width: int = 256
    base_depth: int = 2
    alpha: float = 1.0
    base_std: float | None = None
    scale_attention: bool = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("base_width", "base_depth"):
            self.require(getattr(self, name) >= 1, name, "must be at least 1")
        self.require(0.5 <= self.alpha <= 1, "alpha", "must be between 0.5 and 1")
        self.require(self.base_std is None or self.base_std > 0, "base_std", "must be above 0")

    def ratios(self, decoder: Mapping[str, Any]) -> tuple[float, float]:
        """(m_N, m_L)."""
        return decoder["hidden_size"] / self.base_width, _plan(decoder).num_slots / self.base_depth

    def decoder_fields(self, decoder: Mapping[str, Any]) -> dict[str, Any]:
        """The fields with `branch_scale` and the attention scale in every block, and the standard deviation."""
        width, depth = self.ratios(decoder)
        blocks = _blocks(decoder)
        for block in blocks:
            block["branch_scale"] = depth**-self.alpha
            mixer = block["mixer"]
            if self.scale_attention and mixer.get("kind", "attention") == "attention":
                head_dim = mixer.get("head_dim") or decoder["hidden_size"] // mixer["num_heads"]
                block["mixer"] = mixer | {"scale": 1 / head_dim}
        fields = {"blocks": blocks, "initializer_range": self.base_std or self.base_width**-0.5}
        if decoder.get("tie_word_embeddings"):
            fields["embedding_scale"] = decoder.get("embedding_scale", 1.0) * width
        return dict(decoder) | fields

    def multipliers(
        self, named_parameters: Mapping[str, nn.Parameter], decoder: Mapping[str, Any]
    ) -> dict[str, Multipliers]:
        """The table above."""
        width, depth = self.ratios(decoder)
        eps, branch_lr = depth**-self.alpha / width, depth ** (self.alpha - 1)
        head = Multipliers(lr=1 / width, weight_decay=width, init_std=1 / width, eps=eps * width)
        rules = {}
        for name, parameter in named_parameters.items():
            role, in_layer = role_of(name, parameter.shape), "layers." in name
            tied = bool(decoder.get("tie_word_embeddings")) and name.endswith("embed_tokens.weight")
            if role == "head" or tied:
                rules[name] = head
            elif role == "matrix":
                std = width**-0.5 if in_layer else 1.0
                lr = (branch_lr if in_layer else 1.0) / width
                rules[name] = Multipliers(lr=lr, weight_decay=width, init_std=std, eps=eps)
            else:
                rules[name] = Multipliers(lr=branch_lr if in_layer and role == "vector" else 1.0, eps=eps)
        return rules


@torch.no_grad()
def scale_initial_values(named_parameters: Mapping[str, nn.Parameter], rules: Mapping[str, Multipliers]) -> None:
    """Multiply the random first values by `init_std`, in place: right after the model was made, and once.

    A normal matrix with standard deviation s becomes one with `init_std * s`; values that are 0 stay.
    """
    for name, parameter in named_parameters.items():
        factor = rule_for(name, rules).init_std
        if factor != 1:
            parameter.mul_(factor)


def layer_depths(decoder: Mapping[str, Any]) -> list[int]:
    """The depth of every layer: the 1-based number of its first slot; the last for a layer that is never visited."""
    plan = _plan(decoder)
    first: dict[int, int] = {}
    for number, layer in enumerate(plan.layers, start=1):
        first.setdefault(layer, number)
    return [first.get(layer, plan.num_slots) for layer in range(decoder["num_hidden_layers"])]


def _plan(decoder: Mapping[str, Any]) -> Plan:
    return Plan.parse(decoder["plan"]) if decoder.get("plan") else Plan.identity(decoder["num_hidden_layers"])


def _blocks(decoder: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One dictionary per layer, none shared."""
    blocks, count = decoder["blocks"], decoder["num_hidden_layers"]
    if len(blocks) not in (1, count):
        raise ValueError(f"blocks has {len(blocks)} entries, num_hidden_layers is {count}: give one per layer")
    return [dict(block) for block in (blocks * count if len(blocks) == 1 else blocks)]
