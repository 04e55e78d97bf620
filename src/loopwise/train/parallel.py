"""Sharding, replication, compilation and activation checkpointing: functions over a model that has a plan.

They change the model in place and return it; its class goes on answering to the same calls, and parameters keep their
names. An order that works: `compile_blocks`, `checkpoint_loops`, then `shard` or `replicate`.

A step on several ranks, whose losses are divided by the number of targets of *all* ranks:

    for micro in all but the last:  with without_sync(model): loss(micro).backward()
    loss(last).backward();  finish_backward(model);  clip, optimizer step

Gradients are summed over ranks, not averaged, so that the sum is that of one process with the same micro-batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from loopwise.models.attach import plan_of
from loopwise.models.playing import Looping, looping_of
from loopwise.models.recompute import Recompute
from loopwise.plan.plans import Plan

_BUCKET = 25_000_000  # elements that are summed in one go: enough to hide latency, little beside the gradients


def shard(model: nn.Module, mesh: DeviceMesh | None = None, *, param_dtype: torch.dtype | None = None) -> nn.Module:
    """Spread parameters, gradients and so optimizer moments over the ranks (FSDP2), the looped core as one unit.

    The units are the layers that loops visit, those before, those after, and the rest (embeddings, loops, norms, head,
    layers that no visit reaches). A unit is gathered once a step, however many iterations its layers run; without loops
    every layer is a unit. Parameters become DTensors. They stay gathered until `finish_backward`, or `reshard`, so that
    ranks may run different numbers of iterations or generate texts of different lengths (`synced_gpus=False`).

    Args:
        model: with a plan; on every rank with the same parameters.
        mesh: of one axis; None is all ranks.
        param_dtype: number type of computation, such as bfloat16; gradients are summed in float32, and states stay of
            the type that they have. None computes in that of the parameters.

    Raises:
        ValueError: the model has no plan, or torch.distributed was not started.
    """
    looping, layers = _layers(model)
    _require_process_group("shard")
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = policy if param_dtype is not None else MixedPrecisionPolicy(cast_forward_inputs=False)
    for unit in units_of(looping.plan):
        fully_shard([layers[index] for index in unit], mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    root = cast(FSDPModule, model)
    # A unit is left after every iteration of the backward pass, too: resharding there would gather it again each time.
    root.set_reshard_after_backward(False)
    for unit in _sharded(model):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no other, and a sum is what is wanted
    return model


def units_of(plan: Plan) -> list[list[int]]:
    """The layers of each unit that `shard` makes, in order; layers that are not visited are in none."""
    visits = Counter(plan.layers)
    core = {slot.layer for slot in plan.slots if slot.iterations} | {n for n, count in visits.items() if count > 1}
    if not core:
        return [[layer] for layer in plan.unique_layers]
    first = next(at for at, layer in enumerate(plan.layers) if layer in core)
    before = [layer for layer in plan.layers[:first] if layer not in core]
    after = [layer for layer in plan.layers[first:] if layer not in core]
    return [unit for unit in (before, sorted(core), after) if unit]


def replicate(model: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Start from the same model on every rank: parameters and buffers become those of the first rank.

    The gradients are summed by `finish_backward`, once a step. A wrapper that sums them during the backward pass would
    gain little here (the gradient of a looped layer is complete only when the pass has reached its first visit) and
    would change the names of parameters.

    Raises:
        ValueError: torch.distributed was not started.
    """
    _require_process_group("replicate")
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.data, group=group, group_src=0)
    return model


@contextmanager
def without_sync(model: nn.Module) -> Iterator[None]:
    """Backward passes in this context keep their gradients on their rank, for the next one to add to."""
    units = _sharded(model)
    for unit in units:
        unit.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            unit.set_requires_gradient_sync(True, recurse=False)


