"""The small trained model in the package: whole, loaded, and better with depth."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from loopwise.models.attach import plan_of
from loopwise.recipes import find
from loopwise.study import tour as tours
from loopwise.tasks.cycle_walk import FIRST_NODE


@pytest.fixture(scope="module")
def tour() -> tours.TourModel:
    return tours.open_tour()


@pytest.fixture(scope="module")
def grid(tour: tours.TourModel) -> dict[int, dict[int, float]]:
    return tours.accuracy_grid(tour, [1, 2, 3, 4, 8, 16], num_rows=256)


def test_it_is_small_and_that_of_its_recipe(tour: tours.TourModel) -> None:
    assert sum(path.stat().st_size for path in tours.FOLDER.iterdir()) <= 1_000_000
    config = find("tour")
    assert (tour.about["recipe"], tour.about["seed"], tour.about["steps"]) == ("tour", config.seed, config.num_steps)
    assert tour.task == config.data.task  # type: ignore[attr-defined]
    assert str(plan_of(tour.model)) == config.model.plan  # type: ignore[attr-defined]
    assert tour.model.config.num_hidden_layers == 1


def test_deeper_is_better(grid: dict[int, dict[int, float]]) -> None:
    """At every number of steps accuracy rises with iterations until it is learned, and stays."""
    for steps in (1, 2, 3, 4):
        curve = [grid[count][steps] for count in (1, 2, 3, 4)]
        assert all(after >= before - 0.02 for before, after in zip(curve, curve[1:], strict=False)), (steps, curve)
        assert curve[-1] > 0.98
        assert grid[16][steps] > 0.95, "twice the depth of training"
    assert all(grid[1][steps] < 0.5 for steps in (2, 3, 4)), "one iteration follows one arrow"
    assert grid[2][2] > 0.9 and grid[2][4] < 0.7


def test_its_scores_are_those_of_training(tour: tours.TourModel, grid: dict[int, dict[int, float]]) -> None:
    for count in (1, 2, 4, 8):
        mean = sum(grid[count].values()) / len(grid[count])
        assert mean == pytest.approx(tour.about["scores"][f"eval/token_accuracy@{count}"], abs=0.06)


def test_a_question_is_answered_by_its_walk(tour: tours.TourModel) -> None:
    for index in range(3):
        asked = tours.question(tour.task, index)
        (first, *_) = tour.task.solve(asked.tokens_T)
        assert first == asked.walk[asked.steps] + FIRST_NODE
        assert sorted(asked.walk) == list(range(tour.task.nodes))
        said = tours.sayings(tour, asked, 6)
        assert [item.iteration for item in said] == [1, 2, 3, 4, 5, 6]
        assert said[-1].node == asked.walk[asked.steps] and said[-1].steps == asked.steps
        assert said[-1].right == said[-1].probability > said[0].right


def test_a_broken_or_missing_file_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tours.FOLDER, tmp_path / "tour"))
    weights = folder / tours.WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match="the tour's weights have sha256 .*: install it again"):
        tours.open_tour(folder)
    weights.unlink()
    with pytest.raises(ValueError, match="the tour's model is incomplete"):
        tours.open_tour(folder)


def test_pack_takes_only_a_finished_run(tmp_path: Path) -> None:
    from loopwise.train.config import override
    from loopwise.train.run import Run

    config = override(find("tour"), ["steps=2", "batch_size=2", "model.width=16", "model.heads=1", "evaluation.rows=4"])
    run = Run(config, tmp_path / "run")
    list(run.train(1))
    (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="is not a finished run of the recipe tour"):
        tours.pack(tmp_path / "run", tmp_path / "packed")
    list(run.train())
    tours.pack(tmp_path / "run", tmp_path / "packed")
    assert {path.name for path in (tmp_path / "packed").iterdir()} == {"about.json", "config.json", "model.safetensors"}
    assert json.loads((tmp_path / "packed" / "about.json").read_text())["steps"] == 2
    assert tours.open_tour(tmp_path / "packed").model.config.hidden_size == 16
