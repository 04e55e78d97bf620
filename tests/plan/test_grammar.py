"""Bad plan text: one clear line that points at the character, never anything but PlanError, never slow."""

import pickle

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loopwise.plan import MAX_SLOTS, Plan, PlanError
from tests.plan.plan_strategies import plans


@pytest.mark.parametrize(
    ("text", "column", "part"),
    [
        ("", 1, "the plan is empty"),
        (" \n ", 4, "the plan is empty"),
        ("()x3", 1, "this loop is empty"),
        ("0-9 core:( )x2", 10, "this loop is empty"),
        ("0 (1)x0", 7, "count must be between 1"),
        ("0 1x00", 5, "count must be between 1"),
        ("0 5-2", 3, "runs backwards"),
        ("0 a:(1)x2 a:2", 11, "'a' is used twice"),
        ("a:(0 a:(1))", 6, "'a' is used twice"),
        ("x8:(0)", 1, "looks like a count"),
        ("x" + "9" * 5000 + ":(0)", 1, "looks like a count"),
        ("X12:(0)", 1, "looks like a count"),
        ("(0-1", 1, "this '(' is never closed"),
        ("(0 (1 2)", 1, "this '(' is never closed"),
        ("(0 (1 2", 4, "this '(' is never closed"),
        ("0-1) 2", 4, "this ')' closes nothing"),
        (")", 1, "this ')' closes nothing"),
        ("0[a=1", 2, "this '[' is never closed"),
        ("0[]", 3, "expected an annotation"),
        ("0[a]", 4, "expected '='"),
        ("0[a=]", 5, "expected a value"),
        ("0[a=1,]", 7, "expected an annotation"),
        ("0[a=1 b=2]", 7, "expected ',' or ']'"),
        ("0[a=1, a=2]", 8, "'a' is given twice"),
        ("0[a=1][b=2]", 7, "separate items"),
        ("0[a=(1)]", 5, "double quotes"),
        ('0[a="b]', 5, "closed string"),
        ('0[a="\\q"]', 6, "closed string"),
        ('0[a="\\ud800"]', 2, "surrogate"),
        ("0[1=2]", 3, "expected an annotation"),
        ("[a=1]", 1, "expected a layer"),
        ("0-1(2)", 4, "separate items"),
        ("0 (1) x3", 7, "without a blank"),
        ("0 x", 3, "without a blank"),
        ("core(1)", 5, "expected ':'"),
        ("c" * 5000, 5001, "expected ':' after the name"),
        ("core", 5, "expected ':' after the name 'core', found the end"),
        ("core: (1)", 6, "expected a layer"),
        ("a:b:1", 3, "expected a layer"),
        ("-3", 1, "found '-'"),
        ("3-", 3, "last layer of the range"),
        ("1-2-3", 4, "separate items"),
        ("1.5", 2, "unexpected '.'"),
        ("2x", 3, "a count after 'x'"),
        ("2x-1", 3, "a count after 'x'"),
        ("2x3x4", 4, "unexpected 'x'"),
        ("2X3", 2, "unexpected 'X'"),
        ("0,1", 2, "unexpected ','"),
        ("1000000", 1, "between 0 and 999999"),
        ("0-1000000", 3, "between 0 and 999999"),
        ("9" * 5000, 1, "too large"),
        ("0x" + "9" * 5000, 3, "too large"),
        ("0x100001", 3, "count must be between"),
        ("0-99999 0", 9, "visits of layers"),
        ("0 (((0-9)x99)x99)x99", 3, "visits of layers"),
        ("0 " + "(" * 33 + "1" + ")" * 33, 35, "nested more than 32"),
        ("(" * 32 + "1x2" + ")" * 32, 1, "nested more than 32"),
        ("٣", 1, "U+0663"),
        ("1٣", 2, "U+0663"),
        ("0-²", 3, "U+00B2"),
        ("1\u00a02", 2, "U+00A0"),
        ("1\u20282", 2, "U+2028"),
        ("naïve:1", 3, "U+00EF"),
        ("0\x00", 2, "U+0000"),
    ],
)
def test_errors_point_at_the_character(text, column, part):
    with pytest.raises(PlanError) as caught:
        Plan.parse(text)
    error = caught.value
    assert part in str(error) and error.position == column - 1
    check_form(error)


@pytest.mark.parametrize("value", [None, 3, 3.5, b"0-9", ["0-9"], {}, object()])
def test_other_types_are_refused(value):
    with pytest.raises(PlanError, match="a plan is text") as caught:
        Plan.parse(value)
    assert caught.value.position is None


def test_pointer_in_long_text():
    text = "0-9 " * 200 + "1-! " + "0-9 " * 200
    with pytest.raises(PlanError) as caught:
        Plan.parse(text)
    check_form(caught.value)
    shown, caret = caught.value.pointer.splitlines()
    assert shown[caret.index("^")] == "!" and "..." in shown and len(shown) < 80


def test_errors_pickle():
    with pytest.raises(PlanError) as caught:
        Plan.parse("0 (1)x0")
    loaded = pickle.loads(pickle.dumps(caught.value))
    assert str(loaded) == str(caught.value) and loaded.pointer == caught.value.pointer
    assert isinstance(loaded, ValueError)


def check_form(error):
    """One bounded printable line; a caret below the character; a position inside the text or just behind it."""
    assert len(str(error).splitlines()) == 1 and len(str(error)) < 320
    if error.position is None:
        assert error.pointer == ""
        return
    assert 0 <= error.position <= len(error.text)
    shown, caret = error.pointer.split("\n")
    assert caret == " " * caret.index("^") + "^"
    if error.position < len(error.text):
        character = error.text[error.position]
        assert shown[len(caret) - 1] == (character if character.isprintable() else shown[len(caret) - 1])
    else:
        assert len(caret) == len(shown) + 1


def parse_or_refuse(text):
    try:
        plan = Plan.parse(text)
    except PlanError as error:
        check_form(error)
    else:
        assert plan.num_slots <= MAX_SLOTS and Plan.parse(str(plan)) == plan


@settings(max_examples=200)
@given(st.text())
@example("\ud800")
@example("(" * 100_000)
@example("a:(" * 100_000)
@example(")" * 100_000)
def test_random_text_is_parsed_or_refused(text):
    parse_or_refuse(text)


@settings(max_examples=400)
@given(st.text('0123456789x()[]=,:-"\\ ac_', max_size=40))
def test_random_plan_characters_are_parsed_or_refused(text):
    parse_or_refuse(text)


@settings(max_examples=200)
@given(plans(), st.data())
def test_damaged_plans_are_parsed_or_refused(plan, data):
    text = str(plan)
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        stop = data.draw(st.integers(start, min(len(text), start + 3)))
        text = (
            text[:start] + data.draw(st.one_of(st.text(max_size=3), st.text('0x()[]=,:- "', max_size=3))) + text[stop:]
        )
    parse_or_refuse(text)


@pytest.mark.parametrize(
    "text",
    [
        "0 " * 99_999,
        "0x1 " * 99_999,
        "0 " * 400_000,
        "(((((0-9)x10)x10)x10)x10)",
        "a" * 900_000,
        "0[" + "a=1," * 200_000 + "]",
        "0[" + ",".join(f"a{index}=1" for index in range(80_000)) + "]",
        " ".join(f"a{index}:0" for index in range(60_000)),
        '0[a="' + "\\n" * 400_000 + '"]',
        " " * 2_000_000,
        "0" * 900_000,
    ],
    ids=lambda text: text[:8].strip(),
)
def test_large_text_is_read_or_refused(text):
    try:
        Plan.parse(text)
    except PlanError as error:
        check_form(error)
