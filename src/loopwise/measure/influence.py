"""How much every visit changes the hidden state, and how alike the states and their changes are along depth.

Legend: B rows, T tokens, D width, S visits (layers of a plain model), N tokens at a time.

With h_0 the state before the first visit and h_s the state after the s-th, for every token that is no padding:

    block influence     BI_s = 1 - E cos(h_s, h_{s+1})                           over all tokens (2403.03853)
    angular distance    d(h_s, h_{s+n}) = E arccos(cos(h_s, h_{s+n})) / pi       over last tokens (2403.17887) or all
    update similarity   E cos(h_{s+1} - h_s, h_{r+1} - h_r)                      over all tokens

States are taken at the boundaries of visits. `hidden_states[-1]` of transformers is not one of them: it has gone
through the final norm.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from loopwise.loop.execute import Visit
from loopwise.measure.arrays import as_lists
from loopwise.models.attach import eval_mode
from loopwise.models.hub import layer_list
from loopwise.models.playing import looping_of

# Numbers of all states that are held in float64 at a time: 32 MB.
CHUNK = 2**22
Batch = torch.Tensor | Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Where a stack divides into layers that read, layers that think, and layers that write.

    Attributes:
        prelude, core, coda: numbers of visits.
    """

    prelude: int
    core: int
    coda: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Influence:
    """What was measured over all tokens of all rows.

    Attributes:
        layers: the layer of every visit, S of them.
        rows: number of rows.
        tokens: number of tokens without padding.
        influence: float64 `[S]`, block influence.
        state_cosine: float64 `[S + 1, S + 1]`, mean cosine of the states at two boundaries.
        update_cosine: float64 `[S, S]`, mean cosine of what two visits add; 0 with a visit that adds nothing.
        angle: float64 `[S + 1, S + 1]`, mean angular distance of the states at two boundaries, 0 to 1.
        last_angle: the same over the last token of every row.
    """

    layers: tuple[int, ...]
    rows: int
    tokens: int
    influence: np.ndarray
    state_cosine: np.ndarray
    update_cosine: np.ndarray
    angle: np.ndarray
    last_angle: np.ndarray

    def distances(self, n: int, over: Literal["last", "all"] = "last") -> np.ndarray:
        """d(h_s, h_{s+n}) for every first visit s: float64 `[S - n + 1]`."""
        if not 1 <= n <= len(self.layers):
            raise ValueError(f"blocks of n={n} visits: the model has 1 to {len(self.layers)}")
        return np.diagonal({"last": self.last_angle, "all": self.angle}[over], n).copy()

    def grid(self, over: Literal["last", "all"] = "last") -> np.ndarray:
        """All distances: float64 `[S, S]`, row n - 1 for blocks of n visits, column s for the first; NaN elsewhere."""
        size = len(self.layers)
        grid = np.full((size, size), np.nan)
        for n in range(1, size + 1):
            grid[n - 1, : size - n + 1] = self.distances(n, over)
        return grid

    def split(self) -> Split | None:
        """Prelude, core and coda by the knees of the mean angular distance of single visits (ETD, 2510.07358).

        The prelude ends at the knee from the front, the coda begins after the knee from the back; both are read off the
        whole curve. None when there is no core between them, or nothing around it. The paper gives no code: which side
        of the knee its layer belongs to is our choice (the core's).
        """
        curve = self.distances(1, "all")
        front, back = knee(curve), knee(curve[::-1])
        if front is None or back is None:
            return None
        core = len(curve) - front - back
        return Split(prelude=front, core=core, coda=back) if core > 0 and front + back > 0 else None

    def to_json(self) -> dict[str, Any]:
        """All arrays as lists."""
        split = self.split()
        return {
            "layers": list(self.layers),
            "rows": self.rows,
            "tokens": self.tokens,
            "split": None if split is None else [split.prelude, split.core, split.coda],
            **{
                name: as_lists(getattr(self, name))
                for name in ("influence", "state_cosine", "update_cosine", "angle", "last_angle")
            },
        }