def finish_backward(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """After the last backward pass of a step: every `grad` is the sum over the ranks, and shards are shards again.

    A parameter that no rank has a gradient for is left without one. One process has nothing to do.
    """
    if _sharded(model):
        reshard(model)
    elif dist.is_initialized() and dist.get_world_size(group) > 1:
        _sum_gradients(model, group)


def reshard(model: nn.Module) -> None:
    """Free the gathered parameters of a sharded model, as after an evaluation; nothing to do for others."""
    for unit in _sharded(model):
        unit.reshard()


def agree_on_loops(model: nn.Module, loops: int | Mapping[str, int] | None = None) -> None:
    """Make sure that all ranks are about to run the same iterations, which sums of gradients take for granted.

    Raises:
        ValueError: they differ.
    """
    plan = _layers(model)[0].plan.with_loops(loops)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    device = next(model.parameters()).device
    mine = torch.tensor([plan.num_slots, *plan.counts.values()], device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    for rank, theirs in enumerate(everyone):
        if not torch.equal(theirs, everyone[0]):
            counts = [dict(zip(("visits", *plan.counts), row.tolist(), strict=True)) for row in (everyone[0], theirs)]
            raise ValueError(
                f"loops differ between ranks: {counts[0]} on rank 0, {counts[1]} on rank {rank}; draw them from a seed "
                "that all ranks share"
            )


def compile_blocks(model: nn.Module, *, backend: str = "inductor", **options: Any) -> nn.Module:
    """Compile every layer, in place; the loop over them stays Python, so that no number of iterations recompiles.

    Args:
        model: with a plan.
        backend: of torch.compile.
        **options: further arguments of torch.compile.

    Raises:
        ValueError: the model has no plan, or the backend needs a C++ compiler and there is none.
    """
    _, layers = _layers(model)
    if backend == "inductor" and next(model.parameters()).device.type == "cpu":
        _require_compiler()
    for layer in layers:
        layer.compile(backend=backend, **options)
    return model


def checkpoint_loops(model: nn.Module, loop: str | None = None) -> nn.Module:
    """Keep one state per iteration instead of its activations, and run it again in the backward pass.

    See `loopwise.models.recompute`. Calls that record a gradient then make no cache.

    Args:
        model: with a plan.
        loop: name of the loop whose iterations are the units; None takes the outermost loops.

    Raises:
        ValueError: the model has no plan, no such loop, or gradient checkpointing of its own switched on.
    """
    looping, _ = _layers(model)
    if loop is not None and loop not in looping.plan.loops:
        raise ValueError(f"checkpoint_loops: the plan {looping.plan} has no loop {loop!r}")
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            "gradient_checkpointing is enabled on this model, which would run layers a third time: call "
            "gradient_checkpointing_disable() first"
        )
    looping.recompute = Recompute(loop=loop)
    return model


@dataclass
class Collectives:
    """How many collective operations were issued on this rank.

    Attributes:
        by_name: number by the name of the operation.
    """

    by_name: Counter[str] = field(default_factory=Counter)

    @property
    def all_gathers(self) -> int:
        """Gathers of parameters."""
        return self._count("allgather", "all_gather")

    @property
    def reduce_scatters(self) -> int:
        """Sums of gradients of which every rank keeps a part."""
        return self._count("reduce_scatter")

    @property
    def all_reduces(self) -> int:
        """Sums that every rank keeps."""
        return self._count("allreduce", "all_reduce")

    def _count(self, *stems: str) -> int:
        return sum(count for name, count in self.by_name.items() if name.strip("_").startswith(stems))


@contextmanager
def count_collectives() -> Iterator[Collectives]:
    """Count the collective operations of this rank, forward and backward."""
    found = Collectives()
    with _Listener(found):
        yield found


class _Listener(TorchDispatchMode):
    def __init__(self, found: Collectives):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._opname
            self.found.by_name[name] += name != "wait_tensor"
        return func(*args, **(kwargs or {}))


def _layers(model: nn.Module) -> tuple[Looping, nn.ModuleList]:
    looping = looping_of(model)
    if looping is None or plan_of(model) is None:
        raise ValueError("this model has no plan: use loopwise.attach(model, plan) first")
    owner = next(module for module in model.modules() if module.__dict__.get("loopwise") is looping)
    return looping, cast(nn.ModuleList, owner._modules[looping.name])


def _sharded(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _require_process_group(name: str) -> None:
    if not dist.is_initialized():
        raise ValueError(f"{name} needs torch.distributed: start the program with torchrun")


def _require_compiler() -> None:
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise ValueError(
            "backend='inductor' needs a C++ compiler on a CPU and there is none: install g++, or use compile=false"
        ) from None


def _sum_gradients(model: nn.Module, group: dist.ProcessGroup | None) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        return
    device = parameters[0].device
    had = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32, device=device)
    dist.all_reduce(had, group=group)
    grads = []
    for parameter, num_ranks in zip(parameters, had.tolist(), strict=True):
        if num_ranks and parameter.grad is None:  # such as an expert that only other ranks' tokens reached
            parameter.grad = torch.zeros_like(parameter)
        if num_ranks:
            grads.append(cast(torch.Tensor, parameter.grad))
    for bucket in _buckets(grads):
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        dist.all_reduce(flat, group=group)
        for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(part.view_as(grad))


def _buckets(grads: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Gradients of one number type, in order, as many as fit."""
    bucket: list[torch.Tensor] = []
    for grad in grads:
        if bucket and (grad.dtype != bucket[0].dtype or sum(map(torch.Tensor.numel, bucket)) + grad.numel() > _BUCKET):
            yield bucket
            bucket = []
        bucket.append(grad)
    if bucket:
        yield bucket
