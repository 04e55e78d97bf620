"""Compare two ways of doing the same work: interleaved pairs, the median ratio and its interval, one form of result."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MIN_PAIRS = 20


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleaved_pairs(
    first: Callable[[], float], second: Callable[[], float], *, pairs: int, warmup: int = 3
) -> list[tuple[float, float]]:
    """Times of both sides, measured side by side.

    Each callable does its work once and returns the seconds it took (what it prepares is its own business). Which side
    goes first alternates, so that a machine that slows down or speeds up favours neither.
    """
    for _ in range(warmup):
        first()
        second()
    times = []
    for index in range(pairs):
        if index % 2:
            b, a = second(), first()
        else:
            a, b = first(), second()
        times.append((a, b))
    return times


def median_ratio(times: list[tuple[float, float]], *, resamples: int = 5000) -> tuple[float, tuple[float, float]]:
    """Median of the ratios first / second over pairs, and its 95 % bootstrap interval (percentiles, fixed seed)."""
    ratios = [a / b for a, b in times]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(resamples))
    return statistics.median(ratios), (medians[int(0.025 * resamples)], medians[int(0.975 * resamples)])


def ratio_entry(name: str, times: list[tuple[float, float]], *, target: float) -> dict[str, Any]:
    """A result: the ratio should be at most `target`, which holds when its whole interval does."""
    ratio, (low, high) = median_ratio(times)
    first, second = (statistics.median(side) for side in zip(*times, strict=True))
    print(f"{name}: {first:.4f} s against {second:.4f} s, medians of {len(times)}", flush=True)
    return {
        "name": name,
        "ratio": round(ratio, 4),
        "ci95": [round(low, 4), round(high, 4)],
        "target": target,
        "holds": high <= target,
    }


def exact_entry(name: str, value: int, *, target: int) -> dict[str, Any]:
    """A result that is counted, not measured: it holds when it equals the target."""
    return {"name": name, "value": value, "ci95": [value, value], "target": target, "holds": value == target}


def versions() -> dict[str, str]:
    """What ran."""
    import torch
    import transformers

    import loopwise

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "loopwise": loopwise.__version__,
    }


def machine() -> str:
    """Where it ran, without names of hosts or people."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        cpu = models[0] if models else cpu
    return f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {platform.system()}"


def _enough_pairs(text: str) -> int:
    if int(text) < MIN_PAIRS:
        raise argparse.ArgumentTypeError(f"a claim needs at least {MIN_PAIRS} pairs, got {text}")
    return int(text)


def parser(description: str, script: str) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--pairs", type=_enough_pairs, default=40, help=f"interleaved pairs, at least {MIN_PAIRS}")
    options.add_argument("--out", type=Path, default=RESULTS / f"{script}.json", help="result file")
    return options


def finish(entries: list[dict[str, Any]], out: Path, command: str) -> int:
    """Print and write the results; 1 when a target is missed, else 0."""
    shared = {"command": command, "versions": versions(), "machine": machine()}
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps([{**entry, **shared} for entry in entries], indent=2) + "\n"
    out.write_text(text, encoding="utf-8")
    for entry in entries:
        value = entry.get("ratio", entry.get("value"))
        verdict = "holds" if entry["holds"] else "MISSED"
        print(f"{entry['name']:<34} {value}  95% {entry['ci95']}  target {entry['target']}  {verdict}")
    missed = [entry["name"] for entry in entries if not entry["holds"]]
    if missed:
        print(f"missed: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0
