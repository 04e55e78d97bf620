"""The statistics of the benchmark that heals SmolLM2, and what it writes from losses row by row."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """`benchmarks/uptrain.py`, whose name is that of the recipe."""
    folder = Path(__file__).parents[2] / "benchmarks"
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("benchmark_uptrain", folder / "uptrain.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_share_that_is_closed(benchmark: ModuleType) -> None:
    before, source = [10.0, 12.0, 11.0, 13.0], [2.0, 3.0, 2.0, 3.0]
    half = [(b + s) / 2 for b, s in zip(before, source, strict=True)]
    assert benchmark.closed(before, half, source) == (pytest.approx(0.5), [0.5, 0.5])
    share, (low, high) = benchmark.closed(before, [4.0, 9.0, 4.0, 9.0], source)
    assert low < share < high and share == pytest.approx((46 - 26) / (46 - 10))


def test_results_say_whether_the_target_holds(benchmark: ModuleType, tmp_path: Path) -> None:
    losses = {
        "relaxed": ([12.0, 13.0] * 4, [4.0, 5.0] * 4),
        "relaxed_stepwise": ([15.0, 16.0] * 4, [5.0, 6.0] * 4),
        "tied": ([12.0, 14.0] * 4, [10.0, 11.5] * 4),
        "source": ([2.5, 3.0] * 4, [2.0, 2.5] * 4),
    }
    for name, (before, after) in losses.items():
        for which, rows in (("before", before), ("after", after)):
            found = {"losses": rows, "parameters": 10, "plan": "0-1", "data": "x"}
            (tmp_path / f"{name}-{which}.json").write_text(json.dumps(found))
        (tmp_path / name).mkdir()
        line = {"step": 7, "tokens": 70, "flops": 1.0, "time": {"step": 0.5}}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    relaxed, from_tied, tied, stepwise, difference = benchmark.collect(tmp_path)
    assert from_tied["holds"] and from_tied["value"] > relaxed["value"]
    assert relaxed["holds"] and relaxed["target"] == 0.3 and relaxed["ci95"][0] > 0.7
    assert tied["value"] < 0.3 and tied["holds"] and tied["target"] is None
    assert stepwise["target"] is None and stepwise["value"] < relaxed["value"]
    assert difference["value"] == pytest.approx(6.25)
    arms = {arm["name"]: arm for arm in relaxed["arms"]}
    assert arms["source"]["after"]["loss"] == 2.25 and arms["tied"]["tokens"] == 70
