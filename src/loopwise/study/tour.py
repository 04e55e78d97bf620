"""Watching an answer form: what a looped model says after every iteration, on the small trained model of the package.

Shapes: B rows, T tokens, V vocabulary, R iterations.
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
from loopwise.tasks.base import IGNORE, Rows, rows
from loopwise.tasks.p_hop import PHop, find
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
    task: PHop
    about: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Saying:
    """What the model says at one position after one iteration.

    Attributes:
        iteration: from 1.
        letter: token that it finds most probable.
        probability: of that token.
        right: probability of the right token.
        hops: numbers of hops, among those of the task, for which the letter would be right.
    """

    iteration: int
    letter: int
    probability: float
    right: float
    hops: tuple[int, ...]


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
    return TourModel(model=load(folder).eval(), task=cast(PHop, task), about=about)


def sayings(tour: TourModel, tokens_T: np.ndarray, iterations: int, position: int = -1) -> list[Saying]:
    """What the model says at a position of one row after each of some iterations."""
    tokens_1T = torch.from_numpy(tokens_T)[None]
    with torch.no_grad():
        output = tour.model(tokens_1T, loops=iterations, output_loops=True, use_cache=False)
    letters = answers(tour.task, tokens_T, position)
    hops = tour.task.hops[int(tokens_T[0]) - len(tour.task.vocabulary) + len(tour.task.hops)]
    found = []
    for iteration, logits in enumerate(output.loop_logits, start=1):
        probability_V = logits[0, position].softmax(-1)
        letter = int(probability_V.argmax())
        found.append(
            Saying(
                iteration=iteration,
                letter=letter,
                probability=float(probability_V[letter]),
                right=float(probability_V[letters[hops]]),
                hops=tuple(count for count, answer in letters.items() if answer == letter),
            )
        )
    return found


def answers(task: PHop, tokens_T: np.ndarray, position: int = -1) -> dict[int, int]:
    """The right token at a position for each number of hops of the task."""
    place = position % len(tokens_T) - 1
    return {count: int(task.labels(_letters(tokens_T)[None], np.array([count]), [place])[0, 0]) for count in task.hops}


def chain(tokens_T: np.ndarray, hops: int, alphabet: int, position: int = -1) -> list[int]:
    """The positions in the row that the hops visit, the asked one first; shorter where a hop is undefined."""
    next_N = find(_letters(tokens_T)[None], alphabet)[0]
    place, seen = position % len(tokens_T) - 1, []
    for _ in range(hops + 1):
        seen.append(place + 1)
        if place >= len(next_N) or next_N[place] >= len(next_N):
            break
        place = int(next_N[place])
    return seen


def accuracy_grid(tour: TourModel, iterations: list[int], num_rows: int = 512) -> dict[int, dict[int, float]]:
    """Share of held-out letters that are right, by iterations and by hops: `{iterations: {hops: share}}`."""
    drawn = rows(tour.task, seed=0, index=0, size=num_rows, split="test")
    grid: dict[int, dict[int, float]] = {}
    for count in iterations:
        with torch.no_grad():
            logits = tour.model(torch.from_numpy(drawn.tokens_BT), loops=count, use_cache=False).logits
        right_BT = logits.argmax(-1).numpy() == drawn.targets_BT
        grid[count] = {hops: _share(right_BT, drawn, hops) for hops in tour.task.hops}
    return grid


def hardest_row(task: PHop, index: int = 0) -> np.ndarray:
    """A held-out row with the most hops whose last letter has an answer that fewer hops do not give."""
    drawn = rows(task, seed=1, index=index, size=256, split="test")
    most = max(task.hops)
    for tokens_T, hops in zip(drawn.tokens_BT, drawn.keys["hops"], strict=True):
        found = answers(task, tokens_T)
        path = chain(tokens_T, most, task.alphabet)
        if hops == most and len(path) == most + 1 and sum(found[most] == other for other in found.values()) == 1:
            return tokens_T
    return drawn.tokens_BT[int(np.argmax(drawn.keys["hops"]))]


def _letters(tokens_T: np.ndarray) -> np.ndarray:
    first = 2  # after padding and "undefined"
    return tokens_T[1:] - first


def _share(right_BT: np.ndarray, drawn: Rows, hops: int) -> float:
    here = (drawn.targets_BT != IGNORE) & (drawn.keys["hops"] == hops)[:, None]
    return float(right_BT[here].mean())


def pack(run_folder: Path, folder: Path = FOLDER) -> None:
    """Put the model of a finished run of the recipe `tour` in the place of the tour's model.

    Raises:
        ValueError: the run is not finished, or is not on p-hop.
    """
    config = read_config(run_folder / CONFIG)
    task = getattr(config.data, "task", None)
    lines = [line for line in read_metrics(run_folder / METRICS) if "eval/accuracy" in line]
    if not isinstance(task, PHop) or not lines or lines[-1]["step"] != config.num_steps:
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
