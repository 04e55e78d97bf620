from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loopwise.edit.operators import Midas
from loopwise.edit.schedule import prop_alpha
from loopwise.models.playing import looping_of
from loopwise.plan import Plan
from loopwise.study.pool import Job, run_all
from loopwise.study.probe import PLANS, scored_under, weights_at
from loopwise.study.scoring import RunResult
from loopwise.train.config import Evaluation, Saving
from loopwise.train.evaluate import evaluate
from loopwise.train.growth import grow
from loopwise.train.models import DecoderModel
from loopwise.train.run import Run
from tests.study.studies import do_here, small

ROWS = 48


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A model that grew from 1 layer to 3, with a checkpoint at the end of every stage."""
    config = small(
        model=DecoderModel(layers=1, width=16, heads=2),
        stages=grow(Midas(b=1), prop_alpha(6, 3, 1)),
        evaluation=Evaluation(rows=16, samples=0),
        saving=Saving(every=1, keep_every=1),
    )
    return done(Job(name="grown", config=config, rows=ROWS), tmp_path_factory.mktemp("runs"))


def done(job: Job, folder: Path) -> RunResult:
    do_here([job], folder)
    (found,) = run_all([job], folder)
    return found


def test_its_own_plan_gives_the_score_that_a_run_has(grown: RunResult) -> None:
    found = scored_under(grown, ["0-2"])["0-2"]
    own = grown.scores["loops"][grown.scores["plan_loops"]]
    assert found == own


def test_extra_passes_are_those_of_the_trained_model(grown: RunResult) -> None:
    plans = ["0 (1)x2 2", "0-2", "2 0"]
    found = scored_under(grown, plans)
    assert list(found) == plans
    run = Run.open(grown.folder)
    looping = looping_of(run.model)
    assert looping is not None
    for plan in plans:
        looping.plan = Plan.parse(plan)
        values, _ = evaluate(run.model, run.held_out(ROWS, "test"))
        assert values["loss"] == found[plan]["loss"]
    run.close()
    assert len({item["loss"] for item in found.values()}) == 3


def test_what_is_known_is_read_again(grown: RunResult) -> None:
    first = scored_under(grown, ["0 (1)x3 2"])
    path = grown.folder / PLANS
    kept = json.loads(path.read_text())
    kept[str(ROWS)]["0 (1)x3 2"]["loss"] = 7.0
    path.write_text(json.dumps(kept))
    assert first["0 (1)x3 2"]["loss"] != 7.0
    assert scored_under(grown, ["0 (1)x3 2"])["0 (1)x3 2"]["loss"] == 7.0


def test_a_plan_that_does_not_fit_is_refused(grown: RunResult) -> None:
    with pytest.raises(ValueError, match="7"):
        scored_under(grown, ["0 7"])


def test_weights_are_those_of_the_step(grown: RunResult) -> None:
    last = weights_at(grown, 6)
    saved = load_file(grown.folder / "model" / "model.safetensors")
    for name, tensor in saved.items():
        assert torch.equal(last[name], tensor)
    depths = [sum(name.endswith("q_proj.weight") for name in weights_at(grown, step)) for step in (1, 3, 6)]
    assert depths == [1, 2, 3]


def test_a_checkpoint_that_was_not_kept_is_named(grown: RunResult) -> None:
    with pytest.raises(ValueError, match="no checkpoint of step 9, only of 1, 2"):
        weights_at(grown, 9)


def test_a_run_that_has_diverged_has_no_scores_under_other_plans(tmp_path: Path) -> None:
    hot = small(optimizer=replace(small().optimizer, lr=1e30), clip=1e30)
    found = done(Job(name="hot", config=hot, rows=ROWS), tmp_path)
    with pytest.raises(ValueError, match="diverged"):
        scored_under(found, ["core:(0)x3"])
