from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loopwise.loop.depth import CurriculumDepth, FixedDepth
from loopwise.plots.comparison import comparison_panels, comparison_picture, crossings
from loopwise.study.compare import REQUEST, RESULT, RUNS, TABLE, claim_folder, compare, summary, table
from loopwise.study.equal import Method, count_parameters, equalise, with_parameters, with_steps
from loopwise.study.pool import ROWS, Job, by_arm, run_all
from loopwise.tasks.p_hop import PHop
from loopwise.train.config import RunConfig, Stage
from loopwise.train.data.generated import TaskData
from loopwise.train.models import TransformersModel
from loopwise.train.run import Run
from tests.study.studies import do_here, small
from tests.train.runs import steps_of


def deep(**values: Any) -> RunConfig:
    """As many layers, each visited once."""
    scoring = replace(small().evaluation, loops=())
    return small(model=replace(small().model, layers=3, plan=""), evaluation=scoring, **values)


def methods(**configs: RunConfig) -> list[Method]:
    return [Method(name=name, config=config) for name, config in configs.items()]


def flops_of(config: RunConfig) -> float:
    run = Run(config, None)
    steps_of(run)
    return run.carry.flops


def test_equal_steps_keep_the_shares_of_stages() -> None:
    stages = (Stage(steps=1, plan="core:(0)x1"), Stage(steps=3, plan="core:(0)x2"))
    one, other = equalise(methods(one=small(steps=40), other=small(stages=stages)), "steps")
    assert one.config.num_steps == other.config.num_steps == 40
    assert [stage.steps for stage in other.config.stages] == [10, 30]
    with pytest.raises(ValueError, match="has 2 stages and cannot run in 1 steps"):
        with_steps(Method(name="other", config=small(stages=stages)), 1)


@pytest.mark.parametrize("depth", [None, CurriculumDepth(sampler=FixedDepth(total=6), steps=20)])
def test_equal_flops_are_what_the_runs_truly_spend(depth: CurriculumDepth | None) -> None:
    first, other = equalise(methods(deep=deep(steps=30), loop=small(depth=depth)), "flops")
    assert first.config.steps == 30 and other.config.steps != small().steps
    spent, same = flops_of(first.config), flops_of(other.config)
    one_step = same / other.config.steps
    assert abs(same - spent) <= 0.51 * one_step if depth is None else same == pytest.approx(spent, rel=0.05)


def test_equal_parameters_are_the_nearest_that_a_width_gives() -> None:
    first, other = equalise(methods(deep=deep(), loop=small()), "parameters")
    target = count_parameters(first.config)
    assert target == sum(item.numel() for item in Run(first.config, None).model.parameters())
    model: Any = other.config.model
    assert model.width % (2 * model.heads) == 0 and model.layers == 1
    gaps = {
        width: abs(count_parameters(replace(other.config, model=replace(model, width=width))) - target)
        for width in range(4, 80, 4)
    }
    assert min(gaps, key=lambda width: gaps[width]) == model.width
    small_one = with_parameters(Method(name="x", config=deep()), 10)
    assert small_one.config.model.width == 4, "the least that there is"  # type: ignore[attr-defined]


def test_methods_that_do_not_compare_are_refused() -> None:
    other = small(data=TaskData(task=PHop(context=10, alphabet=3, hops=(1,))))
    with pytest.raises(ValueError, match="one and two read different data"):
        equalise(methods(one=small(), two=other), "steps")
    foreign = small(model=TransformersModel(type="llama", config={"hidden_size": 8}))
    with pytest.raises(ValueError, match="width of model.transformers cannot be changed"):
        equalise(methods(one=small(), two=foreign), "parameters")
    with pytest.raises(ValueError, match="no method"):
        equalise([], "steps")
    with pytest.raises(ValueError, match="equal='time' must be one of"):
        equalise(methods(one=small()), "time")  # type: ignore[arg-type]


def test_runs_without_evaluations_get_some() -> None:
    quiet = small(steps=100, evaluation=replace(small().evaluation, every=0))
    asked, left = equalise(methods(asked=quiet, left=small()), "steps")
    assert (asked.config.evaluation.every, left.config.evaluation.every) == (8, 2)


def test_a_comparison_by_hand(tmp_path: Path) -> None:
    hot = small(optimizer=replace(small().optimizer, lr=1e30), clip=1e30)
    found = methods(loop=small(steps=10), deep=deep(steps=10), hot=hot)
    claim_folder(tmp_path / "out", found, [0, 1], "steps", 32)
    jobs = [Job(name=m.name, config=replace(m.config, seed=seed), rows=32) for seed in (0, 1) for m in found]
    do_here(jobs, tmp_path / "out" / RUNS)
    result = compare(found, [0, 1], equal="steps", out=tmp_path / "out", rows=32)
    assert json.loads((tmp_path / "out" / RESULT).read_text()) == json.loads(json.dumps(result))
    loop, plain, diverged = result["arms"]
    runs = by_arm(run_all(jobs, tmp_path / "out" / RUNS))
    assert loop["scores"]["loss"]["mean"] == pytest.approx(np.mean([run.score("loss") for run in runs["loop"]]))
    assert loop["parameters_to_first"] == 1.0 and plain["parameters_to_first"] > 1.5
    assert plain["flops_to_first"] == pytest.approx(plain["flops"] / loop["flops"])
    curves = [run.curve("eval/loss") for run in runs["deep"]]
    assert plain["curves"]["loss"]["step"] == [2, 4, 6, 8, 10]
    for index in range(5):
        values = [curve[index][2] for curve in curves]
        at = {name: column[index] for name, column in plain["curves"]["loss"].items()}
        assert (at["low"], at["mean"], at["high"]) == (min(values), pytest.approx(np.mean(values)), max(values))
        assert at["flops"] == pytest.approx(plain["flops"] * at["step"] / 10)
    assert diverged["diverged"] == [0, 1] and diverged["scores"] == {"loss": None, "accuracy": None}
    shown = table(result)
    assert "hot (2 diverged)" in shown and str(tmp_path) not in json.dumps(result)
    head, *rows = [line for line in (tmp_path / "out" / TABLE).read_text().splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in (head, *rows)}) == 1 and len(rows) == 4
    with pytest.raises(ValueError, match="holds another comparison"):
        compare(found, [0, 2], equal="steps", out=tmp_path / "out", rows=32)
    assert (tmp_path / "out" / REQUEST).is_file()


