"""Methods x seeds: what each reaches for what it spends, as one table and one picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from loopwise.io.amounts import amount
from loopwise.io.atomic import write_text
from loopwise.loop.config import to_dict
from loopwise.plots.comparison import comparison_picture, crossings
from loopwise.study.equal import Equal, Method
from loopwise.study.experiment import versions
from loopwise.study.pool import ROWS, Job, by_arm, run_all
from loopwise.study.scoring import RunResult
from loopwise.study.stats import mean_interval

REQUEST, RESULT, TABLE, PICTURE, RUNS = "request.json", "comparison.json", "comparison.md", "comparison.png", "runs"
METRICS = ("loss", "accuracy")


def compare(
    methods: Sequence[Method],
    seeds: Sequence[int],
    *,
    equal: Equal,
    out: Path | str,
    num_workers: int = 1,
    nice: int = 0,
    rows: int = ROWS,
) -> dict[str, Any]:
    """Run methods that `equalise` has brought together under every seed, and write the comparison to a folder.

    `comparison.json` holds everything, `comparison.md` the table, `comparison.png` the picture, `runs` the run folders.
    The same call goes on where an earlier one was interrupted.

    Args:
        methods: with different names.
        seeds: different ones, at least one.
        equal: what was made equal.
        out: the folder.
        num_workers: runs at a time.
        nice: added to the niceness of their processes.
        rows: test rows that score a run.

    Raises:
        ValueError: seeds or names that repeat, a folder with something else in it, or a run that failed.
    """
    out = Path(out)
    check_seeds(seeds)
    names = [method.name for method in methods]
    if len(set(names)) != len(names):
        raise ValueError(f"methods need different names, got {', '.join(names)}")
    claim_folder(out, methods, seeds, equal, rows)
    jobs = [
        Job(name=method.name, config=replace(method.config, seed=seed), rows=rows)
        for seed in seeds
        for method in methods
    ]
    grouped = by_arm(run_all(jobs, out / RUNS, num_workers=num_workers, nice=nice))
    found = summary(grouped, seeds, equal)
    write_text(out / RESULT, json.dumps(found, indent=2, allow_nan=False) + "\n")
    write_text(out / TABLE, f"{markdown(found)}\n")
    if any(arm["curves"] for arm in found["arms"]):
        comparison_picture(found, out / PICTURE)
    return found


def check_seeds(seeds: Sequence[int]) -> None:
    """ValueError unless there are seeds, all different and none negative."""
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds={list(seeds)} must be different numbers from 0, at least one")


def claim_folder(out: Path, methods: Sequence[Method], seeds: Sequence[int], equal: str, rows: int) -> None:
    """Make a folder this comparison's.

    Raises:
        ValueError: another comparison, or anything else, is in it.
    """
    arms = {method.name: to_dict(method.config) for method in methods}
    text = json.dumps({"equal": equal, "seeds": list(seeds), "rows": rows, "methods": arms}, indent=2) + "\n"
    path = out / REQUEST
    if path.is_file():
        if path.read_text(encoding="utf-8") != text:
            raise ValueError(f"{out} holds another comparison: name a new folder, or ask for the same again")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty and no comparison: name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def summary(grouped: Mapping[str, Sequence[RunResult]], seeds: Sequence[int], equal: str) -> dict[str, Any]:
    """What `comparison.json` holds; runs that have diverged count in no mean and are listed."""
    arms = [_arm(name, results) for name, results in grouped.items()]
    for arm in arms:
        arm["parameters_to_first"] = arm["parameters"]["unique"] / arms[0]["parameters"]["unique"]
        arm["flops_to_first"] = arm["flops"] / arms[0]["flops"] if arms[0]["flops"] else None
    return {
        "equal": equal,
        "seeds": list(seeds),
        "arms": arms,
        "crossings": _crossings(arms),
        "versions": versions(),
    }


def mean_curve(results: Sequence[RunResult], metric: str) -> dict[str, list[float]] | None:
    """A validation score over training: per evaluation the step, mean FLOPs, mean, lowest and highest over the seeds.

    Args:
        results: runs of one arm.
        metric: "loss", "accuracy" or "token_accuracy", with "@4" behind it at 4 iterations.

    Returns:
        Lists of equal length, or None where nothing was scored.
    """
    curves = [result.curve(f"eval/{metric}") for result in results if not result.has_diverged]
    points = [point for point in zip(*curves, strict=False) if len({step for step, _, _ in point}) == 1]
    if not points:
        return None
    values = [[value for _, _, value in point] for point in points]
    return {
        "step": [point[0][0] for point in points],
        "flops": [sum(flops for _, flops, _ in point) / len(point) for point in points],
        "mean": [sum(each) / len(each) for each in values],
        "low": [min(each) for each in values],
        "high": [max(each) for each in values],
    }


def markdown(found: Mapping[str, Any]) -> str:
    """The table, and the crossings, as Markdown."""
    head, rows = cells(found)
    seeds = ", ".join(map(str, found["seeds"]))
    lines = [f"Equal {found['equal']}. Scores on test rows: mean over seeds {seeds} and its 95 % t interval.", ""]
    lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    if found["crossings"]:
        lines += ["", *(f"{number}. {line}" for number, line in enumerate(crossing_lines(found), start=1))]
    return "\n".join(lines)


def table(found: Mapping[str, Any]) -> str:
    """The same for a terminal."""
    head, rows = cells(found)
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    lines += [f"crossing {number}: {line}" for number, line in enumerate(crossing_lines(found), start=1)]
    return "\n".join(line.rstrip() for line in lines)


def cells(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of the table."""
    metrics = [metric for metric in METRICS if any(arm["scores"].get(metric) for arm in found["arms"])]
    head = ["method", "parameters", "to first", "unrolled", "width", "FLOPs", "to first", "steps", "tokens", *metrics]
    rows = []
    for arm in found["arms"]:
        parameters, share = arm["parameters"], arm["flops_to_first"]
        name = arm["name"] + (f" ({len(arm['diverged'])} diverged)" if arm["diverged"] else "")
        row = [name, amount(parameters["unique"]), f"{arm['parameters_to_first']:.3f}", amount(parameters["unrolled"])]
        row += [str(arm["width"] or ""), amount(arm["flops"]), "" if share is None else f"{share:.3f}"]
        row += [str(arm["steps"]), amount(arm["tokens"])]
        rows.append(row + [_score(arm["scores"].get(metric)) for metric in metrics])
    return head, rows


