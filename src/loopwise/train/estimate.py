"""What a run will take, before it is begun: parameters, FLOPs, memory and time.

FLOPs are those of `loopwise.measure.cost_of`, summed over the loop counts that the run will truly draw. Memory and time
are estimates for one process that holds the whole model, good to a factor of two or so:

* Weights, gradients, moments and averages are counted.
* A visit with gradient keeps, for every token, the inputs and outputs of its matmuls, and twice the width of every
  norm (what comes in and the normalised state). Attention is taken as fused: no scores are kept. With recomputed loops
  an iteration keeps only its state, and the visits of one iteration exist at a time. The gradients of these exist for
  one visit at a time.
* Each reading of logits holds three float32 arrays of the size of the logits: themselves, their log-softmax, and the
  gradient.
* Autocast halves what matmuls keep and adds a copy of the weights in bfloat16.
* The time is FLOPs over the throughput of a large matmul, of which training reaches about half, and an overhead for
  every visit, which rules small models.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import nn

from loopwise.io.amounts import amount, duration
from loopwise.loop.depth import LoopCount, LoopCounts
from loopwise.loop.objective import FinalObjective
from loopwise.measure.cost import Cost, cost_of
from loopwise.models.attach import plan_of
from loopwise.models.hub import layer_list
from loopwise.plan import Plan
from loopwise.train.config import RunConfig, Stage
from loopwise.train.growth import Built, build, enter
from loopwise.train.optim import trainable
from loopwise.train.panel import full_depth_share
from loopwise.train.stages import set_trainable
from loopwise.train.world import World

MATMUL_SHARE = 0.5
_VISIT_SECONDS = 0.6e-3  # dispatch of one layer, forward and backward, in eager mode
_STEP_SECONDS = 2e-3
_MOST_DRAWS = 300  # steps of a stage whose loop counts are drawn; the others are taken to be like them


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that one process needs at the peak of a step, besides the interpreter and its libraries."""

    weights: int
    gradients: int
    moments: int
    averages: int
    activations: int

    @property
    def total(self) -> int:
        """The sum: the peak lies at the start of a backward pass, when all of these exist."""
        return self.weights + self.gradients + self.moments + self.averages + self.activations


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run takes.

    Attributes:
        plans: the plan of each stage.
        parameters_unique: elements of all distinct parameters, in the stage that has the most.
        parameters_unrolled: the same with a copy of the layer for every slot.
        parameters_trained: elements that the optimizer moves.
        num_steps: optimizer steps.
        tokens: that the run reads, over all steps.
        flops: of the whole run, forward, backward and recomputation.
        memory: at the peak of the largest step.
        seconds: of the whole run, without evaluation.
        flops_per_second: what the machine was taken to reach in training.
        device: where that was measured, or "given".
        flops_full: what the model of the last stage would take for the same tokens; 0 where that is not known.
    """

    plans: tuple[str, ...]
    parameters_unique: int
    parameters_unrolled: int
    parameters_trained: int
    num_steps: int
    tokens: int
    flops: float
    memory: Memory
    seconds: float
    flops_per_second: float
    device: str
    flops_full: float = 0.0

    @property
    def flops_per_step(self) -> float:
        """Mean over the steps."""
        return self.flops / self.num_steps

    def lines(self) -> list[str]:
        """The estimate for people, a fact per line."""
        memory = self.memory
        parts = {name: getattr(memory, name) for name in ("weights", "gradients", "moments", "averages", "activations")}
        share = full_depth_share(self.flops, self.flops_full)
        spent = f"{amount(self.flops)} in total" if share is None else share
        shown = ", ".join(f"{name} {amount(size, 'B')}" for name, size in parts.items() if size)
        return [
            f"plan        {' -> '.join(self.plans)}",
            f"parameters  {amount(self.parameters_unique)} unique, {amount(self.parameters_unrolled)} unrolled, "
            f"{amount(self.parameters_trained)} trained",
            f"steps       {self.num_steps}, {amount(self.tokens)} tokens",
            f"FLOPs       {amount(self.flops_per_step)} per step, {spent}",
            f"memory      about {amount(memory.total, 'B')}: {shown}",
            f"time        about {duration(self.seconds)} at {amount(self.flops_per_second, 'FLOP/s')} ({self.device})",
        ]


def estimate_run(config: RunConfig, *, device: str = "auto", flops_per_second: float | None = None) -> Estimate:
    """What a run will take. The data is opened, the model is built without memory where it can be, nothing is trained.

    Args:
        config: the run.
        device: whose speed is measured.
        flops_per_second: what training reaches; None measures a matmul for a moment and takes half of it.

    Raises:
        ValueError: whatever the run itself would refuse at its start.
    """
    source = config.data.open(seed=config.seed)
    length = source.batch(0, 1).num_tokens
    try:
        with torch.device("meta"):
            found, final = _stages(config, source.vocab_size, length)
    except Exception:  # checkpoints, and types that compute on their weights: an error of the config comes again here
        found, final = _stages(config, source.vocab_size, length)
    where = World.join(device).device
    speed = flops_per_second or MATMUL_SHARE * matmul_flops(where, config.precision)
    flops = sum(item.flops for item in found)
    visits = sum(item.visits for item in found)
    return Estimate(
        plans=tuple(item.plan for item in found),
        parameters_unique=max(item.cost.parameters_unique for item in found),
        parameters_unrolled=max(item.cost.parameters_unrolled for item in found),
        parameters_trained=max(item.trained for item in found),
        num_steps=config.num_steps,
        tokens=sum(item.tokens for item in found),
        flops=flops,
        memory=max((item.memory for item in found), key=lambda memory: memory.total),
        seconds=flops / speed + visits * _VISIT_SECONDS + config.num_steps * _STEP_SECONDS,
        flops_per_second=speed,
        device="given" if flops_per_second else str(where),
        flops_full=final * sum(item.tokens for item in found),
    )


def _stages(config: RunConfig, vocab_size: int, length: int) -> tuple[list[_Stage], float]:
    """What every stage takes, with the model that its edits make; and FLOPs per token with the last one throughout."""
    built = build(config, vocab_size, -1)
    if config.adapters is not None:
        built = replace(built, model=config.adapters.build(built.model, seed=config.seed))
    parameters, moments = _trained(config, built)
    found, first = [], 0
    for index, stage in enumerate(config.all_stages):
        try:
            built = enter(built, config, index)
            if stage.edit:
                parameters, moments = _trained(config, built)
            set_trainable(parameters, stage.trainable)
        except ValueError as error:
            where = f"stages.{index}: " if config.stages else ""
            raise ValueError(f"{where}{error}") from None
        found.append(_stage(config, stage, built.model, first, length, moments, _bytes(parameters.values())))
        first += stage.steps
    last = replace(config.all_stages[-1], steps=config.num_steps)
    whole = _stage(config, last, built.model, 0, length, 0, 0)
    return found, whole.flops / whole.tokens


def _trained(config: RunConfig, built: Built) -> tuple[dict[str, nn.Parameter], int]:
    """The parameters that a run trains, and the bytes of its optimizer's state."""
    parameters = trainable(built.model)
    return parameters, _bytes(config.optimizer.build(parameters, built.rules).state().values())


