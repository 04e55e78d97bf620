"""Plan text to nodes and back.

    items = item {blank item}
    item  = [name ':'] body ['x' count] ['[' key '=' value {',' key '=' value} ']']
    body  = INT | INT '-' INT | '(' items ')'

A name or a count makes a loop: `5x3` is `(5)x3` and `core:2-5` is `core:(2-5)`. A value is a word of letters, digits
and `_ . - + / * : # @ %`, or a JSON string in double quotes. Blanks may stand between items and inside brackets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from loopwise.plan.errors import PlanError, quote_plan_text
from loopwise.plan.nodes import (
    MAX_LOOP_DEPTH,
    PLAN_NAME,
    Annotations,
    Loop,
    Node,
    Span,
    check_annotations,
    check_layer,
    check_loop_count,
    check_num_slots,
)

MAX_PLAN_TEXT = 1_000_000

# Digits are spelled out because \d also matches the digits of other scripts.
_PLAN_DIGITS = re.compile(r"[0-9]+")
_PLAN_BLANKS = re.compile(r"[ \t\r\n]*")
_PLAN_WORD = re.compile(r"[A-Za-z0-9_.\-+/*:#@%]+")
_PLAN_JSON = json.JSONDecoder()


def parse_nodes(text: str) -> tuple[Node, ...]:
    """Read plan text into its top-level nodes. Time is linear in the text, whatever the counts say.

    Raises PlanError, with the position of the character at fault, for text outside the grammar, empty plans and loops,
    zero counts, backward ranges, names given twice, numbers, nesting or unrolled length beyond the caps of `nodes`.
    """
    if not isinstance(text, str):
        raise PlanError(f"a plan is text such as '0-9 (10-19)x2 20-29', got {type(text).__name__}")
    if len(text) > MAX_PLAN_TEXT:
        raise PlanError(f"the plan text is longer than {MAX_PLAN_TEXT} characters", text=text)
    return _PlanReader(text).items(opened=None, depth=0)


def print_nodes(nodes: tuple[Node, ...]) -> str:
    """The text that `parse_nodes` reads back to equal nodes."""
    return "".join(piece for piece, _ in printed_pieces(nodes))


def printed_pieces(nodes: tuple[Node, ...]) -> Iterator[tuple[str, Span | None]]:
    """The printed text in pieces; the piece that shows the layers of a span comes with that span."""
    for index, node in enumerate(nodes):
        if index:
            yield " ", None
        if isinstance(node, Span):
            yield str(node.first) if node.first == node.last else f"{node.first}-{node.last}", node
        else:
            yield f"{node.name}:(" if node.name else "(", None
            yield from printed_pieces(node.body)
            yield ")" if node.count == 1 else f")x{node.count}", None
        if node.annotations:
            yield "[" + ", ".join(f"{key}={_print_value(value)}" for key, value in node.annotations) + "]", None


def _print_value(value: str) -> str:
    return value if _PLAN_WORD.fullmatch(value) else json.dumps(value)


class _PlanReader:
    """Recursive descent over `text`; `at` is the index of the next character. The nodes check their own values."""

    def __init__(self, text: str):
        self.text, self.at = text, 0
        self.names: set[str] = set()

    def items(self, opened: int | None, depth: int) -> tuple[Node, ...]:
        """Items up to the bracket that closes the one at `opened`, or up to the end of the text."""
        nodes: list[Node] = []
        num_slots = 0
        while True:
            self.match(_PLAN_BLANKS)
            if self.peek() in ("", ")"):
                break
            start = self.at
            nodes.append(self.item(depth))
            num_slots += nodes[-1].num_slots
            with self.blaming(start):
                check_num_slots(num_slots)
            if self.peek() not in ("", ")", " ", "\t", "\r", "\n"):
                self.refuse(f"unexpected {self.found()} after an item; separate items by a blank")
        if opened is None and self.peek():
            self.refuse("this ')' closes nothing")
        if opened is not None and not self.peek():
            self.refuse("this '(' is never closed", opened)
        if not nodes:
            what = "the plan is empty; write for example 0-9 (10-19)x2" if opened is None else "this loop is empty"
            self.refuse(what, opened)
        return tuple(nodes)

    def item(self, depth: int) -> Node:
        start = self.at
        name = self.name()
        grouped = self.peek() == "("
        body = self.group(depth + 1) if grouped else (self.span(),)
        count = self.count()
        annotations = self.annotations()
        with self.blaming(start):
            if grouped or name is not None or count is not None:
                return Loop(body, 1 if count is None else count, name, annotations)
            span = body[0]
            assert isinstance(span, Span)
            return Span(span.first, span.last, annotations)

    def name(self) -> str | None:
        start = self.at
        name = self.match(PLAN_NAME)
        if not name:
            return None
        if self.peek() != ":":
            if re.fullmatch(r"[xX][0-9]*", name):
                self.refuse("a count stands right behind what it repeats, without a blank: (2-5)x3", start)
            self.refuse(f"expected ':' after the name '{quote_plan_text(name)[0]}', found {self.found()}")
        if name in self.names:
            self.refuse(f"the loop name '{quote_plan_text(name)[0]}' is used twice", start)
        self.names.add(name)
        self.at += 1
        return name

    def group(self, depth: int) -> tuple[Node, ...]:
        opened = self.at
        if depth > MAX_LOOP_DEPTH:
            self.refuse(f"loops are nested more than {MAX_LOOP_DEPTH} deep")
        self.at += 1
        body = self.items(opened, depth)
        self.at += 1
        return body

    def span(self) -> Span:
        start = self.at
        first = last = self.layer("a layer, a range such as 2-5 or '('")
        if self.peek() == "-":
            self.at += 1
            last = self.layer("the last layer of the range")
        with self.blaming(start):
            return Span(first, last)

    def layer(self, expected: str) -> int:
        with self.blaming(self.at):
            return check_layer(self.number(expected))

    def count(self) -> int | None:
        if self.peek() != "x":
            return None
        self.at += 1
        with self.blaming(self.at):
            return check_loop_count(self.number("a count after 'x'"))

    def number(self, expected: str) -> int:
        start = self.at
        digits = self.match(_PLAN_DIGITS)
        if not digits:
            self.refuse(f"expected {expected}, found {self.found()}")
        if len(digits) > 9:
            self.refuse("this number is too large", start)
        return int(digits)

    def annotations(self) -> Annotations:
        if self.peek() != "[":
            return ()
        opened = self.at
        values: dict[str, str] = {}
        while not values or self.peek() == ",":
            self.at += 1
            self.match(_PLAN_BLANKS)
            start = self.at
            key = self.key()
            if key in values:
                self.refuse(f"the annotation '{quote_plan_text(key)[0]}' is given twice", start)
            values[key] = self.value()
            self.match(_PLAN_BLANKS)
        if not self.peek():
            self.refuse("this '[' is never closed", opened)
        if self.peek() != "]":
            self.refuse(f"expected ',' or ']' after an annotation, found {self.found()}")
        self.at += 1
        with self.blaming(opened):
            return check_annotations(values)

    def key(self) -> str:
        key = self.match(PLAN_NAME)
        if not key:
            self.refuse(f"expected an annotation such as read=e, found {self.found()}")
        self.match(_PLAN_BLANKS)
        if self.peek() != "=":
            self.refuse(f"expected '=' after the annotation key '{quote_plan_text(key)[0]}', found {self.found()}")
        self.at += 1
        self.match(_PLAN_BLANKS)
        return key

    def value(self) -> str:
        if self.peek() == '"':
            try:
                value, self.at = _PLAN_JSON.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                self.refuse("this is not a closed string with JSON escapes", min(error.pos, len(self.text)))
            return value
        word = self.match(_PLAN_WORD)
        if not word:
            self.refuse(f"expected a value, found {self.found()}; put other characters in double quotes")
        return word

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def match(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self.text, self.at)
        if found is None:
            return ""
        self.at = found.end()
        return found.group()

    def found(self) -> str:
        character = self.peek()
        if not character:
            return "the end of the text"
        if character.isascii() and character.isprintable():
            return f"'{character}'"
        return f"'{character}' (U+{ord(character):04X})" if character.isprintable() else f"U+{ord(character):04X}"

    def refuse(self, reason: str, position: int | None = None) -> NoReturn:
        raise PlanError(reason, text=self.text, position=self.at if position is None else position)

    @contextmanager
    def blaming(self, position: int) -> Iterator[None]:
        """Errors raised inside without a place in the text get this one."""
        try:
            yield
        except PlanError as error:
            if error.position is not None:
                raise
            raise PlanError(error.reason, text=self.text, position=position) from None
