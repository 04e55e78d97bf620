"""What a plan costs: the only definition of FLOPs, bytes and realised depth in loopwise.

Conventions:

* One multiply-add is 2 FLOPs. Counted are matmuls and convolutions (`loopwise.measure.layer_cost`), as torch's
  `FlopCounterMode` counts them. Not counted: embedding look-ups, norms, activations, softmax, rotary tables, and the
  scans of state-space and linear attention layers (about 4 FLOPs per element of recurrent state and token where run
  as a recurrence; what chunked kernels do depends on the kernel).
* FLOPs are per token. Every token passes the output head, as in training and scoring, not as in a prefill.
* Attention is counted over the *full* context, masked or not, as torch counts scaled dot product attention;
  `causal=True` counts visible keys only, about half. A sliding window counts `min(context, window)` keys.
* A backward pass costs twice the forward pass of what carries gradient, as if every weight there was trained.
* Routed experts cost what a token visits, also where an implementation computes all of them.
* Parameters are tensors: a tied one counts once. Keys and values are counted in the element size of their layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from loopwise.loop.boundary import turns_of
from loopwise.loop.passes import LoopModule
from loopwise.measure.layer_cost import attentions, matmul_weights, offset_weights, state_elements
from loopwise.models.attach import plan_of
from loopwise.models.hub import LayerList, layer_list, text_config
from loopwise.models.relaxation import relaxation_of
from loopwise.plan import Loop, Plan, Slot

MAIN_LOOP = "core"


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One physical layer, once. FLOPs are per token, `state_bytes` per sequence."""

    layer: int
    matmul_flops: float
    attention_flops: float
    parameters: int
    cache_bytes_per_token: int
    state_bytes: int

    @property
    def forward_flops(self) -> float:
        """FLOPs per token of one visit."""
        return self.matmul_flops + self.attention_flops


@dataclass(frozen=True, kw_only=True)
class VisitCost:
    """One slot of the plan: what its visit adds to the sums.

    Attributes:
        layer: the physical layer.
        share: share of the tokens that visit the slot, 1 where depth is fixed.
        with_grad: whether the visit is differentiated in training.
        forward_flops: per token, `share` included.
        training_flops: per token, `share` included: forward, twice that for backward, once more where recomputed.
        cache_bytes_per_token: keys and values that the slot keeps.
        state_bytes: state of constant size that the slot keeps per sequence.
    """

    layer: int
    share: float
    with_grad: bool
    forward_flops: float
    training_flops: float
    cache_bytes_per_token: int
    state_bytes: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of a model under a plan; every total is a sum over `visits` plus what lies outside the layers.

    Attributes:
        plan: its canonical text.
        context: number of keys that attention is counted with.
        causal: whether only visible keys are counted.
        layers: the physical layers that the plan visits, each once.
        visits: one entry per slot, in visit order.
        outside_flops: forward FLOPs per token of the output head and of projections outside the layers.
        parameters_unique: elements of all distinct parameters under the plan; layers that it skips are left out.
        parameters_unrolled: the same with a copy of the layer for every slot.
        left_out: names of parameters with two or more dimensions that were taken as elementwise.
    """

    plan: str
    context: int
    causal: bool
    layers: tuple[LayerCost, ...]
    visits: tuple[VisitCost, ...]
    outside_flops: float
    parameters_unique: int
    parameters_unrolled: int
    left_out: tuple[str, ...]

    @property
    def forward_flops_per_token(self) -> float:
        """FLOPs of one forward pass."""
        return self.outside_flops + sum(visit.forward_flops for visit in self.visits)

    @property
    def training_flops_per_token(self) -> float:
        """FLOPs of forward, backward and recomputation."""
        return 3 * self.outside_flops + sum(visit.training_flops for visit in self.visits)

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of keys and values that all slots together keep for a token inside every window."""
        return sum(visit.cache_bytes_per_token for visit in self.visits)

    @property
    def state_bytes(self) -> int:
        """Bytes of constant-size state (convolution tails, recurrent states) that all slots keep per sequence."""
        return sum(visit.state_bytes for visit in self.visits)

    @property
    def num_slots(self) -> int:
        """Number of visits of the plan."""
        return len(self.visits)

    @property
    def realised_depth(self) -> float:
        """Mean number of visits per token."""
        return sum(visit.share for visit in self.visits)


