"""Printing, slots, counts and the normal form of plans."""

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopwise.plan import MAX_SLOTS, Loop, Plan, PlanError, Slot, Span
from tests.plan.plan_strategies import naive_visits, plans, plans_with_named_loop


@given(plans())
def test_printed_plans_parse_to_themselves(plan):
    assert Plan.parse(str(plan)) == plan
    assert Plan.from_json(plan.to_json()) == plan
    assert "\n" not in str(plan) and str(plan).isascii()
    assert hash(Plan.parse(str(plan))) == hash(plan)


@given(plans())
def test_layers_are_the_naive_expansion(plan):
    assert list(plan.layers) == naive_visits(plan.nodes)
    assert plan.num_slots == len(plan.slots) == len(plan.layers)
    assert list(plan.unique_layers) == sorted(set(plan.layers))
    assert Plan.from_layers(plan.layers).layers == plan.layers


@given(plans())
def test_keys_are_unique_and_lead_to_their_span(plan):
    assert len({slot.key for slot in plan.slots}) == plan.num_slots
    for slot in plan.slots:
        span = plan.node(slot.position)
        assert isinstance(span, Span) and span is plan.node(slot.position[:-1])
        assert span.first + slot.position[-1] == slot.layer
        assert len(slot.iterations) == len(slot.position) - 2


def test_overlapping_spans_have_different_keys():
    plan = Plan.parse("0-9 5-14")
    assert plan.layers == (*range(10), *range(5, 15))
    assert len({slot.key for slot in plan.slots}) == 20
    assert plan.slots[5] == Slot((0, 5), (), 5) and plan.slots[10] == Slot((1, 0), (), 5)


def test_slots_of_nested_loops():
    plan = Plan.parse("7 a:(0-1 b:(2)x2)x2")
    assert [(slot.position, slot.iterations, slot.layer) for slot in plan.slots] == [
        ((0, 0), (), 7),
        *[
            slot
            for a in range(2)
            for slot in [
                ((1, 0, 0), (a,), 0),
                ((1, 0, 1), (a,), 1),
                ((1, 1, 0, 0), (a, 0), 2),
                ((1, 1, 0, 0), (a, 1), 2),
            ]
        ],
    ]


@given(plans_with_named_loop(), st.data())
def test_keys_survive_other_counts(plan, data):
    name = data.draw(st.sampled_from(sorted(plan.loops)))
    count = data.draw(st.integers(1, 4))
    changed = plan.with_loops({name: count})
    assert changed.counts == {**plan.counts, name: count}

    loop = plan.loops[name]
    (path,) = {path for path in _paths(plan) if plan.node(path) is loop}
    before, after = ({s.key: s.layer for s in p.slots} for p in (plan, changed))

    def outside(slots):
        return {key: layer for key, layer in slots.items() if key[0][: len(path)] != path}

    assert outside(before) == outside(after)
    small, large = (before, after) if count >= loop.count else (after, before)
    assert small.items() <= large.items()


def _paths(plan):
    return {slot.position[:length] for slot in plan.slots for length in range(1, len(slot.position))}


@given(plans())
def test_canonical_keeps_visits_and_annotations(plan):
    normal = plan.canonical()
    assert normal.canonical() == normal
    assert normal.layers == plan.layers
    assert normal.counts == plan.counts
    assert [normal.annotations(s) for s in normal.slots] == [plan.annotations(s) for s in plan.slots]


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("0-3 4 5-9", "0-9"),
        ("(0-3) (4-9)x1", "0-9"),
        ("((2-5)x2)x3", "(2-5)x6"),
        ("(((1)) 2)x3 3", "(1-2)x3 3"),
        ("core:(2-5)", "core:(2-5)"),
        ("(0-1)[a=1] 2", "(0-1)[a=1] 2"),
        ("0[b=1, a=2] 1", "0[a=2, b=1] 1"),
        ("0[a=1] 1[a=1]", "0[a=1] 1[a=1]"),
        ("0-9 5-14", "0-9 5-14"),
        ("5 5", "5 5"),
    ],
)
def test_canonical_examples(text, normal):
    assert str(Plan.parse(text).canonical()) == normal


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("5x3", "(5)x3"),
        ("core:2-5", "core:(2-5)"),
        ("core:2-5x8[read=e,update=concat]", "core:(2-5)x8[read=e, update=concat]"),
        ("  0-1\n\t( 2-5 )x2\r\n6 ", "0-1 (2-5)x2 6"),
        ("007-010", "7-10"),
        ('0[ a = "x" , b = "y z" ]', '0[a=x, b="y z"]'),
        ("x:(1)x1 x8y:2", "x:(1) x8y:(2)"),
        ("3-3", "3"),
    ],
)
def test_spellings(text, same):
    assert Plan.parse(text) == Plan.parse(same)
    assert str(Plan.parse(text)) == same


def test_from_layers_and_identity():
    assert Plan.from_layers([0, 1, 2, 1, 2, 3]) == Plan.parse("0-2 1-3")
    assert Plan.identity(4) == Plan.parse("0-3") and Plan.identity(1) == Plan.parse("0")
    for bad in (0, -1, 2.5, True, None, MAX_SLOTS + 1):
        with pytest.raises(PlanError):
            Plan.identity(bad)
    for bad in ([], [-1], [0.5], None, 3, "ab"):
        with pytest.raises(PlanError):
            Plan.from_layers(bad)


def test_annotations_merge_from_outer_to_inner():
    plan = Plan.parse("0 core:(1 2[read=x])x2[read=e, update=add]")
    assert [plan.annotations(slot) for slot in plan.slots[:3]] == [
        {},
        {"read": "e", "update": "add"},
        {"read": "x", "update": "add"},
    ]


