from __future__ import annotations

import io
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from loopwise.study.pool import Job, _Batch, by_arm, config_hash, run_all
from loopwise.study.scoring import SCORES, RunResult, items_of, read_scores, scores_of
from loopwise.study.worker import StoppedError, perform
from loopwise.tasks.p_hop import PHop
from loopwise.tasks.regression import LinearRegression
from loopwise.train import checkpoints
from loopwise.train.config import Evaluation, RunConfig
from loopwise.train.data.generated import RegressionData, TaskData
from loopwise.train.evaluate import evaluate, predict
from loopwise.train.metrics import read_metrics
from loopwise.train.models import RegressionModel
from loopwise.train.run import CHECKPOINTS, METRICS, Run
from tests.study.studies import do_here, small
from tests.train.runs import assert_same_state, timeless

ROWS = 48


def hot() -> RunConfig:
    """A run that diverges."""
    return small(optimizer=replace(small().optimizer, lr=1e30), clip=1e30)


def when(seen: Callable[[], bool], act: Callable[[], None]) -> None:
    """Do something in another thread as soon as a thing is seen."""

    def watch() -> None:
        while not seen():
            time.sleep(0.02)
        act()

    threading.Thread(target=watch, daemon=True).start()


def test_a_batch_goes_on_past_runs_that_diverge_or_fail(tmp_path: Path) -> None:
    impossible = small(model=replace(small().model, plan="core:(7)x2"))
    jobs = [
        Job(name="a", config=small(name="one"), rows=ROWS),
        Job(name="hot", config=hot(), rows=ROWS),
        Job(name="impossible", config=impossible, rows=ROWS),
        Job(name="b", config=small(name="other"), rows=ROWS, loops=(4,)),
        Job(name="a", config=small(seed=1), rows=ROWS),
    ]
    out = io.StringIO()
    with pytest.raises(ValueError, match="^impossible, seed 0: .*layer 7"):
        run_all(jobs, tmp_path, out=out)
    assert "hot, seed 0: diverged at step" in out.getvalue()
    del jobs[2]
    results = run_all(jobs, tmp_path, out=io.StringIO())  # all are done, so no process starts
    assert [result.name for result in results] == ["a", "hot", "b", "a"]
    a, diverged, b, _ = results
    assert a.folder == b.folder != diverged.folder
    assert a.loops == (1, 2, 3, 4), "the two jobs of one run are scored together"
    assert diverged.has_diverged and math.isnan(diverged.score())
    assert scores_of(results, diverged=0.25)[1] == 0.25
    with pytest.raises(ValueError, match="diverged"):
        diverged.items()
    assert [result.seed for result in by_arm(results)["a"]] == [0, 1]


def test_ctrl_c_leaves_a_run_that_goes_on(tmp_path: Path) -> None:
    job = Job(name="a", config=small(steps=4000, evaluation=Evaluation(rows=4, samples=0)), rows=ROWS)
    folder = tmp_path / config_hash(job.config)
    when(
        lambda: bool(checkpoints.steps(folder / CHECKPOINTS)),
        lambda: os.kill(os.getpid(), signal.SIGINT),
    )
    with pytest.raises(KeyboardInterrupt):
        run_all([job], tmp_path, out=io.StringIO())
    run = Run.open(folder)
    assert 2 <= run.carry.step < 4000
    assert read_scores(folder, ROWS, ()) is None


def test_a_process_that_dies_is_a_failure(tmp_path: Path) -> None:
    job = Job(name="a", config=small(steps=4000), rows=ROWS)
    batch = _Batch({tmp_path / "run": job}, 1, io.StringIO())
    when(lambda: (tmp_path / "run" / METRICS).is_file(), lambda: batch.processes[0].kill())
    with pytest.raises(ValueError, match="a, seed 0: its process ended with code -9"):
        batch.work(1, nice=0)


def test_a_run_that_was_left_alone_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def gone(values: dict) -> None:
        raise BrokenPipeError

    whole = perform(small(), tmp_path / "whole", rows=ROWS)
    with pytest.raises(StoppedError, match="step 1 of 6"):
        perform(small(), tmp_path / "left", rows=ROWS, report=gone)
    again = perform(small(), tmp_path / "left", rows=ROWS)
    assert {**again, "core_seconds": 0} == {**whole, "core_seconds": 0}
    assert_same_state(Run.open(tmp_path / "left").tensors(), Run.open(tmp_path / "whole").tensors())
    lines, other = (read_metrics(tmp_path / name / METRICS) for name in ("left", "whole"))
    assert list(map(timeless, lines)) == list(map(timeless, other))


