"""How benchmarks compare two sides: the pairs, the ratio, the verdict."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import _timing  # noqa: E402


def test_sides_alternate_and_stay_on_their_side() -> None:
    calls: list[str] = []

    def side(name: str, value: float):
        def run() -> float:
            calls.append(name)
            return value

        return run

    times = _timing.interleaved_pairs(side("a", 3.0), side("b", 2.0), pairs=4, warmup=1)
    assert times == [(3.0, 2.0)] * 4
    assert "".join(calls) == "ab" + "abba" * 2


def test_the_interval_covers_the_true_ratio_and_drift_cancels() -> None:
    noise = random.Random(1)
    covered = 0
    for _ in range(40):
        # A machine that slows down to half its speed: both sides of a pair see it.
        speed = [1 + 0.5 * index / 30 for index in range(30)]
        times = [(1.05 * s * noise.gauss(1, 0.02), s * noise.gauss(1, 0.02)) for s in speed]
        ratio, (low, high) = _timing.median_ratio(times, resamples=400)
        assert low <= ratio <= high and high - low < 0.1
        covered += low <= 1.05 <= high
    assert covered >= 34


def test_a_target_holds_when_the_whole_interval_does() -> None:
    steady = [(1.02, 1.0)] * 20
    assert _timing.ratio_entry("a", steady, target=1.03) == {
        "name": "a",
        "ratio": 1.02,
        "ci95": [1.02, 1.02],
        "target": 1.03,
        "holds": True,
    }
    shaky = [(1.0, 1.0), (1.06, 1.0)] * 10
    entry = _timing.ratio_entry("b", shaky, target=1.05)
    assert entry["ratio"] <= 1.05 < entry["ci95"][1] and not entry["holds"]
    assert _timing.exact_entry("c", 5, target=5)["holds"] and not _timing.exact_entry("c", 5, target=6)["holds"]


def test_results_have_one_form_and_a_missed_target_fails(tmp_path: Path) -> None:
    good, bad = _timing.exact_entry("good", 1, target=1), _timing.exact_entry("bad", 1, target=2)
    assert _timing.finish([good], tmp_path / "a.json", "python x.py") == 0
    assert _timing.finish([good, bad], tmp_path / "deep" / "b.json", "python x.py") == 1
    rows = json.loads((tmp_path / "deep" / "b.json").read_text(encoding="utf-8"))
    keys = {"name", "value", "ci95", "target", "holds", "command", "versions", "machine"}
    assert [set(row) for row in rows] == [keys, keys]
    assert rows[0]["command"] == "python x.py" and rows[0]["versions"]["torch"]


def test_few_pairs_are_refused(tmp_path: Path) -> None:
    options = _timing.parser("about", "name")
    assert options.parse_args(["--pairs", "20"]).pairs == 20
    with pytest.raises(SystemExit):
        options.parse_args(["--pairs", "19"])
