"""Random plans and the slow, obvious meaning of a plan that the tests compare with."""

from hypothesis import strategies as st

from loopwise.plan import Loop, Node, Plan, Span

_NAMES = ("core", "a", "b2", "_", "x", "x8y", "long-name", "Z", *(f"loop{n}" for n in range(40)))

annotation_values = st.sampled_from(["e", "0.5", "-1e3", "a.b_c/d:e#f@g%h*+", ""]) | st.text(max_size=4)
annotations = st.just(()) | st.dictionaries(
    st.sampled_from(["read", "update", "A_1", "_", "x-8", "x8"]), annotation_values, min_size=1, max_size=2
)


@st.composite
def spans(draw):
    first = draw(st.integers(0, 12))
    return Span(first, first + draw(st.integers(0, 4)), draw(annotations))


@st.composite
def node_tuples(draw, depth=3, max_size=4):
    nodes = []
    for _ in range(draw(st.integers(1, max_size))):
        if depth and draw(st.integers(0, 2)) == 0:
            body, count = draw(node_tuples(depth=depth - 1, max_size=3)), draw(st.integers(1, 3))
            nodes.append(Loop(body, count, draw(st.sampled_from([None, "named"])), draw(annotations)))
        else:
            nodes.append(draw(spans()))
    return tuple(nodes)


def _with_different_names(nodes, names):
    return tuple(
        Loop(_with_different_names(node.body, names), node.count, node.name and next(names), node.annotations)
        if isinstance(node, Loop)
        else node
        for node in nodes
    )


def plans():
    """Any plan of up to a few hundred visits: overlaps, reorderings, nesting, names, annotations."""
    return node_tuples().map(lambda nodes: Plan(_with_different_names(nodes, iter(_NAMES))))


@st.composite
def plans_with_named_loop(draw):
    """Plans with at least one named loop, which may hold others or stand beside them."""
    before, body, after = (draw(node_tuples(depth=2, max_size=2)) for _ in range(3))
    nodes = (*before, Loop(body, draw(st.integers(1, 3)), "named"), *after)
    return Plan(_with_different_names(nodes, iter(_NAMES)))


@st.composite
def covering_plans(draw):
    """Plans that visit every layer from 0 to some k."""
    plan = draw(plans())
    missing = sorted(set(range(max(plan.layers))) - set(plan.layers))
    return Plan(plan.nodes + tuple(Span(layer, layer) for layer in missing))


def naive_visits(nodes: tuple[Node, ...]) -> list[int]:
    """Layers in visit order, by list arithmetic."""
    visits = []
    for node in nodes:
        if isinstance(node, Loop):
            visits += naive_visits(node.body) * node.count
        else:
            visits += list(range(node.first, node.last + 1))
    return visits