def cost_of(
    model: nn.Module,
    plan: Plan | str | None = None,
    *,
    context: int = 1024,
    causal: bool = False,
    grad_iterations: int | None = None,
    grad_prelude: bool = True,
    recompute: bool | Literal["loop"] = False,
    visits: Any = None,
) -> Cost:
    """Cost of a transformers causal language model under a plan. Nothing is run; parameters may be on the meta device.

    Args:
        model: the model, attached or not.
        plan: the plan or its text; None means the plan that the model is attached with, else every layer once.
        context: number of keys per query, at least 1.
        causal: count the keys that a causal mask shows instead of all.
        grad_iterations: number of last iterations of the main loop (the one named `core`, else the only loop) that
            carry gradient; earlier ones are run forward only. None, or more than the loop has, means all.
        grad_prelude: whether what comes before the main loop carries gradient when not all iterations do: True where
            the loop reads its input again, False where only the state connects them (no gradient passes the window).
        recompute: activation checkpointing runs the forward of visits with gradient a second time: every visit (True),
            or only those of the main loop ("loop").
        visits: which token visited which slot where depth is adaptive: `[tokens, num_slots]` of 0 and 1 (bool, int or
            float), or `[num_slots]` shares in 0 .. 1. None means that every token visits all.

    Returns:
        The cost, a sum over the slots of the plan.

    Raises:
        ValueError: a plan that does not fit, a plan without a main loop where one is asked for, or bad numbers.
    """
    where = layer_list(model)
    plan = _resolve(model, plan, len(where.layers))
    if context < 1:
        raise ValueError(f"context must be at least 1, got {context}")
    if recompute not in (True, False, "loop"):
        raise ValueError(f'recompute must be True, False or "loop", got {recompute!r}')
    config = text_config(model)
    left_out: list[str] = []
    layers = {}
    for index in plan.unique_layers:
        layers[index], names = _layer_cost(where.layers[index], index, config, context, causal)
        left_out += [f"{where.path}.{index}.{name}" for name in names]
    # Everything around the layers: the output head, tied or not, and projections of the embeddings.
    outside, names = matmul_weights(model, config, skip=[where.layers])
    outside += _repeated_weights(where.owner, plan, config)
    unique, unrolled = _parameters(model, where, plan)
    return Cost(
        plan=str(plan),
        context=context,
        causal=causal,
        layers=tuple(layers.values()),
        visits=tuple(_visits(plan, layers, grad_iterations, grad_prelude, recompute, visits)),
        outside_flops=2 * outside,
        parameters_unique=unique,
        parameters_unrolled=unrolled,
        left_out=(*left_out, *names),
    )


def realised_depth(visits: Any) -> float:
    """Mean number of visits per token.

    Args:
        visits: `[tokens, slots]` of 0 and 1 (bool, int or float), or `[slots]` shares of the tokens in 0 .. 1.

    Raises:
        ValueError: another shape, no tokens, or values outside 0 .. 1.
    """
    return float(_shares(visits).sum())


def _shares(visits: Any) -> torch.Tensor:
    """float64 `[slots]`: share of the tokens that visit each slot."""
    shares = torch.as_tensor(visits).detach().to("cpu", torch.float64)
    if shares.dim() not in (1, 2) or shares.numel() == 0:
        raise ValueError(f"visits must be [tokens, slots] or [slots] and not empty, got shape {list(shares.shape)}")
    if not bool(((shares >= 0) & (shares <= 1)).all()):
        raise ValueError("visits must lie in 0 .. 1: which token visited which slot, or the share of tokens per slot")
    return shares.mean(0) if shares.dim() == 2 else shares


def _resolve(model: nn.Module, plan: Plan | str | None, num_layers: int) -> Plan:
    if plan is None:
        plan = plan_of(model) or Plan.identity(num_layers)
    return Plan.parse(plan).validate(num_layers)


def _layer_cost(
    layer: nn.Module, index: int, config: Any, context: int, causal: bool
) -> tuple[LayerCost, tuple[str, ...]]:
    relaxation = relaxation_of(layer)
    weights, left_out = matmul_weights(layer, config, skip=[] if relaxation is None else [relaxation])
    weights += offset_weights(layer, config)
    found = list(attentions(layer, index, config))
    floating = (parameter for parameter in layer.parameters() if parameter.is_floating_point())
    element = next(floating, torch.empty(0)).element_size()
    cost = LayerCost(
        layer=index,
        matmul_flops=2 * weights,
        attention_flops=sum(attention.flops(context, causal) for attention in found),
        parameters=sum(parameter.numel() for parameter in layer.parameters()),
        cache_bytes_per_token=element * sum(attention.cached for attention in found),
        state_bytes=element * state_elements(layer),
    )
    return cost, left_out


