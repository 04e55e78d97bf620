"""Watching an answer form: what a looped model says after every iteration, on the small trained model of the package.

Shapes: B rows, T tokens, V vocabulary, R iterations, N nodes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from loopwise.checkpoints.loading import load
from loopwise.io.atomic import write_text
from loopwise.loop import config as components
from loopwise.tasks.base import IGNORE, rows
from loopwise.tasks.cycle_walk import FIRST_NODE, CycleWalk
from loopwise.train.config import read_config
from loopwise.train.metrics import read_metrics
from loopwise.train.run import CONFIG, METRICS, MODEL

FOLDER = Path(__file__).parent / "tour_model"
WEIGHTS, ABOUT = "model.safetensors", "about.json"


@dataclass(frozen=True, kw_only=True)
class TourModel:
    """The model and where it comes from.

    Attributes:
        model: the looped model, in evaluation mode.
        task: what it was trained on.
        about: "recipe", "seed", "steps", "sha256" of the weights, "scores" after training, and "versions".
    """

    model: Any
    task: CycleWalk
    about: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Saying:
    """What the model says at one position after one iteration.

    Attributes:
        iteration: from 1.
        node: what it finds most probable, from 0; None where that is no node.
        probability: of it.
        right: probability of the right node.
        steps: how many steps along the walk from the start the node is.
    """

    iteration: int
    node: int | None
    probability: float
    right: float
    steps: int | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """One start of a row of the task.

    Attributes:
        tokens_T: the row, int64.
        position: the token of the start, where the model answers.
        steps: how many steps are asked for.
        successors: the node after each node.
        walk: the nodes in the order in which a walk from the start visits them, all N of them.
    """

    tokens_T: np.ndarray
    position: int
    steps: int
    successors: tuple[int, ...]
    walk: tuple[int, ...]


def open_tour(folder: Path = FOLDER) -> TourModel:
    """Load the model, checking that its weights are those that its recipe gave.

    Raises:
        ValueError: the folder is incomplete, or the weights have another hash.
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        found = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"the tour's model is incomplete: {error}") from None
    if found != about["sha256"]:
        raise ValueError(f"the tour's weights have sha256 {found}, its recipe gave {about['sha256']}: install it again")
    task = components.from_dict(about["task"])
    return TourModel(model=load(folder).eval(), task=cast(CycleWalk, task), about=about)


def sayings(tour: TourModel, question: Question, iterations: int) -> list[Saying]:
    """What the model says to a question after each of some iterations."""
    tokens_1T = torch.from_numpy(question.tokens_T)[None]
    with torch.no_grad():
        output = tour.model(tokens_1T, loops=iterations, output_loops=True, use_cache=False)
    walk, found = question.walk, []
    for iteration, logits in enumerate(output.loop_logits, start=1):
        probability_V = logits[0, question.position].softmax(-1)
        best = int(probability_V.argmax())
        node = best - FIRST_NODE if 0 <= best - FIRST_NODE < tour.task.nodes else None
        found.append(
            Saying(
                iteration=iteration,
                node=node,
                probability=float(probability_V[best]),
                right=float(probability_V[walk[question.steps] + FIRST_NODE]),
                steps=None if node is None else walk.index(node),
            )
        )
    return found


def accuracy_grid(tour: TourModel, iterations: list[int], num_rows: int = 512) -> dict[int, dict[int, float]]:
    """Share of held-out starts that are answered right, by iterations and by steps: `{iterations: {steps: share}}`."""
    drawn = rows(tour.task, seed=0, index=0, size=num_rows, split="test")
    tokens_BT, scored_BT = torch.from_numpy(drawn.tokens_BT), drawn.targets_BT != IGNORE
    grid: dict[int, dict[int, float]] = {}
    for count in iterations:
        with torch.no_grad():
            right_BT = tour.model(tokens_BT, loops=count, use_cache=False).logits.argmax(-1).numpy() == drawn.targets_BT
        here = {steps: scored_BT & (drawn.keys["hops"] == steps)[:, None] for steps in tour.task.hops}
        grid[count] = {steps: float(right_BT[mask].mean()) for steps, mask in here.items()}
    return grid


def question(task: CycleWalk, index: int = 0) -> Question:
    """A held-out question with the most steps; `index` counts them."""
    drawn = rows(task, seed=1, index=index, size=64, split="test")
    most = max(task.hops)
    place = int(np.argmax(drawn.keys["hops"] == most))
    tokens_T, position = drawn.tokens_BT[place], task.length - task.nodes
    successors = tuple(int(token) - FIRST_NODE for token in tokens_T[1 : 1 + task.nodes])
    walk = [int(tokens_T[position]) - FIRST_NODE]
    while len(walk) < task.nodes:
        walk.append(successors[walk[-1]])
    return Question(tokens_T=tokens_T, position=position, steps=most, successors=successors, walk=tuple(walk))


def pack(run_folder: Path, folder: Path = FOLDER) -> None:
    """Put the model of a finished run of the recipe `tour` in the place of the tour's model.

    Raises:
        ValueError: the run is not finished, or is not on walks around a cycle.
    """
    config = read_config(run_folder / CONFIG)
    task = getattr(config.data, "task", None)
    lines = [line for line in read_metrics(run_folder / METRICS) if "eval/accuracy" in line]
    if not isinstance(task, CycleWalk) or not lines or lines[-1]["step"] != config.num_steps:
        raise ValueError(f"{run_folder} is not a finished run of the recipe tour")
    folder.mkdir(exist_ok=True)
    for name in ("config.json", WEIGHTS):
        shutil.copyfile(run_folder / MODEL / name, folder / name)
    about = {
        "recipe": config.name,
        "seed": config.seed,
        "steps": config.num_steps,
        "task": components.to_dict(task),
        "sha256": hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
        "scores": {name: value for name, value in lines[-1].items() if name.startswith("eval/")},
        "versions": {"torch": torch.__version__},
    }
    write_text(folder / ABOUT, json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    pack(Path(sys.argv[1]))
