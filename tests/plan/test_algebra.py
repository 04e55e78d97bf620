"""Laws of the algebra: what happens to the flat order, and where layers come from."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopwise.plan import Edit, Plan, PlanError, drop, insert, loop, repeat, tie, unroll, untie
from tests.plan.plan_strategies import covering_plans, plans


@given(plans())
def test_unroll_keeps_visits_and_annotations(plan):
    flat = unroll(plan)
    assert flat.layers == plan.layers and not any(slot.iterations for slot in flat.slots)
    assert [flat.annotations(s) for s in flat.slots] == [plan.annotations(s) for s in plan.slots]
    assert unroll(flat) == flat == flat.canonical() or any(flat.annotations(s) for s in flat.slots)


@given(plans(), st.data())
def test_repeat(plan, data):
    start = data.draw(st.integers(0, plan.num_slots - 1))
    stop = data.draw(st.integers(start + 1, plan.num_slots))
    times = data.draw(st.integers(1, 3))
    layers = plan.layers
    result = repeat(plan, start, stop, times)
    assert result.layers == layers[:start] + layers[start:stop] * times + layers[stop:]
    seen = [plan.annotations(s) for s in plan.slots]
    assert [result.annotations(s) for s in result.slots] == seen[:start] + seen[start:stop] * times + seen[stop:]
    assert repeat(plan, start, stop, 1) == plan


@given(plans(), plans(), st.data())
def test_insert(plan, what, data):
    what = unroll(what) if set(plan.loops) & set(what.loops) else what
    at = data.draw(st.integers(0, plan.num_slots))
    expected = plan.layers[:at] + what.layers + plan.layers[at:]
    assert insert(plan, at, what).layers == expected
    assert insert(plan, at, str(what)).layers == expected
    assert insert(plan, at, list(what.layers)).layers == expected


@given(plans(), st.data())
def test_drop(plan, data):
    gone = data.draw(st.sets(st.sampled_from(plan.unique_layers)))
    if gone == set(plan.layers):
        with pytest.raises(PlanError, match="nothing"):
            drop(plan, gone)
        return
    result = drop(plan, gone)
    assert list(result.layers) == [layer for layer in plan.layers if layer not in gone]
    assert result.counts.items() <= plan.counts.items()
    if not gone:
        assert result == plan


@given(plans(), st.data())
def test_loop_puts_the_run_into_a_loop(plan, data):
    """Whatever else the plan visits: layers above all others, inserted once, are found and looped."""
    width, count = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    run = list(range(50, 50 + width))
    at = data.draw(st.integers(0, plan.num_slots))
    plan = insert(plan, at, run)
    result = loop(plan, 50, 50 + width - 1, count, "fresh")
    assert list(result.layers) == [*plan.layers[:at], *run * count, *plan.layers[at + width :]]
    assert result.counts["fresh"] == count
    assert loop(plan, 50, 50 + width - 1, 1).layers == plan.layers


@given(plans())
def test_untie_gives_every_visit_its_layer(plan):
    edit = untie(plan)
    assert edit.plan == Plan.identity(plan.num_slots)
    assert edit.sources == plan.layers


@given(covering_plans())
def test_tie_undoes_untie(plan):
    apart = untie(plan)
    together = tie(apart.plan, plan)
    assert together.plan == plan
    assert together.sources == tuple(plan.layers.index(layer) for layer in plan.unique_layers)
    assert apart.then(together).sources == tuple(range(len(plan.unique_layers)))


@given(plans(), plans())
def test_tie_renumbers_without_gaps_and_copies_the_first_visit(target, other):
    plan = Plan.from_layers([other.layers[n % other.num_slots] for n in range(target.num_slots)])
    edit = tie(plan, target)
    assert edit.plan.unique_layers == tuple(range(len(edit.sources)))
    assert [target.unique_layers[layer] for layer in edit.plan.layers] == list(target.layers)
    first = {}
    for visit, layer in enumerate(edit.plan.layers):
        first.setdefault(layer, plan.layers[visit])
    assert edit.sources == tuple(first[layer] for layer in range(len(edit.sources)))


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (lambda: loop("0-29", 10, 19, 2), "0-9 (10-19)x2 20-29"),
        (lambda: loop("0-7", 2, 5, 8, "core"), "0-1 core:(2-5)x8 6-7"),
        (lambda: loop("0-1 2 3-4", 1, 3, 2), "0 (1 2 3)x2 4"),
        (lambda: loop("0-1 core:(2-5)x2 6-7", 1, 6, 2), "0 (1 core:(2-5)x2 6)x2 7"),
        (lambda: loop("0-9 5-14", 0, 4, 2), "(0-4)x2 5-9 5-14"),
        (lambda: loop("0-3[a=b]", 1, 2, 2), "0[a=b] (1-2[a=b])x2 3[a=b]"),
        (lambda: repeat("0-9", 3, 6, 2), "0-2 (3-5)x2 6-9"),
        (lambda: repeat("0 (1-2)x2 3", 2, 5, 2, "r"), "0 1 r:(2 1-2)x2 3"),
        (lambda: repeat("0 a:(1-2)x2 3", 1, 5, 3), "0 (a:(1-2)x2)x3 3"),
        (lambda: insert("0-3", 2, 7), "0-1 7 2-3"),
        (lambda: insert("0-3", 4, "(3)x2"), "0-3 (3)x2"),
        (lambda: drop("0-9 core:(4-5)x2", [4, 5, 7]), "0-3 6 8-9"),
        (lambda: drop("0-9", 0), "1-9"),
        (lambda: unroll("0 (1-2)x2 3"), "0-2 1-3"),
        (lambda: tie("0-5", "0-1 (2-3)x2").plan, "0-1 (2-3)x2"),
        (lambda: tie("0-5", "4-5 (8-9)x2").plan, "0-1 (2-3)x2"),
    ],
)
def test_examples(result, text):
    assert str(result()) == text


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda: loop("0-9 5-14", 5, 9, 2), "2 places"),
        (lambda: loop("0-9", 5, 10, 2), "not visited one after the other"),
        (lambda: loop("(0-9)x2", 5, 6, 2), "not visited one after the other"),
        (lambda: loop("0-1 (2 4)x2 5", 2, 4, 2), "not visited one after the other"),
        (lambda: loop("0-1 3-4", 0, 4, 2), "not visited one after the other"),
        (lambda: loop("0-9", 5, 4, 2), "backwards"),
        (lambda: loop("0-9", 4, 5, 0), "between 1"),
        (lambda: loop("a:(0)x2 1-4", 2, 3, 2, "a"), "used twice"),
        (lambda: repeat("0-9", 5, 5, 2), "not a part"),
        (lambda: repeat("0-9", 5, 11, 2), "not a part"),
        (lambda: repeat("0-9", -1, 5, 2), "not a part"),
        (lambda: repeat("0-9", 1, 5, 0), "between 1"),
        (lambda: repeat("0-9", 1, 5, 100_000), "visits of layers"),
        (lambda: insert("0-9", 11, 0), "cannot insert at 11"),
        (lambda: insert("0-9", -1, 0), "cannot insert at -1"),
        (lambda: insert("0-9", 1, []), "empty"),
        (lambda: insert("0-9", 1, "1-"), "last layer"),
        (lambda: insert("a:(0)x2", 2, "a:(0)x2"), "used twice"),
        (lambda: drop("0-9", [10]), "cannot drop layer 10"),
        (lambda: drop("0-9", range(10)), "nothing to visit"),
        (lambda: drop("0-9", "a"), "integer"),
        (lambda: tie("0-9", "0-8"), "cannot tie 10 visits"),
        (lambda: Edit(Plan.parse("0-3"), (0, 1, 2)), "layer 3 does not exist"),
        (lambda: Edit(Plan.parse("0"), (-1,)), "negative"),
        (lambda: untie("0-3").then(Edit(Plan.parse("0"), (4,))), "reads layer 4"),
    ],
)
def test_refusals(call, part):
    with pytest.raises(PlanError, match=part):
        call()
