from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loopwise.study.__main__ import main
from loopwise.study.claims import (
    Tuning,
    interval_of,
    read_claim,
    read_results,
    results_path,
    verdict,
    write_results,
)
from loopwise.study.experiment import Experiment, carry_out, pilot, tune
from loopwise.study.page import write_index, write_page
from loopwise.study.pool import Job
from loopwise.study.stats import Interval
from tests.study.studies import do_here, small

DECLARATION = """
claim = "A loop learns as well as two layers."
source = "2502.17416"
effect = "mean token accuracy of the loop minus that of two layers"
expects = "within"
margin = 0.05
statistic = "Welch's t, two one-sided 95 % bounds"
arms = ["loop", "two"]
seeds = [0, 1]
control = "two layers beat chance"
floor = "1/3"
budget_core_minutes = 1
tuned = "on seed 10"
rows = 32

[published]
figure = "the same perplexity"
source = "2502.17416, table 2"
confidence = "table read"

[tuning]
lrs = [1e-3, 3e-3]
seeds = [10]
steps = 4

[tuning.share]
two = "loop"

[scale.gpu]
seeds = [0, 1, 2]
budget_core_minutes = 60
"""

EXPERIMENT = """
from dataclasses import replace

from loopwise.plots.curves import Curve, Panel
from loopwise.study.experiment import Effect
from loopwise.study.scoring import scores_of
from loopwise.study.stats import TWO_BOUNDS, difference_interval
from tests.study.studies import small


def arms(scale):
    two = replace(small().model, layers=2, plan="core:(0-1)x1")
    return {"loop": small(name="loop"), "two": small(name="two", model=two)}


def measure(runs):
    scores = {name: scores_of(found, "token_accuracy") for name, found in runs.items()}
    curves = [Curve(label=name, x=[0, 1], y=values) for name, values in scores.items()]
    return Effect(
        interval=difference_interval(scores["loop"], scores["two"], TWO_BOUNDS),
        control_held=True,
        control="0.5 against 0.33",
        scores=scores,
        metric="token accuracy",
        panels=[Panel(curves=curves, x_label="seed", y_label="token accuracy")],
        details={"slope": {"loop": 0.5}},
    )
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders that all tests here share, as studies do."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "claims" / "demo"
    found.mkdir(parents=True)
    (found / "claim.toml").write_text(DECLARATION)
    (found / "experiment.py").write_text(EXPERIMENT)
    return found


def finish(folder: Path, runs: Path) -> dict[str, Any]:
    """Carry out the claim with all its runs done in this process."""
    experiment = Experiment.read(folder)
    tuning = experiment.claim.tuning
    assert tuning is not None
    short = replace(experiment.arms["loop"], steps=4, seed=10)
    tried = [replace(short, optimizer=replace(short.optimizer, lr=lr)) for lr in tuning.lrs]
    do_here([Job(name="loop", config=config, rows=64) for config in tried], runs)
    lrs, _, _ = tune(experiment.arms, tuning, runs)
    do_here(experiment.jobs(lrs), runs)
    return carry_out(experiment, runs=runs)


def changed(folder: Path, old: str, new: str) -> None:
    path = folder / "claim.toml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_a_claim_from_declaration_to_page(
    folder: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    results = finish(folder, runs)
    assert json.loads(results_path(folder).read_text()) == json.loads(json.dumps(results))
    assert {arm["name"]: len(arm["scores"]) for arm in results["arms"]} == {"loop": 2, "two": 2}
    loop, two = results["arms"]
    assert loop["params"] < two["params"] == loop["params_unrolled"]
    assert loop["lr"] == two["lr"] == results["tuning"][0]["chosen"], "the second takes over the choice of the first"
    assert results["tuning"][1] == {"arm": "two", "shares": "loop", "chosen": loop["lr"]}
    by_hand = sum(loop["scores"]) / 2 - sum(two["scores"]) / 2
    assert results["effect"] == pytest.approx(by_hand)
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert main([str(folder), "--check", "--docs", str(tmp_path / "docs" / "claims")]) == 0
    assert capsys.readouterr().out.startswith(f"{results['verdict']}: effect ")
    page = (tmp_path / "docs" / "claims" / "demo.md").read_text()
    for part in ("the same perplexity", "2502.17416, table 2 (table read)", results["command"], "| loop | 3.60 k |"):
        assert part in page
    assert "](../../claims/demo/results.png)" in page
    index = (tmp_path / "docs" / "claims" / "index.md").read_text()
    assert (
        "| [Demo](demo.md) | A loop learns as well as two layers. | the same perplexity (2502.17416, table 2)" in index
    )
    assert f"| {results['verdict']} |" in index
    changed(folder, "margin = 0.05", "margin = 0.06")
    assert "| to be run again |" in write_index(folder.parent, tmp_path / "docs" / "claims").read_text()
    assert str(tmp_path) not in page + results_path(folder).read_text()


@pytest.mark.parametrize("file", ["claim.toml", "experiment.py"])
def test_results_of_a_changed_declaration_are_refused(folder: Path, runs: Path, file: str) -> None:
    finish(folder, runs)
    read_results(folder)
    with (folder / file).open("a") as changing:
        changing.write("# another thought\n")
    with pytest.raises(ValueError, match=f"{file} has changed since this was run"):
        read_results(folder)


def test_an_experiment_that_changes_the_declaration_while_it_runs_is_refused(folder: Path, runs: Path) -> None:
    path = folder / "experiment.py"
    touch = "    open(__file__, 'a').write('# more')\n"
    path.write_text(path.read_text().replace("def measure(runs):\n", f"def measure(runs):\n{touch}"))
    with pytest.raises(ValueError, match="changed while it ran"):
        finish(folder, runs)
    assert not results_path(folder).exists()


def test_results_that_were_written_by_hand_are_refused(folder: Path, runs: Path) -> None:
    good = finish(folder, runs)
    other = next(name for name in ("reproduced", "not reproduced") if name != good["verdict"])

    def without(name: str) -> dict[str, Any]:
        return {key: value for key, value in good.items() if key != name}

    cases = [
        (without("versions"), "'versions' is missing"),
        (good | {"verdict": other}, f"verdict='{other}', but '{good['verdict']}' follows"),
        (good | {"seeds": [0, 2]}, r"seeds=\[0, 2\] is not what claim.toml declares"),
        (good | {"margin": 0.5}, "margin=0.5 is not"),
        (good | {"interval": [0.1]}, r"interval must be \[lo, hi\]"),
        (good | {"effect": None}, "effect=None must be a number"),
        (good | {"arms": good["arms"][:1]}, "arms .* are not those"),
        (good | {"arms": [arm | {"scores": [0.5]} for arm in good["arms"]]}, "for each of 2 seeds"),
        (good | {"arms": [arm | {"flops": None} for arm in good["arms"]]}, "flops must be a number"),
        (good | {"control": {"name": "x"}}, "control needs"),
        (good | {"published": {"figure": "better", "source": "x"}}, "published is not"),
    ]
    for results, message in cases:
        write_results(folder, results)
        with pytest.raises(ValueError, match=message):
            read_results(folder)
    results_path(folder).write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_results(folder)


def test_limits_without_end_become_null_and_come_back(folder: Path, runs: Path, tmp_path: Path) -> None:
    good = finish(folder, runs)
    endless = good | {"interval": [-math.inf, 0.0], "verdict": "inconclusive"}
    write_results(folder, endless)
    assert json.loads(results_path(folder).read_text())["interval"] == [None, 0.0]
    assert interval_of(read_results(folder)).low == -math.inf
    assert "unbounded" in write_page(folder, tmp_path / "docs").read_text()


@pytest.mark.parametrize(
    ("expects", "margin", "low", "high", "expected"),
    [
        ("above", 0.1, 0.11, 0.3, "reproduced"),
        ("above", 0.1, 0.05, 0.3, "inconclusive"),
        ("above", 0.1, -0.1, 0.05, "not reproduced"),
        ("above", 0.1, -math.inf, math.inf, "inconclusive"),
        ("below", 0.1, 0.0, 0.05, "reproduced"),
        ("below", 0.1, 0.2, 0.3, "not reproduced"),
        ("below", 0.1, 0.05, 0.3, "inconclusive"),
        ("within", 0.1, -0.1, 0.1, "reproduced"),
        ("within", 0.1, -0.2, 0.1, "inconclusive"),
        ("within", 0.1, -0.3, -0.11, "not reproduced"),
        ("within", 0.1, 0.11, 0.3, "not reproduced"),
    ],
)
def test_verdicts(folder: Path, expects: Any, margin: float, low: float, high: float, expected: str) -> None:
    claim = replace(read_claim(folder), expects=expects, margin=margin)
    effect = Interval(estimate=(max(low, -9) + min(high, 9)) / 2, low=low, high=high)
    assert verdict(claim, effect, control_held=True) == expected
    assert verdict(claim, effect, control_held=False) == "inconclusive"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("margin = 0.05\n", "", "field 'margin' is missing"),
        ("margin =", "margins =", "unknown field 'margins'; did you mean 'margin'"),
        ("margin = 0.05", "margin = 0", "margin=0 must be above 0 for 'within'"),
        ("margin = 0.05", 'margin = "5 %"', "margin must be a number, got '5 %'"),
        ('"within"', '"equal"', "expects='equal' must be one of above, below, within"),
        ("seeds = [0, 1]\n", "seeds = [0, 0]\n", "seeds=.* must be different"),
        ("seeds = [0, 1]\n", "seeds = []\n", "seeds must be a list with something in it"),
        ("seeds = [10]", "seeds = [1]", r"tuning.seeds=\[1\] must not decide too"),
        ("1e-3, 3e-3", "-1e-3", "tuning.lrs=.* must be above 0"),
        ('two = "loop"', 'three = "loop"', "tuning.share: 'three' = 'loop' must name arms"),
        ('source = "2502.17416"', 'source = "a friend"', "must hold an arXiv id"),
        ('tuned = "on seed 10"', 'tuned = ""', "tuned must be a text"),
        ('confidence = "table read"\n', "", "published: field 'confidence' is missing"),
        ("[scale.gpu]", "[scale.gpu]\nmargin = 1", "scale.gpu may replace seeds, rows"),
        ("rows = 32", "rows = = 32", "is not TOML"),
    ],
)
def test_bad_declarations_are_refused_in_one_line(folder: Path, old: str, new: str, message: str) -> None:
    changed(folder, old, new)
    with pytest.raises(ValueError, match=message) as caught:
        read_claim(folder)
    assert "\n" not in str(caught.value) and "claim.toml" in str(caught.value)


def test_another_scale_replaces_seeds_and_budget(folder: Path) -> None:
    claim = Experiment.read(folder, "gpu").claim
    assert (claim.seeds, claim.budget_core_minutes, claim.rows) == ((0, 1, 2), 60, 32)
    assert results_path(folder, "gpu").name == "results.gpu.json"
    with pytest.raises(ValueError, match="no scale 'gpo' .*did you mean 'gpu'"):
        Experiment.read(folder, "gpo")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def measure", "def measured", "must define the functions .* not 'measure'"),
        ('"two":', '"three":', r"has the arms \['loop', 'three'\]"),
        ('small(name="loop")', "7", "arm 'loop' is int, not a RunConfig"),
        ("def arms(scale):", "def arms(scale):\n    1 / 0", "cannot be run: ZeroDivisionError"),
    ],
)
def test_bad_experiments_are_refused_in_one_line(folder: Path, old: str, new: str, message: str) -> None:
    path = folder / "experiment.py"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        Experiment.read(folder)


def test_tuning_takes_the_best_and_marks_the_end_of_a_range(tmp_path: Path) -> None:
    arms = {"a": small()}
    tuning = Tuning(lrs=(1e-5, 3e-3, 1e30), seeds=(10,), steps=20)
    configs = [small(seed=10, steps=20, optimizer=replace(small().optimizer, lr=lr)) for lr in tuning.lrs]
    do_here([Job(name="a", config=config, rows=64) for config in configs], tmp_path)
    chosen, (record,), runs = tune(arms, tuning, tmp_path)
    assert chosen == {"a": 3e-3} and not record["at_end"]
    assert record["scores"][1] < record["scores"][0] < record["scores"][2] == math.inf
    assert len(runs) == 3
    chosen, (record,), _ = tune(arms, replace(tuning, lrs=(1e-5, 3e-3)), tmp_path)
    assert chosen == {"a": 3e-3} and record["at_end"]


def test_a_pilot_counts_every_run(folder: Path, capsys: pytest.CaptureFixture) -> None:
    loop, two = pilot(Experiment.read(folder))
    assert (loop.num_runs, loop.num_tuning_runs) == (2, 2 * 4 / 6)
    assert two.num_tuning_runs == 0, "it shares"
    assert 0 < loop.core_minutes < 1 and loop.train_seconds > 0
    changed(folder, "budget_core_minutes = 1\n", "budget_core_minutes = 1e-9\n")
    assert main([str(folder), "--pilot"]) == 0
    assert re.search(r"all: .* core-minutes of 1e-09 declared.*OVER the budget", capsys.readouterr().out)


def test_bad_command_lines(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(tmp_path / "none")]) == 2
    assert main([str(folder), "--check"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all(line.startswith("error: ") for line in errors)
