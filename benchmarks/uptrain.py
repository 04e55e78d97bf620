"""How much of what sharing layers costs comes back by training: SmolLM2-135M with half its unique layers.

Four arms read the same tokens in the same order, in equal steps, each on one thread:

    relaxed           recursive, 28 middle layers become 14 that run twice, each the mean of two, with low-rank offsets
                      for every visit; healed
    relaxed_stepwise  the same, but each shared layer is one of the two
    tied              the same layers as relaxed_stepwise without offsets; healed
    source            SmolLM2 itself, trained on the same tokens, so that what the text teaches is not taken for healing

The mean is the start that 2410.20672 found best for offsets, one of the two that for none.

Every arm does what `loopwise edit` and `loopwise uptrain` do, can be run alone (`--arm relaxed`), goes on where it was
stopped, and leaves losses row by row. With all three there, the results are written: the share of the held-out gap
between the edited model and the *trained* source that was closed, with bootstrap intervals over rows.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _timing import RESULTS, finish

import loopwise
from loopwise.cli.common import quiet_libraries
from loopwise.cli.main import main as command
from loopwise.cli.main import one_line
from loopwise.io.atomic import write_text
from loopwise.models.attach import attach, plan_of
from loopwise.models.hub import layer_list
from loopwise.plan import Plan
from loopwise.train.config import read_config
from loopwise.train.data.source import Source
from loopwise.train.evaluate import evaluating, predict
from loopwise.train.metrics import read_metrics
from loopwise.train.run import CONFIG, METRICS

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo import find_weights

MIN_CLOSED = 0.30
LENGTH, ROWS, SCORED = 256, 2, 64
RANK = 64
RESAMPLES = 5000


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One side of the comparison.

    Attributes:
        operator: the edit; empty trains the source.
        words: what is not as `loopwise uptrain` has it by itself.
    """

    operator: str = ""
    words: tuple[str, ...] = ()


ARMS = {
    "relaxed": Arm(operator=f"recursive(2, middle_cycle, average, rank={RANK})", words=("optimizer.lr=3e-4",)),
    "relaxed_stepwise": Arm(
        operator=f"recursive(2, middle_cycle, stepwise, rank={RANK})", words=("optimizer.lr=3e-4",)
    ),
    "tied": Arm(operator="recursive(2, middle_cycle, stepwise)", words=("optimizer.lr=3e-4",)),
    "source": Arm(words=("optimizer.lr=1e-4",)),
}


def run_arm(name: str, work: Path, steps: int, rows: int = SCORED) -> None:
    """Edit, heal and score one arm; what is there already is not done again."""
    arm, weights = ARMS[name], find_weights()
    folder, out = work / f"{name}-start", work / name
    if arm.operator and not folder.exists():
        _loopwise("edit", weights, folder, "--op", arm.operator)
    start = folder if arm.operator else weights
    if not (out / "model").exists():
        words = [*arm.words, f"batch_size={ROWS}", "micro_batch=null", "precision=bfloat16", f"data.length={LENGTH}"]
        words += ["evaluation.rows=8", "saving.every=100", "log_every=20"]
        again = (
            [out] if (out / CONFIG).exists() else [start, "--steps", steps, "--out", out, "--text", "stdlib", *words]
        )
        _loopwise("uptrain", *again, "--device", "cpu")
    source = read_config(out / CONFIG).data.open(seed=0)
    for which, place in (("before", start), ("after", out / "model")):
        path = work / f"{name}-{which}.json"
        if not path.exists():
            print(f"{name}: scoring {which}", flush=True)
            write_text(path, json.dumps(score(place, source, rows)) + "\n")


def score(place: Path, source: Source, rows: int) -> dict[str, Any]:
    """Mean loss of every held-out row, and what the model is."""
    model = loopwise.load(place, dtype="float32")
    if plan_of(model) is None:
        attach(model, Plan.identity(len(layer_list(model).layers)))
    losses = []
    with evaluating(model), torch.autocast("cpu", dtype=torch.bfloat16):
        for row in range(rows):
            batch = source.held_out(row, 1)
            logits_TV = predict(model, batch).float()[0]
            losses.append(float(F.cross_entropy(logits_TV, batch.targets_BT[0])))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "losses": losses,
        "parameters": parameters,
        "plan": str(plan_of(model)),
        "data": source.fingerprint,
    }