def memory_of(
    model: nn.Module,
    cost: Cost,
    *,
    rows: int,
    length: int,
    moments: int,
    averages: int = 0,
    autocast: bool = False,
    recompute: bool = False,
    readings: int = 1,
) -> Memory:
    """Memory of a step, by the formula at the top of this file.

    Args:
        model: with the parameters that are trained marked so; may be on the meta device.
        cost: of the model under the plan of this step; its visits say which of them carry a gradient.
        rows: B of one micro-batch.
        length: T, tokens that the model reads per row.
        moments: bytes of the optimizer's state.
        averages: bytes of averaged weights.
        autocast: whether matmuls run in bfloat16.
        recompute: whether iterations of the outermost loops are run again in the backward pass.
        readings: how many iterations are read as logits.
    """
    parameters = list(model.parameters())
    weights = _bytes(parameters) + _bytes(model.buffers())
    cast = 2 * sum(item.numel() for item in parameters) if autocast else 0
    plan = Plan.parse(cost.plan)
    layers = layer_list(model).layers
    kept = {index: _kept(layers[index], autocast) for index in plan.unique_layers}
    visits = list(zip(plan.slots, cost.visits, strict=True))
    if recompute:
        width = _width(model)
        turns = groupby(visits, key=lambda pair: (pair[0].position[0], pair[0].iterations[:1]))
        per_token, largest = 0, 0
        for (_, iteration), group in turns:
            size = sum(kept[slot.layer] for slot, visit in group if visit.with_grad)
            if iteration and size:
                per_token, largest = per_token + 4 * width, max(largest, size)
            else:
                per_token += size
        per_token += largest
    else:
        per_token = sum(kept[slot.layer] for slot, visit in visits if visit.with_grad)
    per_token += max(kept.values())
    per_token += readings * 3 * 4 * _vocabulary(model)
    return Memory(
        weights=weights,
        gradients=_bytes([item for item in parameters if item.requires_grad]),
        moments=moments,
        averages=averages,
        activations=rows * length * per_token + cast,
    )


