"""LiGO: a larger model whose tensors are learned linear maps of a smaller one's (2303.00980).

    W_l = [I; B_out] (sum_j w_lj W_j) [I; B_in]^T

w are depth coefficients, for every new layer l and every tensor of a layer; B are rows that make new units out of old
ones: one for the channels of the whole model, one for the MLP units of every layer. Vectors (biases, gains of norms)
and embeddings have the same maps. Only w and B are fitted, for a few steps; what comes out is a plain model.

As in the published code the first w are those of stacking plus noise, `(onehot(l mod L) + U(0, 0.03))` normalised, and
the first rows of B are uniform, normalised to sum 1; both readers and writers use [I; B] as it is, so the function is
not kept: the fit finds it again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from loopwise.edit.axes import Axes, Axis, Part, find_axes, fitting_heads, resized, saved_tensors, sizes_of
from loopwise.edit.expand import generator
from loopwise.edit.twin import build_twin, refuse_unfit
from loopwise.models.attach import eval_mode, plan_of
from loopwise.models.hub import base_model, layer_list
from loopwise.models.realise import LayerNames, rebuild
from loopwise.plan import Plan

_DEPTH_NOISE = 0.03

Batch = torch.Tensor | Mapping[str, torch.Tensor]


def mix(
    model: nn.Module,
    *,
    num_layers: int | None = None,
    hidden: int | None = None,
    mlp: int | None = None,
    batches: Iterable[Batch],
    steps: int = 100,
    lr: float = 0.01,
    seed: int = 0,
) -> tuple[nn.Module, list[float]]:
    """A larger model made by a learned mix of the layers and units of a smaller one.

    Args:
        model: a causal language model without loops; it is not changed.
        num_layers: new number of layers; None keeps it, as for the other sizes.
        hidden: new width. The size of a head stays; types that derive it from the width take whole multiples.
        mlp: new number of MLP units.
        batches: token ids, int64 `[B, T]`, or keyword arguments of the model with `labels`; gone through again when
            they end.
        steps: optimizer steps (AdamW, no weight decay) on the coefficients, 100 as published.
        lr: their learning rate.
        seed: of the first coefficients.

    Returns:
        The new model, plain, with the dtypes and mode of the old one; and the loss before every step.

    Raises:
        ValueError: a size that shrinks, nothing to grow, no batch, a model with a looped plan, or one that `widen`
            refuses for what it carries.
    """
    kept = list(batches)
    if steps < 0:
        raise ValueError(f"mix: steps={steps} must be at least 0")
    if steps and not kept:
        raise ValueError("mix: batches is empty: give at least one batch of token ids")
    learned = LearnedMix(model, num_layers=num_layers, hidden=hidden, mlp=mlp, seed=seed)
    history = learned.fit(itertools.cycle(kept), steps=steps, lr=lr)
    return learned.bake(), history


class LearnedMix(nn.Module):
    """The operator of a `mix`: its parameters are the coefficients, `tensors()` are the larger model's parameters.

    Parameters: `depth`, per tensor of a layer `[L_new, L_old]`; `width`, per dimension `[N_new - N_old, N_old]`. The
    old model's tensors are read where they are, and not trained.
    """

    base: Any
    twin: Any

    def __init__(
        self,
        model: nn.Module,
        *,
        num_layers: int | None = None,
        hidden: int | None = None,
        mlp: int | None = None,
        seed: int = 0,
    ):
        super().__init__()
        refuse_unfit(model)
        base = base_model(model)
        old_layers = len(layer_list(base).layers)
        plan = plan_of(model)
        if plan is not None and plan.layers != Plan.identity(old_layers).layers:
            raise ValueError(f"mix needs every layer visited once and in order, the plan is {plan}: untie() it first")
        old = sizes_of(base)
        wanted = {"num_layers": num_layers, "hidden": hidden, "mlp": mlp}
        present = {"num_layers": old_layers} | old
        new = {name: size for name, size in wanted.items() if size is not None}
        for name, size in new.items():
            if name not in present:
                raise ValueError(f"mix: {type(base).__name__} has no size {name!r}")
            if size < present[name]:
                raise ValueError(f"mix: {name}={size} is below the present {present[name]}: a model can only grow")
        new = {name: size for name, size in new.items() if size != present[name]}
        if not new:
            raise ValueError("mix: give at least one of num_layers, hidden, mlp above its present value")
        self.old_layers, self.sources = old_layers, [n % old_layers for n in range(new.pop("num_layers", old_layers))]
        deep = rebuild(base, self.sources)
        config = resized(deep, new | fitting_heads(deep, old, new))
        self.__dict__["twin"] = build_twin(deep, config)
        self.__dict__["base"] = base
        self.axes: Axes = find_axes(deep, list(new)) if new else {}
        self.names = LayerNames(deep)
        self._check_shapes(old, new)
        self.depth = nn.ParameterDict(self._depth(seed))
        self.width = nn.ParameterDict(self._width(old, new, seed))
        self._copy_buffers(deep)

    def _check_shapes(self, old: Mapping[str, int], new: Mapping[str, int]) -> None:
        unknown = {part.dimension for own in self.axes.values() for axis in own if axis for part in axis.parts}
        if unknown - new.keys():
            raise ValueError(f"mix: {type(self.base).__name__} has fewer kv heads, which grow along: use widen")
        tensors = dict(self.base.named_parameters(remove_duplicate=False))
        for name, tensor in self.twin.named_parameters():
            shape = list(tensors[self.names.source(name, self.sources)].shape)
            for number, axis in enumerate(self.axes.get(name, ())):
                if axis is not None:
                    shape[number] = sum(part.block * self._grown(part, old, new) for part in axis.parts)
            if shape != list(tensor.shape):
                raise ValueError(f"mix: {type(self.base).__name__} has no map for tensor {name} at these sizes")

    @staticmethod
    def _grown(part: Part, old: Mapping[str, int], new: Mapping[str, int]) -> int:
        return part.units + new[part.dimension] - old.get(part.dimension, part.units)

    def _depth(self, seed: int) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        if len(self.sources) == self.old_layers:
            return found
        for name, _ in self.twin.named_parameters():
            parts = self.names.split(name)
            if parts is None:
                continue
            key = _key(parts[0] + parts[2])
            if key not in found:
                noise = torch.rand(len(self.sources), self.old_layers, generator=generator(seed, key)) * _DEPTH_NOISE
                noise[torch.arange(len(self.sources)), torch.tensor(self.sources)] = 1.0
                found[key] = nn.Parameter(noise / noise.sum(1, keepdim=True))
        return found

    def _width(self, old: Mapping[str, int], new: Mapping[str, int], seed: int) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for name, own in self.axes.items():
            for axis in own:
                for part in () if axis is None else axis.parts:
                    key = self._width_key(name, part)
                    if key not in found:
                        rows = self._grown(part, old, new) - part.units
                        drawn = torch.rand(rows, part.units, generator=generator(seed, key))
                        found[key] = nn.Parameter(drawn / drawn.sum(1, keepdim=True))
        return found

    def _width_key(self, name: str, part: Part) -> str:
        parts = self.names.split(name)
        return part.dimension if part.dimension == "hidden" or parts is None else f"{part.dimension}_{parts[1]}"

    def _copy_buffers(self, deep: nn.Module) -> None:
        """Saved buffers are no parameters: they are copied, as far as they keep their shape."""
        old, parameters = saved_tensors(deep), dict(self.twin.named_parameters(remove_duplicate=False))
        for name, tensor in saved_tensors(self.twin).items():
            if name not in parameters:
                if old[name].shape != tensor.shape:
                    raise ValueError(f"mix: {type(self.base).__name__} keeps {name} beside its parameters: use widen")
                tensor.copy_(old[name])

    def tensors(self) -> dict[str, torch.Tensor]:
        """The parameters of the larger model by name, a tied one once; differentiable in the coefficients."""
        old = dict(self.base.named_parameters(remove_duplicate=False))
        found: dict[str, torch.Tensor] = {}
        for name, like in self.twin.named_parameters():
            wide = self._mixed(name, old)
            for number, axis in enumerate(self.axes.get(name, ())):
                if axis is not None:
                    wide = self._expanded(wide, number, name, axis)
            found[name] = wide.to(like.dtype)
        return found

    def _mixed(self, name: str, old: Mapping[str, torch.Tensor]) -> torch.Tensor:
        own = old[self.names.source(name, self.sources)].detach()
        own = own.to(torch.promote_types(own.dtype, torch.float32))
        parts = self.names.split(name)
        if parts is None or not self.depth:
            return own
        prefix, layer, rest = parts
        weights, total = self.depth[_key(prefix + rest)][layer], torch.zeros_like(own)
        for number in range(self.old_layers):
            other = old.get(f"{prefix}{number}.{rest}")
            if other is not None and other.shape == own.shape:  # layers of another kind have no part in it
                total = total + weights[number] * other.detach().to(own.dtype)
        return total

    def _expanded(self, tensor: torch.Tensor, number: int, name: str, axis: Axis) -> torch.Tensor:
        pieces = []
        for part, piece in zip(
            axis.parts, tensor.split([part.units * part.block for part in axis.parts], number), strict=True
        ):
            rows = self.width[self._width_key(name, part)]
            units = piece.unflatten(number, (part.units, part.block))
            extra = torch.tensordot(rows.to(units.dtype), units.movedim(number, 0), dims=1).movedim(0, number)
            pieces.append(torch.cat([units, extra], number).flatten(number, number + 1))
        return torch.cat(pieces, number)

    def forward(self, **kwargs: Any) -> Any:
        """What the larger model gives for keyword arguments of the model, with the present coefficients."""
        return functional_call(self.twin, self.tensors(), args=(), kwargs=kwargs)

    def fit(self, batches: Iterable[Batch], *, steps: int, lr: float) -> list[float]:
        """Take optimizer steps on the coefficients; the loss before each.

        The model is in evaluation mode, so that no global random number is drawn.
        """
        optimizer = torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=0.0)
        history: list[float] = []
        device = next(self.base.parameters()).device
        self.to(device)
        with eval_mode(self.twin), torch.enable_grad():
            for batch in itertools.islice(batches, steps):
                given = {"input_ids": batch, "labels": batch} if isinstance(batch, torch.Tensor) else batch
                loss = self(**{name: value.to(device) for name, value in given.items()}).loss
                if loss is None:
                    raise ValueError("mix: a batch has no labels: give token ids, or labels beside them")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                history.append(loss.item())
        return history

    @torch.no_grad()
    def bake(self) -> nn.Module:
        """The larger model with the present coefficients, plain."""
        made = self.tensors()
        for name, parameter in self.twin.named_parameters():
            parameter.copy_(made[name])
        return self.twin.train(self.base.training)


def _key(name: str) -> str:
    """A name that a `ParameterDict` takes."""
    return name.replace(".", "_")