def _parameters(model: nn.Module, where: LayerList, plan: Plan) -> tuple[int, int]:
    """Elements of distinct parameters under the plan, and with a copy of the layer for every slot."""
    layers = [dict.fromkeys(layer.parameters()) for layer in where.layers]
    inside = {parameter for layer in layers for parameter in layer}
    outside = sum(parameter.numel() for parameter in model.parameters() if parameter not in inside)
    visited = {parameter for index in plan.unique_layers for parameter in layers[index]}
    unique = sum(parameter.numel() for parameter in visited)
    # What several layers share stays shared in the unrolled model.
    shared = {p for p in visited if sum(p in layer for layer in layers) > 1}
    # Offsets per visit become a part of the copies.
    found = [relaxation_of(layer) for layer in where.layers]
    shared_and_offsets = shared.union(*(relaxation.parameters() for relaxation in found if relaxation is not None))
    own = [sum(p.numel() for p in layer if p not in shared_and_offsets) for layer in layers]
    unrolled = sum(p.numel() for p in shared) + sum(own[index] for index in plan.layers)
    return outside + unique, outside + unrolled


def _repeated_weights(owner: nn.Module, plan: Plan, config: Any) -> float:
    """Weight elements of loop components that a token meets beyond once: those of every iteration.

    They are negative for a loop that the plan lacks.
    """
    loops = owner._modules.get("loops")
    names = [turn.loop.name for turns in turns_of(plan).values() for turn in turns.begin]
    total = 0.0
    for name, module in loops.items() if isinstance(loops, nn.ModuleDict) else ():
        if not isinstance(module, LoopModule):
            continue
        for part in (module.update, module.turn, module.conditioner, module.gate):
            total += 0.0 if part is None else (names.count(name) - 1) * matmul_weights(part, config)[0]
    return total


def _visits(
    plan: Plan,
    layers: dict[int, LayerCost],
    grad_iterations: int | None,
    grad_prelude: bool,
    recompute: bool | str,
    visits: Any,
) -> Iterator[VisitCost]:
    shares = [1.0] * plan.num_slots if visits is None else _shares(visits).tolist()
    if len(shares) != plan.num_slots:
        raise ValueError(f"visits has {len(shares)} slots, the plan {plan} has {plan.num_slots}")
    asked = grad_iterations is not None or recompute == "loop"
    iterations: list[int | None] = _main_iterations(plan) if asked else [None] * plan.num_slots
    window = _window_start(iterations, grad_iterations)
    first_inside = next((i for i, iteration in enumerate(iterations) if iteration is not None), 0)
    for i, (slot, iteration, share) in enumerate(zip(plan.slots, iterations, shares, strict=True)):
        layer = layers[slot.layer]
        cut = window > 0 and i < first_inside and not grad_prelude
        with_grad = not cut and (iteration is None or iteration >= window)
        repeated = with_grad and (recompute is True or (recompute == "loop" and iteration is not None))
        forward = share * layer.forward_flops
        yield VisitCost(
            layer=slot.layer,
            share=share,
            with_grad=with_grad,
            forward_flops=forward,
            training_flops=forward * (1 + 2 * with_grad + repeated),
            cache_bytes_per_token=layer.cache_bytes_per_token,
            state_bytes=layer.state_bytes,
        )


def _window_start(iterations: list[int | None], grad_iterations: int | None) -> int:
    """The first iteration that carries gradient."""
    if grad_iterations is None:
        return 0
    if grad_iterations < 0:
        raise ValueError(f"grad_iterations must be at least 0, got {grad_iterations}")
    last = max(iteration for iteration in iterations if iteration is not None)
    return max(0, last + 1 - grad_iterations)


def _main_iterations(plan: Plan) -> list[int | None]:
    """For every slot the iteration of the main loop that it belongs to, None outside.

    A main loop inside another loop is counted through: its iterations in the second outer pass follow those in the
    first.
    """
    prefix, depth = _main_loop(plan)
    seen: dict[tuple[int, ...], int] = {}

    def iteration(slot: Slot) -> int | None:
        if slot.position[: len(prefix)] != prefix:
            return None
        return seen.setdefault(slot.iterations[: depth + 1], len(seen))

    return [iteration(slot) for slot in plan.slots]


def _main_loop(plan: Plan) -> tuple[tuple[int, ...], int]:
    """Path of the main loop and the number of loops around it."""

    def walk(nodes: tuple, prefix: tuple[int, ...], depth: int) -> Iterator[tuple[Loop, tuple[int, ...], int]]:
        for index, node in enumerate(nodes):
            if isinstance(node, Loop):
                yield node, (*prefix, index), depth
                yield from walk(node.body, (*prefix, index), depth + 1)

    found = list(walk(plan.nodes, (), 0))
    candidates = [item for item in found if item[0].name == MAIN_LOOP] or found
    if len(candidates) != 1:
        number = f"{len(found)} loops and none is named {MAIN_LOOP}" if found else "no loop"
        raise ValueError(f"the plan {plan} has {number}: name the main loop, for example {MAIN_LOOP}:(2-5)x8")
    return candidates[0][1], candidates[0][2]