def test_scores_are_those_of_a_loop_over_rows(tmp_path: Path) -> None:
    config = small(steps=40, batch_size=16)
    scores = perform(config, tmp_path / "run", rows=ROWS, loops=(3,))
    result = RunResult(name="a", config=config, folder=tmp_path / "run", scores=scores)
    run = Run.open(tmp_path / "run")
    batch = run.source.held_out(0, ROWS, "test")
    for loops in (None, 3):
        with torch.no_grad():
            logits = predict(run.model.eval(), batch, loops)
        assert batch.targets_BT is not None
        right = []
        for row in range(ROWS):
            scored = batch.targets_BT[row] != -100
            right.append(bool((logits[row].argmax(-1)[scored] == batch.targets_BT[row][scored]).all()))
        assert result.items(loops=loops) == right
        assert result.score(loops=loops) == pytest.approx(np.mean(right))
        for hops in (1, 2):
            group = [one for one, of in zip(right, batch.keys["hops"].tolist(), strict=True) if of == hops]
            assert result.score(loops=loops, by=("hops", hops)) == pytest.approx(np.mean(group))
        values, _ = evaluate(run.model, run.held_out(ROWS, "test"), loops)
        assert {name: result.score(name, loops=loops) for name in values} == pytest.approx(values)
        shares = result.items("token_accuracy", loops=loops)
        by_hand = (logits.argmax(-1) == batch.targets_BT).sum(1) / (batch.targets_BT != -100).sum(1)
        assert shares == pytest.approx(by_hand.tolist(), abs=1e-4)
        twos = [share for share, of in zip(shares, batch.keys["hops"].tolist(), strict=True) if of == 2]
        assert result.score("token_accuracy", loops=loops, by=("hops", 2)) == pytest.approx(np.mean(twos), abs=1e-4)
    assert items_of([result]).shape == (1, ROWS)
    assert scores["flops"] == run.carry.flops
    slots = {loops: scores["loops"][str(loops)]["slots"] for loops in (2, 3)}
    assert slots == {2: 2, 3: 3}


def test_points_are_scored_by_place_and_prompt(tmp_path: Path) -> None:
    config = small(
        model=RegressionModel(inputs=2, layers=1, width=8, heads=1, plan="core:(0)x2"),
        data=RegressionData(task=LinearRegression(inputs=2, num_points=5)),
        evaluation=Evaluation(rows=8, samples=0),
    )
    scores = perform(config, tmp_path / "run", rows=ROWS)
    result = RunResult(name="a", config=config, folder=tmp_path / "run", scores=scores)
    points = [result.score("loss", by=("point", place)) for place in range(1, 6)]
    assert np.mean(points) == pytest.approx(result.score("loss"))
    assert np.mean(result.items("loss")) == pytest.approx(result.score("loss"), rel=1e-4)
    with pytest.raises(ValueError, match="no 'accuracy' of all rows; there is loss"):
        result.score()


def test_curves_carry_the_flops_of_their_steps(tmp_path: Path) -> None:
    config = small(log_every=4)
    do_here([Job(name="a", config=config, rows=ROWS)], tmp_path)
    (result,) = run_all([Job(name="a", config=config, rows=ROWS)], tmp_path)
    curve = result.curve("eval/loss")
    assert [step for step, _, _ in curve] == [2, 4, 6]
    # Every step costs the same here, whether its line was logged or not.
    assert [flops for _, flops, _ in curve] == pytest.approx([result.flops * step / 6 for step in (2, 4, 6)])


def test_a_hash_says_what_is_trained_and_nothing_else() -> None:
    assert config_hash(small()) == config_hash(small(name="other"))
    others = [small(seed=1), small(steps=7), small(optimizer=replace(small().optimizer, lr=1e-4))]
    assert len({config_hash(config) for config in [small(), *others]}) == 4


def test_more_rows_or_loops_score_the_same_run_again(tmp_path: Path) -> None:
    first = perform(small(), tmp_path / "run", rows=ROWS)
    again = perform(small(), tmp_path / "run", rows=2 * ROWS, loops=(5,))
    assert len(again["loops"]["2"]["items"]) == 2 * ROWS
    items = [scores["loops"]["2"]["token_items"][:ROWS] for scores in (first, again)]
    assert items[0] == items[1]
    assert "5" in again["loops"] and again["flops"] == first["flops"]


def test_finished_runs_on_other_data_are_refused(tmp_path: Path) -> None:
    job = Job(name="a", config=small(data=TaskData(task=PHop(context=10, alphabet=3, hops=(1,)))), rows=ROWS)
    do_here([job], tmp_path)
    path = tmp_path / config_hash(job.config) / SCORES
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": "0" * 64}))
    with pytest.raises(ValueError, match="delete the folder"):
        run_all([job], tmp_path)


@pytest.mark.parametrize(("jobs", "workers"), [([], 1), ([Job(name="a", config=small())], 0)])
def test_bad_batches(jobs: list[Job], workers: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        run_all(jobs, tmp_path, num_workers=workers)


def test_scores_that_are_not_there_are_named(tmp_path: Path) -> None:
    scores = perform(small(), tmp_path / "run", rows=ROWS)
    result = RunResult(name="a", config=small(), folder=tmp_path / "run", scores=scores)
    with pytest.raises(ValueError, match="not scored at 9 iterations, only at 2"):
        result.score(loops=9)
    with pytest.raises(ValueError, match=r"no 'accuracy' of \('hops', 7\)"):
        result.score(by=("hops", 7))
    with pytest.raises(ValueError, match=r"no 'loss' of \('hops', 1\)"):
        result.score("loss", by=("hops", 1))
    with pytest.raises(ValueError, match="items have no 'loss'"):
        result.items("loss")
