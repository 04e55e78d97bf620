"""The verb `loopwise tour`: watch an answer form, iteration by iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from loopwise.cli import common

if TYPE_CHECKING:
    from loopwise.study.tour import TourModel

_SHADES = " .:-=+*#%@"


@dataclass(frozen=True, kw_only=True)
class Tour:
    """Show a small trained model (in the package, 1 layer) answering a question better with every iteration."""

    row: Annotated[int, arg(metavar="NUMBER")] = 0
    """which of the held-out questions to show"""
    iterations: int = 8
    """how many iterations to watch"""
    png: common.FilePath = None
    """also draw accuracy by hops and iterations in this file"""
    json: common.FilePath = None
    """also write what is shown as JSON to this file"""

    def run(self) -> None:
        """Print the question, the answer after every iteration, and accuracy by iterations and hops."""
        if not 0 <= self.row < 10_000:
            raise ValueError(f"--row {self.row}: use 0 to 9999")
        if not 1 <= self.iterations <= 64:
            raise ValueError(f"--iterations {self.iterations}: use 1 to 64")
        for path in (self.png, self.json):
            common.check_writable(path)
        common.quiet_libraries()
        from loopwise.study.tour import accuracy_grid, chain, hardest_row, open_tour, sayings

        tour = open_tour()
        tokens_T = hardest_row(tour.task, self.row)
        said = sayings(tour, tokens_T, self.iterations)
        counts = sorted({*range(1, self.iterations + 1), 2 * self.iterations})
        grid = accuracy_grid(tour, counts)
        most = max(tour.task.hops)
        console = common.console()
        console.print(_about(tour), soft_wrap=True)
        console.print(_question(tour, tokens_T, chain(tokens_T, most, tour.task.alphabet)), soft_wrap=True)
        console.print(_answers(tour, said, most))
        console.print(_table(tour, grid, self.iterations))
        if self.png is not None:
            from loopwise.plots.curves import Curve, Panel, draw_panels

            curves = [
                Curve(label=_hops(hops), x=counts, y=[grid[count][hops] for count in counts]) for hops in tour.task.hops
            ]
            panel = Panel(
                curves=curves,
                x_label="iterations",
                y_label="share of held-out letters that are right",
                level=(1 / tour.task.alphabet, "chance"),
            )
            title = "more hops need more iterations of the same layer"
            common.write_whole(self.png, lambda path: draw_panels([panel], path, title=title))
        if self.json is not None:
            data = {
                "about": tour.about,
                "tokens": tokens_T.tolist(),
                "answers": [vars(item) for item in said],
                "accuracy": grid,
                "versions": common.versions(),
            }
            common.write_json(self.json, data)


def _about(tour: TourModel) -> str:
    parameters = sum(item.numel() for item in tour.model.parameters())
    return (
        f"A model with 1 layer and {parameters:,} parameters, trained by `loopwise train {tour.about['recipe']}` "
        f"(seed {tour.about['seed']}) at 1 to 8 iterations.\n"
    )


def _question(tour: TourModel, tokens_T: Any, places: list[int]) -> str:
    words = tour.task.vocabulary
    letters = "".join(words[token] for token in tokens_T[1:])
    marks = [" "] * len(letters)
    for hop, place in enumerate(places):
        marks[place - 1] = str(hop)
    return (
        f"A hop goes from a letter to just after its previous occurrence. {_hops(max(tour.task.hops))} back from the "
        f"last letter, which letter is there?\n\n  {letters}\n  {''.join(marks).rstrip()}   (where each hop lands)\n"
    )


def _answers(tour: TourModel, said: list[Any], most: int) -> str:
    words = tour.task.vocabulary
    lines = ["iteration  answer  probability  of the right answer"]
    for item in said:
        bar = "#" * round(20 * item.right)
        right = most in item.hops
        note = "right" if right else (f"right for {_list(item.hops)} hops" if item.hops else "")
        answer = f"{words[item.letter]:>6}  {item.probability:>11.3f}"
        lines.append(f"{item.iteration:>9}  {answer}  {item.right:.3f} {bar:<20} {note}")
    return "\n".join(lines) + "\n"


def _table(tour: TourModel, grid: dict[int, dict[int, float]], shown: int) -> str:
    header = (
        "share of held-out letters that are right\n" + "iterations " + "".join(f"{_hops(h):>8}" for h in tour.task.hops)
    )
    lines = [header]
    for count, shares in grid.items():
        cells = "".join(f"{_SHADES[round(9 * share)]:>3}{share:5.2f}" for share in shares.values())
        lines.append(f"{count:>10} {cells}")
    lines.append("\nOne layer, the same weights: what more iterations bring is not in more parameters.")
    return "\n".join(lines)


def _hops(count: int) -> str:
    return f"{count} hop{'s' * (count != 1)}"


def _list(values: tuple[int, ...]) -> str:
    return " or ".join(map(str, values))