def crossing_lines(found: Mapping[str, Any]) -> list[str]:
    """A line for every crossing."""
    return [
        f"from {amount(item['flops'])}FLOPs on {item['ahead']} has the better {item['metric']} than {item['behind']} "
        f"({item['value']:.4g} there)"
        for item in found["crossings"]
    ]


def _arm(name: str, results: Sequence[RunResult]) -> dict[str, Any]:
    first, whole = results[0], [result for result in results if not result.has_diverged]
    about = whole or results
    curves = {metric: curve for metric in METRICS if (curve := mean_curve(results, metric))}
    scores = {}
    for metric in METRICS:
        has = bool(whole) and metric in whole[0].scores["loops"][whole[0].scores["plan_loops"]]
        scores[metric] = _interval([result.score(metric) for result in whole]) if has else None
    return {
        "name": name,
        "parameters": first.scores["parameters"],
        "width": getattr(first.config.model, "width", None),
        "flops": sum(result.flops for result in about) / len(about),
        "steps": first.config.num_steps,
        "tokens": sum(result.scores["tokens"] for result in about) / len(about),
        "scores": scores,
        "diverged": [result.seed for result in results if result.has_diverged],
        "runs": [result.folder.name for result in results],
        "curves": curves,
    }


def _interval(values: Sequence[float]) -> dict[str, Any]:
    """JSON form of a mean with its interval; limits are null for a single seed."""
    found = mean_interval(values)
    low, high = (limit if math.isfinite(limit) else None for limit in (found.low, found.high))
    return {"values": list(values), "mean": found.estimate, "low": low, "high": high}


def _crossings(arms: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Where the mean curves of two methods change places over FLOPs, by more than their seeds differ."""
    found = []
    for metric in METRICS:
        drawn = [arm for arm in arms if metric in arm["curves"]]
        for one, other in combinations(drawn, 2):
            pair = [arm["curves"][metric] for arm in (one, other)]
            spread = [high - low for curve in pair for low, high in zip(curve["low"], curve["high"], strict=True)]
            # Half a band on each side, as it is on average.
            noise = sum(spread) / len(spread)
            # On a logarithmic axis, as in the picture.
            lines = [[(math.log(x), y) for x, y in zip(curve["flops"], curve["mean"], strict=True)] for curve in pair]
            for x, y, is_above in crossings(lines[0], lines[1], noise):
                # The higher one is ahead, unless less is better.
                ahead, behind = (one, other) if is_above != (metric == "loss") else (other, one)
                names = {"ahead": ahead["name"], "behind": behind["name"]}
                found.append({"metric": metric, "flops": math.exp(x), "value": y} | names)
    return sorted(found, key=lambda item: (METRICS.index(item["metric"]), item["flops"]))


def _score(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return ""
    limits = "" if score["low"] is None else f" [{score['low']:.3f}, {score['high']:.3f}]"
    return f"{score['mean']:.3f}{limits}"