def curve(flops: list[float], mean: list[float], band: float = 0.0) -> dict[str, list[float]]:
    return {
        "step": list(range(len(flops))),
        "flops": flops,
        "mean": mean,
        "low": [value - band for value in mean],
        "high": [value + band for value in mean],
    }


def test_crossings_are_where_the_lines_meet() -> None:
    one, other = [(0.0, 0.0), (2.0, 2.0), (4.0, 0.0)], [(0.0, 1.0), (4.0, 1.0)]
    assert crossings(one, other) == [(1.0, 1.0, True), (3.0, 1.0, False)]
    assert crossings(other, one) == [(1.0, 1.0, False), (3.0, 1.0, True)]
    assert crossings(one, other, noise=1.1) == []
    assert crossings([(0.0, 0.0), (1.0, 1.0)], [(2.0, 0.0), (3.0, 1.0)]) == [], "nothing in common"
    touching = [(0.0, 0.0), (1.0, 1.0), (2.0, 0.0)]
    assert crossings(touching, [(0.0, 1.0), (2.0, 1.0)]) == [], "they meet, and neither overtakes"
    flat = [(0.0, 0.0), (1.0, 0.0), (2.0, 1.0)], [(0.0, 0.0), (1.0, 0.0), (2.0, 0.5)]
    assert crossings(*flat) == []


def test_crossings_name_who_is_better_after() -> None:
    rng = np.random.default_rng(0)
    x = np.geomspace(1.0, 100.0, 40)
    for _ in range(20):
        shift = float(rng.uniform(0.2, 0.8))
        up = [(value, shift * 2 * index / 39) for index, value in enumerate(x)]
        flat = [(float(value), shift) for value in x]
        ((place, height, above),) = crossings(up, flat)
        assert above and height == pytest.approx(shift)
        assert x[19] <= place <= x[20]


def test_summary_marks_crossings_for_both_scores(tmp_path: Path) -> None:
    from loopwise.study.compare import _crossings

    flops = [1e6, 1e7, 1e8]
    arms = [
        {"name": "early", "curves": {"loss": curve(flops, [1.0, 0.8, 0.7]), "accuracy": curve(flops, [0.3, 0.4, 0.5])}},
        {"name": "late", "curves": {"loss": curve(flops, [2.0, 0.9, 0.1]), "accuracy": curve(flops, [0.0, 0.1, 0.9])}},
    ]
    found = _crossings(arms)
    assert [(item["metric"], item["ahead"], item["behind"]) for item in found] == [
        ("loss", "late", "early"),
        ("accuracy", "late", "early"),
    ]
    assert 1e7 < found[0]["flops"] < 1e8
    comparison = {"equal": "steps", "seeds": [0, 1], "arms": arms, "crossings": found}
    loss, accuracy = comparison_panels(comparison)
    assert [mark[2] for mark in (*loss.marks, *accuracy.marks)] == ["1", "2"]
    assert comparison_picture(comparison, tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    noisy = [arm | {"curves": {"loss": curve(flops, arm["curves"]["loss"]["mean"], band=2.0)}} for arm in arms]
    assert _crossings(noisy) == [], "seeds differ by more than the methods do"


def test_one_method_and_one_seed_are_a_comparison(tmp_path: Path) -> None:
    jobs = [Job(name="loop", config=small(), rows=32)]
    do_here(jobs, tmp_path)
    found = summary(by_arm(run_all(jobs, tmp_path)), [0], "flops")
    assert found["crossings"] == [] and found["arms"][0]["scores"]["loss"]["low"] is None
    assert "loop" in table(found)
    with pytest.raises(ValueError, match="no curve to draw"):
        comparison_panels({"arms": [{"name": "x", "curves": {}}], "crossings": []})


@pytest.mark.parametrize(
    ("seeds", "names", "message"),
    [
        ([], ["a"], "seeds="),
        ([1, 1], ["a"], "seeds="),
        ([-1], ["a"], "seeds="),
        ([0], ["a", "a"], "different names"),
    ],
)
def test_bad_comparisons(seeds: list[int], names: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        compare([Method(name=name, config=small()) for name in names], seeds, equal="steps", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="is not empty and no comparison"):
        compare(methods(a=small()), [0], equal="steps", out=tmp_path, rows=ROWS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