def knee(curve: np.ndarray) -> int | None:
    """Index of the knee of a curve that falls and then flattens (Kneedle, Satopaa et al. 2011, without smoothing).

    With both axes scaled to 0 .. 1 it is the point farthest below the line from (0, 1) to (1, 0). None for fewer than
    three points, for a flat curve, and when no point lies below the line.
    """
    values = np.asarray(curve, float)
    low, high = values.min(initial=np.inf), values.max(initial=-np.inf)
    if len(values) < 3 or not high > low:
        return None
    below = 1 - np.linspace(0, 1, len(values)) - (values - low) / (high - low)
    found = int(below.argmax())
    return found if below[found] > 1e-12 else None


def influence(model: nn.Module, batches: Iterable[Batch]) -> Influence:
    """Measure a model on some text, in eval mode without gradient.

    Args:
        model: a causal language model; under a plan, visits take the place of layers.
        batches: int64 token ids `[B, T]`, or mappings with `input_ids` and maybe `attention_mask` of that shape, 1 for
            tokens and 0 for padding on either side.

    Raises:
        ValueError: no batches, a row of nothing but padding, a model that has no decoder layers or is an
            encoder-decoder, layers that are not called once and in order, states that are no numbers.
    """
    sums: _Sums | None = None
    layers: tuple[int, ...] = ()
    with eval_mode(model), _boundaries(model) as (states, order):
        for ids_BT, mask_BT in read_batches(model, batches):
            states.clear()
            order.clear()
            call(model, ids_BT, mask_BT, logits_to_keep=1)
            layers = tuple(order)
            if sums is not None and len(states) != len(sums.angle):
                raise ValueError("the number of visits differs between batches: fix the depth first")
            sums = sums or _Sums(len(states))
            sums.add(states, mask_BT.bool())
    if sums is None:
        raise ValueError("there is no batch to measure: give at least one row of tokens")
    cosine = sums.cosine / sums.tokens
    return Influence(
        layers=layers,
        rows=sums.rows,
        tokens=sums.tokens,
        influence=1 - np.diagonal(cosine, 1),
        state_cosine=cosine,
        update_cosine=sums.update / sums.tokens,
        angle=sums.angle / sums.tokens,
        last_angle=sums.last_angle / sums.rows,
    )


def read_batches(model: nn.Module, batches: Iterable[Batch]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, mask) of every batch, int64 `[B, T]` on the model's device; ValueError for anything else."""
    device = next(model.parameters()).device
    for batch in batches:
        ids_BT = batch["input_ids"] if isinstance(batch, Mapping) else batch
        mask_BT = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
        if ids_BT.ndim != 2 or ids_BT.is_floating_point() or mask_BT.shape != ids_BT.shape:
            shapes = f"{list(ids_BT.shape)} and {list(mask_BT.shape)}"
            raise ValueError(f"token ids and mask must be whole numbers of one shape [B, T], got {shapes}")
        if not ids_BT.numel() or not mask_BT.bool().any(1).all():
            raise ValueError("a row holds no token: leave it out")
        yield ids_BT.long().to(device), mask_BT.long().to(device)


def call(model: nn.Module, ids_BT: torch.Tensor, mask_BT: torch.Tensor, **wanted: Any) -> Any:
    """One forward without a cache; positions count tokens, not padding. `wanted` is given where the model takes it."""
    takes = inspect.signature(model.forward).parameters
    options = dict(getattr(model, "causal_options", {}))  # a model that may look ahead must not do so here
    options |= {name: value for name, value in wanted.items() if name in takes}
    if not mask_BT.all():
        options["attention_mask"] = mask_BT
        if "position_ids" in takes:
            options["position_ids"] = (mask_BT.cumsum(1) - 1).clamp(min=0)
    return model(input_ids=ids_BT, use_cache=False, **options)