def collect(work: Path) -> list[dict[str, Any]]:
    """The entries of the result file."""
    found = {
        (name, which): json.loads((work / f"{name}-{which}.json").read_text(encoding="utf-8"))
        for name in ARMS
        for which in ("before", "after")
    }
    losses = {key: value["losses"] for key, value in found.items()}
    if len({value["data"] for value in found.values()}) > 1 or len({len(rows) for rows in losses.values()}) > 1:
        raise ValueError(f"{work}: the arms were not scored on the same rows, start anew with another --work")
    arms = [describe(name, work, found) for name in ARMS]
    entries = []
    # The relaxed model may start worse than the tied one: by its own start it would look better than it is.
    sides = [("relaxed", "relaxed", MIN_CLOSED), ("relaxed", "tied", MIN_CLOSED), ("tied", "tied", None)]
    sides.append(("relaxed_stepwise", "relaxed_stepwise", None))
    for name, start, target in sides:
        share, interval = closed(losses[start, "before"], losses[name, "after"], losses["source", "after"])
        said = f"uptrain: share of the gap closed, {name}" + (f", from the start of {start}" if start != name else "")
        holds = target is None or interval[0] >= target
        entries.append(
            {"name": said, "value": round(share, 4), "ci95": interval, "target": target, "holds": holds, "arms": arms}
        )
    differences = [a - b for a, b in zip(losses["tied", "after"], losses["relaxed", "after"], strict=True)]
    value, interval = resampled(lambda rows: statistics.fmean(differences[row] for row in rows), len(differences))
    name = "uptrain: nats by which relaxed is better than tied"
    entries.append({"name": name, "value": round(value, 4), "ci95": interval, "target": None, "holds": True})
    return entries


def describe(name: str, work: Path, found: dict[tuple[str, str], Any]) -> dict[str, Any]:
    """An arm in numbers."""
    lines = [line for line in read_metrics(work / name / METRICS) if "time" in line]
    seconds = statistics.median(line["time"]["step"] for line in lines)
    about: dict[str, Any] = {"name": name, "operator": ARMS[name].operator or "none"}
    about |= {key: found[name, "after"][key] for key in ("parameters", "plan")}
    about |= {"steps": lines[-1]["step"], "tokens": lines[-1]["tokens"], "flops": lines[-1]["flops"]}
    about |= {"words": list(ARMS[name].words), "seconds_per_step": round(seconds, 2)}
    for which in ("before", "after"):
        losses = found[name, which]["losses"]
        error = statistics.stdev(losses) / len(losses) ** 0.5
        about[which] = {"loss": round(statistics.fmean(losses), 4), "standard_error": round(error, 4)}
    return about


def closed(before: list[float], after: list[float], source: list[float]) -> tuple[float, list[float]]:
    """(before - after) / (before - source) of mean losses, and its interval over rows."""

    def share(rows: list[int]) -> float:
        b, a, s = (statistics.fmean(values[row] for row in rows) for values in (before, after, source))
        return (b - a) / (b - s)

    return resampled(share, len(before))


def resampled(value: Any, count: int) -> tuple[float, list[float]]:
    """A statistic of rows and its 95 % bootstrap interval (percentiles, fixed seed)."""
    draw, rows = random.Random(0), range(count)
    values = sorted(value(draw.choices(rows, k=count)) for _ in range(RESAMPLES))
    ends = [values[int(0.025 * RESAMPLES)], values[int(0.975 * RESAMPLES)]]
    return value(list(rows)), [round(end, 4) for end in ends]


def _loopwise(*words: object) -> None:
    began = time.time()
    print("$ loopwise", *words, flush=True)
    if command([str(word) for word in words]):
        raise ValueError(f"loopwise {words[0]} failed")
    print(f"  {(time.time() - began) / 60:.1f} min", flush=True)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--arm", choices=[*ARMS, "none"], help="carry out one arm (none: only collect); default all")
    options.add_argument("--steps", type=int, default=500, help=f"optimizer steps of {ROWS * LENGTH} tokens")
    options.add_argument("--rows", type=int, default=SCORED, help=f"held-out rows of {LENGTH} tokens that are scored")
    options.add_argument("--work", type=Path, default=Path("runs/bench-uptrain"), help="where edits and runs go")
    options.add_argument("--out", type=Path, default=RESULTS / "uptrain.json", help="result file")
    given = options.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    given.work.mkdir(parents=True, exist_ok=True)
    for name in ARMS if given.arm is None else () if given.arm == "none" else (given.arm,):
        run_arm(name, given.work, given.steps, given.rows)
    missing = [name for name in ARMS if not (given.work / f"{name}-after.json").exists()]
    if missing:
        print(f"still to do: {', '.join(missing)}")
        return 0
    return finish(collect(given.work), given.out, f"python benchmarks/uptrain.py --steps {given.steps}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {one_line(error)}")
