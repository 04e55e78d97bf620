"""Pictures: what they show, that nothing overlaps or is cut off, that the same input gives the same file."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.text import Text

from loopwise.plan import Plan, PlanError
from loopwise.plots import plan_picture, plan_text, score_bars
from loopwise.plots.bars import score_figure
from loopwise.plots.picture import PLAIN, plan_figure, shorten

PLANS = [
    "0-5",
    "5x3",
    "7",
    "0-9 (10-19)x2 20-29",
    "0-9 20-29",
    "0-1 core:(2-5)x8[read=e, update=concat] 6-7",
    "0-3 core:(4-7)x32[read=e, update=concat, norm=every, init=truncated_normal, mean=0] 8-11",
    "a:(0-1 b:(2 3)x2[norm=every])x3 4",
    "outer:(0-3 inner:(4-6 deep:(7)x3)x2 8)x4 9-11",
    "0-9 5-14 (3)x2 (4)x2 one:(5)x3[read=everything, update=concat] two:(6)x2[read=everything] 15",
    "(0)x2 (1)x2 (2)x2 (3)x2 (4)x2 (5)x2 (6)x2 (7)x2",
    "core:(0-5)x200",
    "0-79",
]
ROWS = [
    {
        "label": "plain",
        "plan": "0-29",
        "perplexity": 18.2,
        "num_slots": 30,
        "unique_layers": 30,
        "flops_per_token": 2.7e8,
    },
    {"label": "0-9 (10-19)x2 20-29", "plan": "0-9 (10-19)x2 20-29", "perplexity": 31.4, "num_slots": 40},
    {"label": "pruned", "plan": "0-14 16-29", "perplexity": 21.7, "num_slots": 29, "unique_layers": 29},
    {"label": "often", "plan": "0-9 core:(10-19)x8[read=e, update=concat, norm=every] 20-29", "perplexity": 45.0},
    {"label": "a very long label of a plan that somebody gave a whole sentence", "perplexity": 88.1, "slots": 50},
]


def boxes(figure: Figure) -> list[tuple[str, object]]:
    """Every text that is drawn, with its box in pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    hidden = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        first, last = sorted(axis.get_view_interval())
        ticks = (*axis.get_major_ticks(), *axis.get_minor_ticks())
        hidden.update(tick.label1 for tick in ticks if not first <= tick.get_loc() <= last)
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in hidden]
    return [(t.get_text(), t.get_window_extent(canvas.get_renderer())) for t in texts]


def assert_readable(figure: Figure) -> None:
    found = boxes(figure)
    width, height = figure.canvas.get_width_height()
    for text, box in found:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, f"cut off: {text}"
    for (a, box_a), (b, box_b) in itertools.combinations(found, 2):
        across = min(box_a.x1, box_b.x1) - max(box_a.x0, box_b.x0)
        along = min(box_a.y1, box_b.y1) - max(box_a.y0, box_b.y0)
        assert across <= 0 or along <= 0, f"{a!r} and {b!r} overlap"


@pytest.mark.parametrize("plan", PLANS)
def test_plan_pictures_are_readable(plan: str) -> None:
    assert_readable(plan_figure(plan))


@pytest.mark.parametrize("plan", PLANS)
def test_every_visit_is_a_square_at_its_layer(plan: str) -> None:
    axes = plan_figure(plan).axes[0]
    (squares,) = axes.findobj(PathCollection)
    points = [(int(x), int(y)) for x, y in squares.get_offsets()]
    assert points == list(enumerate(Plan.parse(plan).layers))
    assert [tick for tick in axes.get_yticks() if tick not in range(max(y for _, y in points) + 1)] == []


def test_loops_have_colours_of_their_own() -> None:
    from matplotlib.colors import to_hex

    axes = plan_figure("0 a:(1 b:(2)x2)x2 c:(3)x2").axes[0]
    (squares,) = axes.findobj(PathCollection)
    colours = [to_hex(colour) for colour in squares.get_facecolors()]
    plain, a, b, c = colours[0], colours[1], colours[2], colours[-1]
    assert colours == [plain, a, b, b, a, b, b, c, c]
    assert len({plain, a, b, c}) == 4 and plain == to_hex(PLAIN)


