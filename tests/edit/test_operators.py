"""Operators of depth: orders by hand from the papers, promises, texts, refusals."""

from __future__ import annotations

import pytest

from loopwise.edit.maps import DepthEdit
from loopwise.edit.operators import DepthOperator
from loopwise.edit.text import operators, parse
from loopwise.plan import Plan


def edited(text: str, num_layers: int, plan: str | None = None) -> DepthEdit:
    operator = parse(text)
    assert isinstance(operator, DepthOperator)
    return operator.edit(Plan.parse(plan) if plan else Plan.identity(num_layers), num_layers)


def order(text: str, num_layers: int, plan: str | None = None) -> list[str]:
    """Old layer of every visit: "z" after zeroed ones, "+" between the layers of a mean."""
    layers = edited(text, num_layers, plan).unrolled().layers
    return ["+".join(map(str, layer.sources)) + ("z" if layer.zero else "") for layer in layers]


@pytest.mark.parametrize(
    ("text", "num_layers", "expected"),
    [
        ("stack(3)", 2, "0 1 0 1 0 1"),
        ("double", 3, "0 1 2 0 1 2"),
        ("interleave(2)", 3, "0 0 1 1 2 2"),
        ("grad_stack(2)", 6, "0 1 2 3 4 5 4 5"),
        ("midas(2)", 6, "0 1 2 3 2 3 4 5"),
        ("midas(4)", 8, "0 1 2 3 0 1 2 3 4 5 6 7"),
        ("midas(2)", 2, "0 1 0 1"),
        ("lidas(4)", 8, "0 1 2 3 2 3 4 5 4 5 6 7"),
        ("lidas(4)", 4, "0 1 0 1 2 3 2 3"),
        ("solar(1)", 4, "0 1 2 1 2 3"),
        ("llama_pro(every=2)", 4, "0 1 1z 2 3 3z"),
        ("repeat(1, 3, 2)", 4, "0 1 2 1 2 3"),
        ("repeat(1, 2, times=3)", 3, "0 1 1 1 2"),
        ("prune([1, 2])", 4, "0 3"),
        ("recursive(2, cycle)", 4, "0 3 0 3"),
        ("recursive(2, cycle, average)", 4, "0+2 1+3 0+2 1+3"),
        ("recursive(2, sequence, average)", 4, "0+1 0+1 2+3 2+3"),
        ("recursive(2, middle_cycle, lower)", 6, "0 1 2 1 2 5"),
        ("recursive(2, middle_cycle, upper)", 6, "0 3 4 3 4 5"),
        ("recursive(2, middle_sequence, average)", 6, "0 1+2 1+2 3+4 3+4 5"),
        ("order([3, 1], zero=[1])", 4, "3 1z"),
        ('retrofit(1, 2, 1, adapter="none")', 6, "0 3 4 5"),
    ],
)
def test_orders_are_those_of_the_papers(text: str, num_layers: int, expected: str) -> None:
    assert order(text, num_layers) == expected.split()


@pytest.mark.parametrize(
    ("text", "promise"),
    [
        ("llama_pro(2)", "exact"),
        ("stack(2)", "none"),
        ("prune([3])", "none"),
        ("recursive(2, cycle, average, rank=-1)", "tolerance"),
        ("recursive(2, cycle, average, rank=3)", "none"),
        ("retrofit(1, 2, 1)", "exact"),
        ("retrofit(1, 1, 1)", "none"),
    ],
)
def test_what_is_promised_follows_from_the_layers(text: str, promise: str) -> None:
    assert edited(text, 4).promise == promise


def test_untie_and_tie_undo_each_other() -> None:
    plan = "0 core:(1-2)x3 3"
    untied = edited("untie()", 4, plan)
    assert untied.promise == "exact"
    back = untied.then(edited(f'tie("{plan}", init="first")', 8))
    assert str(back.plan) == plan
    assert [layer.sources for layer in back.layers] == [(0,), (1,), (2,), (3,)]


def test_growth_of_a_loop_is_one_edit() -> None:
    grown = edited("untie()", 3, "0 (1)x2 2").then(edited("llama_pro(2)", 4))
    assert [layer.sources for layer in grown.layers] == [(0,), (1,), (1,), (1,), (2,), (2,)]
    assert grown.promise == "exact"


def test_alias_names_the_old_layers() -> None:
    assert str(edited("repeat(1, 3, 2)", 4).alias_plan()) == "0 (1-2)x2 3"
    assert edited("recursive(2, cycle)", 4).alias_plan().layers == (0, 3, 0, 3)
    with pytest.raises(ValueError, match="use 'tie' or 'materialize'"):
        edited("llama_pro(2)", 4).alias_plan()


@pytest.mark.parametrize("name", sorted(operators()))
def test_texts_are_read_back(name: str) -> None:
    given = {
        "grad_stack": "2", "midas": "2", "lidas": "2", "solar": "1", "llama_pro": "2", "repeat": "0, 2",
        "order": "[0, 1, 0]", "prune": "[1]", "tie": '"(0-1)x2"', "recursive": "2", "retrofit": "1, 2, 1",
        "rys": '"0,1"', "widen": "mlp=96", "upcycle": "4",
    }  # fmt: skip
    operator = parse(f"{name}({given.get(name, '')})")
    assert parse(operator.text()) == operator


@pytest.mark.parametrize(
    ("text", "num_layers", "message"),
    [
        ("stak(2)", 4, "did you mean 'stack'"),
        ("stack(2", 4, "write NAME"),
        ("stack(h=2)", 4, "no field 'h'"),
        ("stack(1)", 4, "must be at least 2"),
        ("stack(2, 3)", 4, "takes g, got 2 values"),
        ("midas", 4, "needs b"),
        ("midas(3)", 4, "does not divide 4 layers"),
        ("llama_pro(3)", 4, "does not divide 4 layers"),
        ("lidas(1)", 4, "no exact middle"),
        ("recursive(3, cycle)", 4, "does not divide 4 layers"),
        ("recursive(3)", 4, "the 2 layers between"),
        ("prune([0, 1, 2, 3])", 4, "leaves nothing to visit"),
        ("prune([7])", 4, "cannot drop layer 7"),
        ("solar(4)", 4, "leaves nothing"),
        ("order([9])", 4, "names layer 9"),
        ("order([])", 4, "names no layer"),
        ("retrofit(2, 2, 2)", 4, "needs 6 layers"),
        ("repeat(3, 9)", 4, "are not a part of the 4 visits"),
        ('tie("(0)x3")', 4, "cannot tie 4 visits"),
        ("stack(open('x'))", 4, "values are numbers"),
    ],
)
def test_bad_operators_say_what_is_wrong(text: str, num_layers: int, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        edited(text, num_layers)
    assert "\n" not in str(caught.value)


def test_operators_that_need_the_identity_say_so() -> None:
    with pytest.raises(ValueError, match=r"untie\(\) it first"):
        edited("stack(2)", 2, "(0-1)x2")
