"""What a training step costs: over a hand-written loop of the same model, and how time and memory grow with iterations.

A step of a run (data, loop counts, forward, backward, clipping, optimizer, metrics) is set against the same blocks
called one after the other in a Python loop, with cross-entropy, clipping and AdamW of torch; both draw the same rows
and must find the same losses. Memory is counted twice: bytes that autograd saves in a forward pass, and the peak of a
fresh process. `--scale gpu` does the same with larger models in bfloat16, and gives tokens/s, utilisation and loss.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _timing import RESULTS, finish, interleaved_pairs, median_ratio, parser, ratio_entry, seconds

from loopwise.loop.depth import FixedDepth
from loopwise.loop.update import ConcatConfig
from loopwise.models.rotary import rotary_tables
from loopwise.tasks.cycle_walk import CycleWalk
from loopwise.train.batch import IGNORE
from loopwise.train.config import RunConfig
from loopwise.train.data.generated import TaskData
from loopwise.train.data.text import TextData
from loopwise.train.memory import held_bytes, peak_bytes, reset_peak
from loopwise.train.models import DecoderModel, Loop
from loopwise.train.optim import AdamWConfig, ConstantSchedule
from loopwise.train.run import Run

MAX_OVERHEAD = 1.05
MAX_GROWTH = 1.05
MIN_UTILISATION = 0.45
WINDOW = 4
LOOPS = (1, 2, 4, 8, 16)
MEMORY_REPEATS = 3
LOSS_STEPS = 5
# Dense bfloat16 FLOP/s by a part of the device's name, from the makers' data sheets; the first that fits counts.
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12}
NEVER = 10**9

Entry = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Point:
    """A training step that is measured by itself.

    Attributes:
        loops: iterations of the core.
        variant: which of them carry a gradient, and whether they are run again.
        scale: "cpu" or "gpu".
    """

    loops: int
    variant: str
    scale: str = "cpu"

    def config(self) -> RunConfig:
        """A run at these loop counts whose activations weigh far more than its parameters.

        The input re-enters every iteration, so that the first layer is trained whatever the window is.
        """
        width, length, rows = (128, 128, 8) if self.scale == "cpu" else (1024, 1024, 8)
        plan, loop = f"0 core:(1)x{self.loops} 2", Loop(update=ConcatConfig())
        model = DecoderModel(layers=3, width=width, heads=width // 64, plan=plan, loop=loop)
        depth = FixedDepth(total=self.loops, max_grad=WINDOW) if self.variant == "window" else None
        values = {"depth": depth, "checkpoint_loops": self.variant == "recomputed"}
        return training("point", model, TextData(length=length), rows, self.scale, **values)


VARIANTS = {"full": "full gradient", "window": f"window of {WINDOW}", "recomputed": "recomputed iterations"}


def training(name: str, model: DecoderModel, data: Any, rows: int, scale: str, **values: Any) -> RunConfig:
    """A run without end that only trains."""
    optimizer = AdamWConfig(fused=scale == "gpu")
    precision = "bfloat16" if scale == "gpu" else "float32"
    fixed = {"steps": NEVER, "optimizer": optimizer, "schedule": ConstantSchedule(), "precision": precision}
    return RunConfig(name=name, model=model, data=data, batch_size=rows, **(fixed | values))


def sizes(scale: str, compiled: bool = False) -> dict[str, tuple[RunConfig, int]]:
    """The runs that are set against a hand-written loop, and how many steps make a measurement."""
    if scale == "gpu":
        model = DecoderModel(layers=16, width=768, heads=12, plan="0-3 core:(4-11)x4 12-15", tie_embeddings=True)
        return {"100M": (training("100M", model, TextData(length=1024), 16, scale, compile=compiled), 4)}
    small = DecoderModel(layers=1, width=64, heads=4, plan="core:(0)x4")
    medium = DecoderModel(layers=4, width=256, heads=4, plan="0 core:(1-2)x3 3")
    return {
        "small": (training("small", small, TaskData(task=CycleWalk()), 64, scale), 5),
        "medium": (training("medium", medium, TextData(length=256), 8, scale), 1),
    }


class HandWritten:
    """The step of one model as one would write it for this model alone.

    Nothing of the library is called but the blocks (compiled where the run's are), their norm, the rotary tables and
    the source of rows.
    """

    def __init__(self, config: RunConfig):
        run = Run(config, None)
        self.config, self.source, self.device = config, run.source, run.world.device
        self.embed, self.norm, self.head = run.model.model.embed_tokens, run.model.model.norm, run.model.lm_head
        layers = run.model.model.layers
        self.visits = [layers[index] for index in run.model.model.loopwise.plan.layers]
        self.rope = layers[0].block_config.mixer.rope
        self.parameters = list(run.model.parameters())
        decaying = [p for p in self.parameters if p.ndim >= 2 and p is not self.embed.weight]
        others = [p for p in self.parameters if p.ndim < 2 or p is self.embed.weight]
        adamw: Any = config.optimizer
        self.optimizer = torch.optim.AdamW(
            [{"params": decaying}, {"params": others, "weight_decay": 0.0}],
            lr=adamw.lr,
            betas=(adamw.beta1, adamw.beta2),
            eps=adamw.eps,
            weight_decay=adamw.weight_decay,
            fused=adamw.fused or None,
        )
        self.first = 0

    def step(self) -> float:
        """One step; returns its loss."""
        batch = self.source.batch(self.first, self.config.batch_size)
        self.first += self.config.batch_size
        tokens, targets = batch.tokens_BT.to(self.device), batch.targets_BT.to(self.device)
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            tables = rotary_tables(torch.arange(tokens.shape[1], device=self.device)[None], self.rope)
            state = self.embed(tokens)
            for layer in self.visits:
                state = layer(state, position_embeddings=tables)
            logits = self.head(self.norm(state))
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self.optimizer.step()
        return loss.item()


@contextmanager
def endless(config: RunConfig) -> Iterator[tuple[Run, Callable[[], dict[str, Any]]]]:
    """A run in a folder that lasts as long as the block, with metrics as any run has; and its next step."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(config, Path(folder) / "run")
        steps = run.train()
        yield run, lambda: next(steps)
        run.close()


def several(step: Callable[[], object], number: int) -> Callable[[], float]:
    """A measurement: seconds of a step, the mean of some."""

    def work() -> None:
        for _ in range(number):
            step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return lambda: seconds(work) / number


def overhead_entries(name: str, config: RunConfig, number: int, pairs: int, peak: float | None) -> list[Entry]:
    """The step of a run over the hand-written one; with a peak, also what the run makes of the device."""
    hand = HandWritten(config)
    with endless(config) as (run, step):
        ours, theirs = [step()["loss"] for _ in range(LOSS_STEPS)], [hand.step() for _ in range(LOSS_STEPS)]
        check_losses(name, ours, theirs, tolerance=1e-4 if config.precision == "float32" else 3e-2)
        print(f"{name}: {run.source.describe()}, {config.batch_size} rows, {pairs} pairs", flush=True)
        times = interleaved_pairs(several(step, number), several(hand.step, number), pairs=pairs)
        entries = [ratio_entry(f"{name}: step over a hand-written loop", times, target=MAX_OVERHEAD)]
        values = step()
        if peak is None:
            return entries
        tokens, flops = values["tokens"] / values["step"], values["flops"] / values["step"]
        median, (low, high) = median_ratio([(ours, 1.0) for ours, _ in times])
        speeds, used = ([part / at for at in (median, high, low)] for part in (tokens, flops / peak))
        return [
            *entries,
            value_entry(f"{name}: tokens/s", speeds[0], speeds[1:]),
            value_entry(f"{name}: model FLOPs utilisation", used[0], used[1:], least=MIN_UTILISATION),
            value_entry(f"{name}: loss after {values['step']} steps", values["loss"], [values["loss"]] * 2),
        ]


def check_losses(name: str, ours: list[float], theirs: list[float], *, tolerance: float) -> None:
    """End where the two sides do not compute the same, so that their times mean nothing."""
    if any(abs(a - b) > tolerance * abs(b) for a, b in zip(ours, theirs, strict=True)):
        raise SystemExit(
            f"{name}: the run has losses {ours}, the hand-written loop {theirs}: they are not the same work"
        )


def value_entry(
    name: str, value: float, ci95: list[float], *, most: float | None = None, least: float | None = None
) -> Entry:
    """A result; it holds when its interval lies on the right side of its target, or when it has none."""
    holds = (most is None or ci95[1] <= most) and (least is None or ci95[0] >= least)
    short = [float(f"{number:.5g}") for number in (value, *ci95)]
    return {
        "name": name,
        "value": short[0],
        "ci95": short[1:],
        "target": least if most is None else most,
        "holds": holds,
    }


@contextmanager
def saved_tensors() -> Iterator[dict[int, int]]:
    """Bytes of the storages that autograd saves inside the block, by address; parameters are for the caller to drop."""
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def measure_memory(point: Point) -> dict[str, int]:
    """Bytes of steps in this process: what a forward pass saves for the backward pass; the peak over what was held."""
    run = Run(point.config(), None)
    device, steps = run.world.device, run.train()
    held = held_bytes(device) or 0
    reset_peak(device)
    for _ in range(3):
        next(steps)
    peak = (peak_bytes(device) or 0) - held
    parameters = {parameter.untyped_storage().data_ptr() for parameter in run.model.parameters()}
    with saved_tensors() as found:
        next(steps)
    return {"saved": sum(size for place, size in found.items() if place not in parameters), "peak": peak}


def in_new_process(point: Point) -> dict[str, int]:
    """`measure_memory` where nothing else has used memory before."""
    # A fixed threshold: what torch frees goes back to the system at once, so that resident memory is what is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--point", json.dumps(asdict(point))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{point}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def memory_entries(scale: str, measure: Callable[[Point], dict[str, int]]) -> list[Entry]:
    """Peak memory at every loop count, and what 16 iterations take over 4."""
    entries = []
    for variant, label in VARIANTS.items():
        found: dict[int, list[dict[str, int]]] = {}
        for loops in LOOPS:
            repeats = MEMORY_REPEATS if loops >= WINDOW else 1
            found[loops] = [measure(Point(loops=loops, variant=variant, scale=scale)) for _ in range(repeats)]
            peaks = sorted(each["peak"] for each in found[loops])
            print(f"{label}: {loops} iterations, {found[loops][0]}", flush=True)
            entries.append(
                value_entry(
                    f"{label}: peak bytes at r = {loops}", peaks[len(peaks) // 2], [float(peaks[0]), float(peaks[-1])]
                )
            )
        for what in ("saved", "peak"):
            pairs = itertools.product(found[max(LOOPS)], found[WINDOW])
            ratios = sorted(most[what] / few[what] for most, few in pairs)
            entries.append(
                value_entry(
                    f"{label}: {what} bytes, r = {max(LOOPS)} over {WINDOW}",
                    ratios[len(ratios) // 2],
                    [ratios[0], ratios[-1]],
                    most=MAX_GROWTH if variant == "window" else None,
                )
            )
    return entries


def time_entries(scale: str, rounds: int) -> list[Entry]:
    """Seconds of a step at every loop count; all points once in every round, in an order of its own."""
    points = [Point(loops=loops, variant=variant, scale=scale) for variant in VARIANTS for loops in LOOPS]
    works = {point: several(partial(next, Run(point.config(), None).train()), 1) for point in points}
    for work in works.values():
        work()
    order, times = random.Random(0), {point: [] for point in points}
    for _ in range(rounds):
        for point in order.sample(points, len(points)):
            times[point].append(works[point]())
    entries = []
    for point, found in times.items():
        median, (low, high) = median_ratio([(each, 1.0) for each in found])
        entries.append(value_entry(f"{VARIANTS[point.variant]}: seconds at r = {point.loops}", median, [low, high]))
    return entries


def peak_of(device: str) -> float:
    """Dense bfloat16 FLOP/s of a device by its name.

    Raises:
        SystemExit: an unknown device.
    """
    for part, peak in PEAKS.items():
        if part in device:
            return peak
    raise SystemExit(f"the peak of {device!r} is not known: give it with --peak, in FLOP/s")


def main() -> int:
    options = parser(__doc__.splitlines()[0], "train_step")
    options.add_argument("--scale", choices=["cpu", "gpu"], default="cpu", help="sizes of the models")
    options.add_argument("--only", choices=["overhead", "memory", "time"], help="one of the three parts")
    options.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="on a GPU")
    options.add_argument("--peak", type=float, help="dense bfloat16 FLOP/s of the GPU, where its name does not say")
    options.add_argument("--point", help=argparse.SUPPRESS)
    options.set_defaults(out=None)
    given = options.parse_args()
    if given.point:
        print(json.dumps(measure_memory(Point(**json.loads(given.point)))))
        return 0
    if given.scale == "gpu" and not torch.cuda.is_available():
        raise SystemExit("--scale gpu needs a GPU that torch can use; this machine has none")
    peak = (given.peak or peak_of(torch.cuda.get_device_name())) if given.scale == "gpu" else None
    entries = []
    for name, (config, number) in sizes(given.scale, given.compile).items():
        if given.only in (None, "overhead"):
            entries += overhead_entries(name, config, number, given.pairs, peak)
    if given.only in (None, "memory"):
        entries += memory_entries(given.scale, in_new_process)
    if given.only in (None, "time"):
        entries += time_entries(given.scale, max(5, given.pairs // 4))
    words = " --scale gpu" if given.scale == "gpu" else ""
    words += f" --only {given.only}" if given.only else ""
    out = given.out or RESULTS / ("train_step.json" if given.scale == "cpu" else "train_step_gpu.json")
    return finish(entries, out, f"python benchmarks/train_step.py --pairs {given.pairs}{words}")


if __name__ == "__main__":
    sys.exit(main())