def test_labels_say_name_count_and_annotations() -> None:
    texts = [text for text, _ in boxes(plan_figure("0 core:(1-2)x8[read=e] (3)x2"))]
    assert "core x8 [read=e]" in texts and "x2" in texts
    assert {"slot (visit order)", "physical layer", "19 slots over 4 layers"} <= set(texts)
    assert any("not visited: 0, 3-5" in text for text, _ in boxes(plan_figure("1-2 6")))


def test_a_plan_with_very_many_runs_of_a_loop_is_still_drawn(tmp_path: Path) -> None:
    assert plan_picture("((0)x2 1)x8000", tmp_path / "many.png").stat().st_size > 0


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], ROWS * 2, [{"label": "a", "perplexity": 12.0}]])
def test_score_pictures_are_readable(rows: list[dict]) -> None:
    assert_readable(score_figure(rows))


def test_scores_of_very_different_size_get_a_log_axis() -> None:
    far = [
        *ROWS,
        {**ROWS[1], "perplexity": 43210.0},
        {**ROWS[1], "perplexity": math.inf},
        {**ROWS[1], "perplexity": math.nan},
    ]
    assert score_figure(ROWS).axes[0].get_xscale() == "linear"
    figure = score_figure(far)
    assert figure.axes[0].get_xscale() == "log"
    assert_readable(figure)
    texts = [text for text, _ in boxes(figure)]
    assert "43,210  x2.37e+03" in texts and "inf" in texts and "nan" in texts


def test_bars_are_as_long_as_the_perplexities() -> None:
    axes = score_figure(ROWS).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [row["perplexity"] for row in ROWS]
    texts = [text for text, _ in boxes(axes.figure)]
    assert {"18.2", "31.4  x1.73", "plain", "0-29", "slots", "layers", "FLOPs\nper token", "270 M", "40", "50"} <= set(
        texts
    )


def test_columns_nobody_fills_are_left_out() -> None:
    texts = [text for text, _ in boxes(score_figure([{"label": "a", "perplexity": 3.0}]))]
    assert "slots" not in texts and "layers" not in texts


def test_files_are_png_and_the_same_each_time(tmp_path: Path) -> None:
    for draw, what in ((plan_picture, PLANS[5]), (score_bars, ROWS)):
        paths = [draw(what, tmp_path / f"{name}.img") for name in "ab"]
        data = [path.read_bytes() for path in paths]
        assert data[0].startswith(b"\x89PNG") and data[0] == data[1]
        # The version of matplotlib is not written into the file.
        assert b"matplotlib" not in data[0].lower()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one row"),
        ([{"label": "a"}], "no perplexity"),
        ([ROWS[0], {"perplexity": 2.0}], "row 1 .* no label"),
        ([{"label": "a", "perplexity": 0.0}], "positive"),
        ([{"label": "a", "perplexity": -math.inf}], "positive"),
    ],
)
def test_bad_rows(rows: list[dict], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        score_bars(rows, tmp_path / "bars.png")
    assert not (tmp_path / "bars.png").exists()


def test_bad_plan_text(tmp_path: Path) -> None:
    for draw in (plan_text, lambda text: plan_picture(text, tmp_path / "plan.png")):
        with pytest.raises(PlanError):
            draw("0-")
    assert list(tmp_path.iterdir()) == []


def test_shorten_keeps_both_ends() -> None:
    assert shorten("abc", 3) == "abc"
    assert shorten("0123456789", 8) == "012...89"
    assert all(len(shorten("x" * 90, length)) == length for length in range(5, 60))


def test_the_rooms_need_neither_torch_nor_matplotlib_until_drawing() -> None:
    code = (
        "import sys; from loopwise.plots import plan_text; plan_text('(0-1)x2');"
        "sys.exit(','.join({'torch', 'matplotlib', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_pictures_leave_pyplot_alone(tmp_path: Path) -> None:
    code = (
        "import sys; from loopwise.plots import plan_picture;"
        f"plan_picture('(0-1)x2', {str(tmp_path / 'plan.png')!r});"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