@given(plans())
def test_plans_copy_for_free_and_pickle(plan):
    assert plan.layers and copy.deepcopy(plan) is plan and copy.copy(plan) is plan
    assert copy.deepcopy([plan.slots[0], plan.nodes[0]]) == [plan.slots[0], plan.nodes[0]]
    loaded = pickle.loads(pickle.dumps(plan))
    assert loaded == plan and hash(loaded) == hash(plan) and loaded.slots == plan.slots
    assert plan.slots is plan.slots and pickle.loads(pickle.dumps(plan.slots)) == plan.slots


def test_plans_are_frozen():
    plan = Plan.parse("0 (1)x2")
    for target, attribute in ((plan, "nodes"), (plan.nodes[1], "count"), (plan.slots[0], "layer")):
        with pytest.raises(AttributeError):
            setattr(target, attribute, 3)


def test_with_loops():
    named = Plan.parse("0-1 core:(2-5 in:(6)x2)x8 7")
    assert str(named.with_loops(core=3)) == "0-1 core:(2-5 in:(6)x2)x3 7"
    assert named.with_loops({"core": 3, "in": 4}).counts == {"core": 3, "in": 4}
    assert named.with_loops(3) == named.with_loops(core=3)
    assert named.with_loops() == named == named.with_loops({}) == named.with_loops(core=8)
    assert str(Plan.parse("0 (1)x2 3").with_loops(5)) == "0 (1)x5 3"
    assert str(Plan.parse("0 deep:(1)x2[a=1]").with_loops(1)) == "0 deep:(1)[a=1]"


@pytest.mark.parametrize(
    ("text", "arguments", "part"),
    [
        ("0-1 core:(2)x2", {"coer": 2}, "did you mean core?"),
        ("0-1 core:(2)x2", {"body": 2}, "it has core"),
        ("0-1 (2)x2", {"core": 2}, "no named loop"),
        ("0-1", 2, "no loop"),
        ("(0)x2 (1)x2", 2, "2 loops and none is named core"),
        ("(0)x2", 0, "between 1 and"),
        ("(0)x2", -1, "between 1 and"),
        ("(0)x2", True, "integer"),
        ("(0)x2", 2.0, "integer"),
        ("(0)x2", "2", "integer"),
        ("(0)x2", 10**9, "between 1 and"),
        ("(0)x2", 10**50, "a huge number"),
        ("core:(0-9)x2", {"core": 100_000}, "more than the"),
        ("core:(0-9)x2", {3: 1}, "no loop named '3'"),
    ],
)
def test_with_loops_refuses(text, arguments, part):
    with pytest.raises(PlanError, match=part.replace("?", r"\?")):
        Plan.parse(text).with_loops(arguments)


def test_numbers_too_long_to_print_are_refused():
    for build in (lambda n: Plan.parse("(0)x2").with_loops(n), lambda n: Span(0, n), lambda n: Plan.identity(n)):
        with pytest.raises(PlanError, match="a huge number"):
            build(10**5000)


def test_with_loops_takes_one_form():
    with pytest.raises(PlanError, match="not both"):
        Plan.parse("core:(0)x2").with_loops(2, core=3)


def test_validate_points_at_the_span():
    plan = Plan.parse('0-9[a="b c"] core:(10-31)x2 20-29')
    assert plan.validate(32) is plan
    with pytest.raises(PlanError, match="layer 30 .* layers 0-29") as caught:
        plan.validate(30)
    assert caught.value.position == str(plan).index("10-31")
    assert caught.value.pointer.splitlines()[1].index("^") == caught.value.position


def test_node_refuses_wrong_positions():
    plan = Plan.parse("0-1 (2)x2")
    for position in ((), (2,), (0, 2), (0, -1), (0, 0, 0), (1, 1), "ab", None, (1, 0, 1)):
        with pytest.raises(PlanError, match="no node"):
            plan.node(position)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Plan(()),
        lambda: Plan(3),
        lambda: Plan(("0",)),
        lambda: Loop(()),
        lambda: Loop((Span(0, 0),), 0),
        lambda: Loop((Span(0, 0),), 2, "x8"),
        lambda: Loop((Span(0, 0),), 2, ""),
        lambda: Loop((Span(0, 0),), 2, "é"),
        lambda: Loop((Span(0, 999),), 101),
        lambda: Span(1, 0),
        lambda: Span(-1, 0),
        lambda: Span(0, 1_000_000),
        lambda: Span(0.0, 1),
        lambda: Span(0, 1, {"a": 1}),
        lambda: Span(0, 1, {"a b": "1"}),
        lambda: Span(0, 1, (("a", "1"), ("a", "2"))),
        lambda: Span(0, 1, 3),
        lambda: Span(0, 1, {"a": "\ud800"}),
        lambda: Plan((Loop((Span(0, 0),), 1, "a"), Loop((Span(0, 0),), 1, "a"))),
        lambda: Plan((Span(0, 99_999), Span(0, 0))),
    ],
)
def test_nodes_check_themselves(build):
    with pytest.raises(PlanError) as caught:
        build()
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.position is None and caught.value.pointer == ""


def test_nesting_is_capped_when_built_in_code():
    node = Span(0, 0)
    for _ in range(32):
        node = Loop((node,), 1)
    assert Plan.parse(str(Plan((node,)))).layers == (0,)
    with pytest.raises(PlanError, match="nested"):
        Loop((node,), 1)


def test_annotations_may_be_a_mapping():
    assert Span(0, 1, {"a": "1"}) == Span(0, 1, (("a", "1"),)) == Plan.parse("0-1[a=1]").nodes[0]