class _Watch:
    """A hook of the executor that keeps the state at every boundary."""

    def __init__(self, states: list[torch.Tensor], order: list[int]):
        self.states, self.order = states, order

    def before(self, visit: Visit, state_BTD: torch.Tensor) -> Visit:
        if not self.states:
            self.states.append(state_BTD)
        return visit

    def after(self, visit: Visit, before_BTD: torch.Tensor, state_BTD: torch.Tensor) -> torch.Tensor:
        self.order.append(visit.slot.layer)
        self.states.append(state_BTD)
        return state_BTD


@contextmanager
def _boundaries(model: nn.Module) -> Iterator[tuple[list[torch.Tensor], list[int]]]:
    """The states at the boundaries of the last forward, and the layers visited, while the block lasts."""
    states: list[torch.Tensor] = []
    order: list[int] = []
    layers, looping = layer_list(model).layers, looping_of(model)
    if looping is not None:
        own = looping.hooks
        looping.hooks = [*own, _Watch(states, order)]
        try:
            yield states, order
        finally:
            looping.hooks = own
        return

    def note(index: int) -> Any:
        def hook(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            if index != len(order):
                raise ValueError(
                    f"{type(model).__name__} does not call its layers once and in order: attach a plan, if it takes one"
                )
            if index == 0:
                states.append(args[0] if args else kwargs["hidden_states"])
            order.append(index)
            states.append(output if isinstance(output, torch.Tensor) else output[0])

        return hook

    handles = [layer.register_forward_hook(note(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        yield states, order
    finally:
        for handle in handles:
            handle.remove()


class _Sums:
    """Sums over tokens, float64."""

    def __init__(self, num_states: int):
        self.rows = self.tokens = 0
        self.cosine, self.angle, self.last_angle = (np.zeros((num_states, num_states)) for _ in range(3))
        self.update = np.zeros((num_states - 1, num_states - 1))

    def add(self, states: list[torch.Tensor], mask_BT: torch.Tensor) -> None:
        """Add the tokens of one batch."""
        # Some carry several streams, before the batch (Gemma-3n) or after the tokens: together they are the state.
        before = (state.ndim == 4 and state.shape[:2] != mask_BT.shape for state in states)
        states = [state.movedim(0, 2) if moved else state for state, moved in zip(states, before, strict=True)]
        if any(state.shape[:2] != mask_BT.shape for state in states):
            raise ValueError("the layers' states are not [B, T, ...] of the given tokens")
        positions = torch.arange(mask_BT.shape[1], device=mask_BT.device)
        is_last_BT = positions == (mask_BT * positions).argmax(1, keepdim=True)
        is_last_N = is_last_BT[mask_BT]
        flat = [state[mask_BT].flatten(1) for state in states]
        size = max(1, CHUNK // sum(state.shape[1] for state in flat))
        for start in range(0, len(is_last_N), size):
            part = slice(start, start + size)
            # Small angles need float64: near 1, arccos of a float32 cosine is wrong by 1e-4 of a half turn.
            states_NSD = torch.stack([state[part].to("cpu", torch.float64) for state in flat], dim=1)
            if not states_NSD.isfinite().all():
                raise ValueError("the hidden states are not finite: the model does not run in this number type")
            cosine_NSS = _cosines(states_NSD)
            angle_NSS = cosine_NSS.arccos() / torch.pi
            self.cosine += cosine_NSS.sum(0).numpy()
            self.angle += angle_NSS.sum(0).numpy()
            self.last_angle += angle_NSS[is_last_N[part].cpu()].sum(0).numpy()
            self.update += _cosines(states_NSD.diff(dim=1)).sum(0).numpy()
        self.tokens += len(is_last_N)
        self.rows += len(mask_BT)


def _cosines(vectors_NSD: torch.Tensor) -> torch.Tensor:
    """Cosines of all pairs, `[N, S, S]`; 0 with a vector of zeros."""
    unit_NSD = torch.nn.functional.normalize(vectors_NSD, dim=-1, eps=1e-300)
    return (unit_NSD @ unit_NSD.mT).clamp(-1, 1)