def matmul_flops(device: torch.device | str = "cpu", precision: str = "float32", seconds: float = 0.2) -> float:
    """FLOP/s of a square matmul of this precision, measured for about so many seconds."""
    device = torch.device(device)
    size = 4096 if device.type == "cuda" else 512
    a = torch.ones(size, size, device=device, dtype=getattr(torch, precision))
    torch.mm(a, a)

    def finished() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    began, count = finished(), 0
    while (took := finished() - began) < seconds or count == 0:
        torch.mm(a, a)
        count += 1
    return 2 * size**3 * count / took


@dataclass(frozen=True, kw_only=True)
class _Stage:
    plan: str
    cost: Cost
    trained: int
    tokens: int
    flops: float
    visits: float
    memory: Memory


def _stage(
    config: RunConfig, stage: Stage, model: nn.Module, first: int, length: int, moments: int, averages: int
) -> _Stage:
    rows = stage.batch_size or config.batch_size
    micro = min(rows, config.micro_batch or rows)
    plan = plan_of(model)
    assert plan is not None
    recompute = config.checkpoint_loops and bool(plan.loops)
    reads_all = not isinstance(stage.objective or config.objective, FinalObjective)
    costs: dict[tuple[int | None, int | None], Cost] = {}

    def cost(total: int | None, grad: int | None) -> Cost:
        """As the run counts it."""
        if (total, grad) not in costs:
            under = plan if total is None else plan.with_loops(total)
            window = None if total is None or grad == total else grad
            again = "loop" if recompute else False
            costs[total, grad] = cost_of(model, under, context=length, grad_iterations=window, recompute=again)
        return costs[total, grad]

    draws = list(_draws(config, stage, first, rows))
    flops = [sum(cost(*pair).training_flops_per_token for pair in pairs) / len(pairs) for pairs in draws]
    visits = [max(cost(*pair).num_slots for pair in pairs) for pairs in draws]
    memories = [
        memory_of(
            model,
            each,
            rows=micro,
            length=length,
            moments=moments,
            averages=averages if config.ema else 0,
            autocast=config.precision == "bfloat16",
            recompute=recompute,
            readings=(grad or _iterations(each)) if reads_all else 1,
        )
        for (_, grad), each in costs.items()
    ]
    tokens = rows * length
    return _Stage(
        plan=str(plan),
        cost=cost(None, None),
        trained=sum(item.numel() for item in model.parameters() if item.requires_grad),
        tokens=tokens * stage.steps,
        flops=sum(flops) / len(flops) * tokens * stage.steps,
        visits=sum(visits) / len(visits) * stage.steps * -(-rows // micro),
        memory=max(memories, key=lambda memory: memory.total),
    )


def _draws(config: RunConfig, stage: Stage, first: int, rows: int) -> Iterator[list[tuple[int | None, int | None]]]:
    """(iterations, iterations with gradient) of the rows of some steps; one pair where all rows have the same."""
    depth = stage.depth or config.depth
    if depth is None:
        yield [(None, None)]
        return
    for step in range(first, first + stage.steps, max(1, stage.steps // _MOST_DRAWS)):
        count: LoopCount | LoopCounts = depth.sample(step, seed=config.seed, batch=rows)
        if isinstance(count, LoopCount):
            yield [(count.total, count.grad)]
        else:
            yield list(zip(count.total_B.tolist(), count.grad_B.tolist(), strict=True))


def _iterations(cost: Cost) -> int:
    """How many iterations of the outermost loops a plan has."""
    slots = Plan.parse(cost.plan).slots
    return max(1, len({(slot.position[0], slot.iterations[:1]) for slot in slots if slot.iterations}))


def _kept(layer: nn.Module, autocast: bool) -> int:
    """Bytes per token that a visit with gradient keeps."""
    total = 0
    for module in layer.modules():
        norm = type(module).__name__.endswith("Norm")
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 2:
                total += sum(parameter.shape) * (2 if autocast else parameter.element_size())
            elif norm and name.endswith("weight"):
                total += 2 * parameter.numel() * 4
    return total


def _vocabulary(model: nn.Module) -> int:
    """Rows of the output head, 0 where there is none."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return 0 if head is None else head.weight.shape[0]


def _width(model: nn.Module) -> int:
    return int(getattr(getattr(model, "config", None), "hidden_size", 0) or 0)


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
