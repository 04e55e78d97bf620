"""Heat-maps: nothing overlaps or is cut off, NaN and diagonals stay grey, the same input gives the same file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from loopwise.plots.heatmap import Heatmap, LayerBars, draw_heatmaps, heatmap_figure
from tests.plots.test_pictures import assert_readable


def panels(num_layers: int) -> list[Heatmap | LayerBars]:
    generator = np.random.default_rng(0)
    square = generator.uniform(-1, 1, (num_layers, num_layers))
    grid = np.where(np.add.outer(np.arange(num_layers), np.arange(num_layers)) < num_layers, square, np.nan)
    names = ("self_attn.q_proj", "post_attention_layernorm", "mlp.experts.*.down_proj")
    return [
        Heatmap(values=grid, title="Angular distance over a block, last tokens", first_y=1, unit="angle / 180 degrees"),
        LayerBars(
            values=generator.uniform(0.01, 1, num_layers),
            title="Block influence: how far a layer turns the state",
            unit="1 - cosine",
            marked=(1, num_layers - 1),
            note="by the knees: prelude layers 0-2, core layers 3-28, coda layer 29",
        ),
        Heatmap(values=square, title="Weights: mlp.gate_proj, the farthest from chance", has_diagonal=False),
        Heatmap(values=square[:3], title="Weights at distance k: above chance", rows=names, low=-10, high=10),
        LayerBars(values=np.zeros(num_layers), title="Nothing", unit="none"),
    ]


@pytest.mark.parametrize("num_layers", [3, 30, 80])
@pytest.mark.parametrize("number", [1, 2, 5])
def test_panels_are_readable(num_layers: int, number: int) -> None:
    assert_readable(heatmap_figure(panels(num_layers)[:number], title="SmolLM2-135M-Instruct.Q4_1.gguf"))


def test_what_is_unknown_is_grey() -> None:
    shown = heatmap_figure([panels(6)[0]]).axes[0].images[0].get_array()
    assert shown is not None and np.ma.getmaskarray(shown).sum() == 15
    shown = heatmap_figure([panels(6)[2]]).axes[0].images[0].get_array()
    assert shown is not None and np.array_equal(np.ma.getmaskarray(shown), np.eye(6, dtype=bool))


def test_values_are_not_changed() -> None:
    values = np.ones((3, 3))
    heatmap_figure([Heatmap(values=values, title="ones", has_diagonal=False)])
    assert values.sum() == 9


def test_the_same_input_gives_the_same_file(tmp_path: Path) -> None:
    one, other = (draw_heatmaps(panels(5), tmp_path / name).read_bytes() for name in ("one.png", "other"))
    assert one == other and one.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "at least one panel"),
        ([Heatmap(values=[1.0], title="bars")], "'bars' has no values of the right shape"),
        ([LayerBars(values=[[1.0]], title="map", unit="")], "'map' has no values"),
        ([Heatmap(values=np.zeros((0, 0)), title="none")], "'none' has no values"),
    ],
)
def test_what_cannot_be_drawn(wrong: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        heatmap_figure(wrong)
