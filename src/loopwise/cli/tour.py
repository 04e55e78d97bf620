"""The verb `loopwise tour`: watch an answer form, iteration by iteration."""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from loopwise.cli import common

if TYPE_CHECKING:
    from loopwise.study.tour import Question, Saying, TourModel

Grid = dict[int, dict[int, float]]
_SHADES = " .:-=+*#%@"
_BAR = 20
_RIGHT = 0.9


@dataclass(frozen=True, kw_only=True)
class Tour:
    """Show a small trained model (in the package, 1 layer) answering a question better with every iteration."""

    row: Annotated[int, arg(metavar="NUMBER")] = 0
    """which of the held-out questions to show"""
    iterations: int = 8
    """how many iterations to watch"""
    png: common.FilePath = None
    """also draw accuracy by steps and iterations in this file"""
    json: common.FilePath = None
    """also write what is shown as JSON to this file"""

    def run(self) -> None:
        """Print the question, the answer after every iteration, and accuracy by iterations and steps."""
        if not 0 <= self.row < 10_000:
            raise ValueError(f"--row {self.row}: use 0 to 9999")
        if not 1 <= self.iterations <= 64:
            raise ValueError(f"--iterations {self.iterations}: use 1 to 64")
        for path in (self.png, self.json):
            common.check_writable(path)
        common.quiet_libraries()
        from loopwise.study.tour import accuracy_grid, open_tour, question, sayings

        tour = open_tour()
        asked = question(tour.task, self.row)
        said = sayings(tour, asked, self.iterations)
        grid = accuracy_grid(tour, sorted({*range(1, self.iterations + 1), 2 * self.iterations}))
        console = common.console()
        for part in (about(tour), asking(asked), answers(asked, said), table(tour, grid)):
            console.print(part, soft_wrap=True, markup=False)
        if self.png is not None:
            common.write_whole(self.png, lambda path: draw(tour, grid, path))
        if self.json is not None:
            data = {
                "about": tour.about,
                "question": {
                    "tokens": asked.tokens_T.tolist(),
                    "steps": asked.steps,
                    "successors": asked.successors,
                    "walk": asked.walk,
                },
                "answers": [vars(item) for item in said],
                "accuracy": grid,
                "versions": common.versions(),
            }
            common.write_json(self.json, data)


def about(tour: TourModel) -> str:
    """What the model is."""
    parameters = sum(item.numel() for item in tour.model.parameters())
    return (
        f"A model with 1 layer and {parameters:,} parameters, trained by `loopwise train {tour.about['recipe']}` "
        f"(seed {tour.about['seed']}).\nAn iteration runs that layer once more, with the same weights.\n"
    )


def asking(asked: Question) -> str:
    """The question, and the walk that answers it with the number of the step under each letter."""
    arrows = "  ".join(f"{letter(node)}>{letter(after)}" for node, after in enumerate(asked.successors))
    walk = asked.walk[: asked.steps + 1]
    return (
        f"Arrows lead from letter to letter:  {arrows}\n"
        f"Start at {letter(walk[0])} and follow {asked.steps} arrows: where are you?\n\n"
        f"  the walk   {' > '.join(map(letter, walk))}\n"
        f"  arrows     {'   '.join(str(step) for step in range(len(walk)))}\n"
    )


def answers(asked: Question, said: list[Saying]) -> str:
    """The answer after every iteration."""
    lines = ["iteration  answer  its probability  probability of the right answer"]
    for item in said:
        if item.steps == asked.steps:
            note = "right"
        else:
            note = "not a letter" if item.steps is None else f"{count(item.steps, 'arrow')} along the walk"
        bar = "#" * round(_BAR * item.right)
        lines.append(
            f"{item.iteration:>9}  {letter(item.node):>6}  {item.probability:>15.3f}  {item.right:.3f} "
            f"{bar:<{_BAR}}  {note}"
        )
    return "\n".join(lines) + "\n"


def table(tour: TourModel, grid: Grid) -> str:
    """Accuracy by iterations and steps; what is learned is marked, so that it forms a staircase."""
    columns = [count(steps, "arrow") for steps in tour.task.hops]
    lines = [
        "share of held-out questions answered right",
        "iterations" + "".join(f"{name:>11}" for name in columns),
    ]
    for iterations, shares in grid.items():
        cells = "".join(f"{_SHADES[round(9 * share)] * 2:>5} {share:5.2f}" for share in shares.values())
        lines.append(f"{iterations:>10}{cells}")
    first = {
        steps: next((iterations for iterations, shares in grid.items() if shares[steps] >= _RIGHT), None)
        for steps in tour.task.hops
    }
    needed = ", ".join(f"{count(steps, 'arrow')}: {least or 'more'}" for steps, least in first.items())
    lines += [
        f"\nIterations until {_RIGHT:.0%} are right ({needed}).",
        "More arrows need more iterations, not more parameters; training drew 1 to 8 iterations at random.",
    ]
    return "\n".join(lines)


def draw(tour: TourModel, grid: Grid, path: Path) -> None:
    """Accuracy over iterations, a curve for each number of steps."""
    from loopwise.plots.curves import Curve, Panel, draw_panels

    curves = [
        Curve(label=count(steps, "arrow"), x=list(grid), y=[shares[steps] for shares in grid.values()])
        for steps in tour.task.hops
    ]
    panel = Panel(
        curves=curves,
        x_label="iterations",
        y_label="share of held-out questions answered right",
        level=(1 / tour.task.nodes, "chance"),
    )
    draw_panels([panel], path, title="One layer: to follow more arrows takes more iterations")


def letter(node: int | None) -> str:
    """What a node is called."""
    return "?" if node is None else string.ascii_lowercase[node]


def count(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number} {noun}{'s' * (number != 1)}"
