"""Edits in words: the words are true of the edit, for every operator."""

from __future__ import annotations

from pathlib import Path

import pytest

from loopwise.edit.explain import edit_picture, explain
from loopwise.edit.maps import DepthEdit
from loopwise.edit.operators import DepthOperator
from loopwise.edit.text import operators, parse
from loopwise.plan import Plan

GIVEN = {
    "grad_stack": "2", "midas": "2", "lidas": "2", "solar": "1", "llama_pro": "2", "repeat": "0, 2",
    "order": "[0, 1, 0]", "prune": "[1]", "tie": '"(0-2)x2"', "recursive": "2", "retrofit": "1, 3, 2", "rys": '"0,1"',
}  # fmt: skip


def edited(text: str, num_layers: int) -> DepthEdit:
    operator = parse(text)
    assert isinstance(operator, DepthOperator)
    return operator.edit(Plan.identity(num_layers), num_layers)


def lines(text: str, num_layers: int, **options: object) -> list[str]:
    return explain(edited(text, num_layers), title=text, **options).splitlines()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [n for n, found in operators().items() if issubclass(found, DepthOperator)])
@pytest.mark.parametrize("mode", ["alias", "tie", "materialize"])
def test_every_operator_can_be_told_and_drawn(name: str, mode: str, tmp_path: Path) -> None:
    edit = edited(f"{name}({GIVEN.get(name, '')})", 6)
    impossible = (mode == "alias" and not edit.is_copy) or (mode == "materialize" and edit.loops)
    if impossible:
        with pytest.raises(ValueError, match="'tie'"):
            explain(edit, mode=mode)
        return
    text = explain(edit, mode=mode, layer_params=[10] * 6, other_params=5)
    assert text.isascii() and all(len(line) < 200 for line in text.splitlines())
    said = "the old one" in text
    assert said == (edit.promise != "none")
    assert edit_picture(edit, tmp_path / "a.png", mode=mode).stat().st_size > 0


def test_growth_names_the_layers_that_start_as_the_identity() -> None:
    told = lines("llama_pro(2)", 4, layer_params=[10] * 4, other_params=20)
    assert told[:7] == [
        "llama_pro(2): 4 layers -> 6 layers, new tensors, a layer for every visit",
        "",
        "  new 0-1  old 0-1",
        "  new 2    old 1 with output projections at zero: starts as the identity",
        "  new 3-4  old 2-3",
        "  new 5    old 3 with output projections at zero: starts as the identity",
        "",
    ]
    assert "function    the old one, exactly" in told
    assert "parameters  60 -> 80 (+33.3%)" in told
    assert "next        train the new layers alone (2, 5): loopwise uptrain DIR --method new_layers" in told


def test_sharing_says_what_is_lost_and_given_back() -> None:
    told = lines("recursive(2, middle_cycle, average, rank=8)", 6)
    assert "  new 1-2  mean of old 1-2 and 3-4" in told
    assert any("4 of 6 visits run with other tensors" in line and "rank 8" in line for line in told)
    assert "visits      6 -> 6 per token, as many" in told
    assert "  new 0  mean of old 0-2" in lines("recursive(2, sequence, average)".replace("2,", "3,"), 6)


def test_what_is_left_out_and_what_never_met() -> None:
    told = lines("retrofit(1, 2, 1)", 6)
    assert "  old 1-2 left out" in told
    assert any(line.endswith("follow each other: 0 -> 3") for line in told)
    assert any("23 -> 8" in line for line in lines("solar(8)", 32))
    assert any("1 -> output" in line for line in lines("prune([2])", 3))
    many = [line for line in lines("interleave(2)", 30) if "and 26 more" in line]
    assert len(many) == 1


def test_scales_are_named() -> None:
    told = lines('order([0, 1, 1], scale=["1 q_proj 0.5", "2 * 3"])', 2)
    assert "  new 1  old 1, q_proj x0.5" in told and "  new 2  old 1, every tensor x3" in told
    assert any("tensors are scaled" in line for line in told)


def test_an_alias_keeps_its_tensors() -> None:
    told = lines("repeat(1, 3, 2)", 4, mode="alias", layer_params=[1] * 4)
    assert told[0].endswith("the old tensors under another plan") and "  new 0-3  old 0-3" in told
    assert "parameters  4 -> 4 (+0.0%)" in told and any("layers 1-2" in line for line in told)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="mode 'tied' must be one of alias"):
        lines("stack(2)", 2, mode="tied")
    with pytest.raises(ValueError, match="3 numbers for 2 layers"):
        lines("stack(2)", 2, layer_params=[1] * 3)
