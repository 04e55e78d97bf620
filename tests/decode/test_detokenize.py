"""Text from tokens as they come."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopwise.decode.server.detokenize import StopTexts, TextStream
from tests.decode.serving import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
IDS = st.lists(st.integers(1, len(TOKENIZER) - 1), max_size=60)


def streamed(tokens: list[int], before: list[int]) -> list[str]:
    stream = TextStream(TOKENIZER, before)
    return [*(stream.push(token) for token in tokens), stream.end()]


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_pieces_are_the_text(text: str) -> None:
    tokens = TOKENIZER(text)["input_ids"]
    pieces = streamed(tokens, [])
    assert "".join(pieces) == text
    # No piece shows a part of a character.
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(IDS, IDS)
def test_any_bytes_are_decoded_as_at_once(tokens: list[int], before: list[int]) -> None:
    """Also where they are not UTF-8; what stands before is whole characters."""
    before = TOKENIZER("x")["input_ids"] if TOKENIZER.decode(before[-6:]).endswith("\ufffd") else before
    assert "".join(streamed(tokens, before)) == TOKENIZER.decode(tokens)


def test_a_piece_comes_with_the_last_byte_of_a_character() -> None:
    tokens = TOKENIZER("é€\U0001f600")["input_ids"]
    pieces = streamed(tokens, [])
    assert [piece for piece in pieces if piece] == ["é", "€", "\U0001f600"]


def test_special_tokens_are_not_text() -> None:
    ids = TOKENIZER("ab")["input_ids"]
    assert "".join(streamed([*ids[:1], TOKENIZER.eos_token_id, *ids[1:]], [])) == "ab"


@settings(max_examples=300)
@given(st.lists(st.text("ab", max_size=3), max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=4))
def test_stop_texts_end_it_wherever_pieces_begin(pieces: list[str], stops: list[str]) -> None:
    """The oracle looks after every piece whether the text so far holds a stop text."""
    cut, expected, found = StopTexts(stops), "", False
    for piece in pieces:
        expected += piece
        places = [place for stop in stops if (place := expected.find(stop)) >= 0]
        if places:
            expected, found = expected[: min(places)], True
            break
    shown = "".join([*(cut.push(piece) for piece in pieces), cut.end()])
    assert (shown, cut.found) == (expected, found)


def test_only_what_may_become_a_stop_text_is_held_back() -> None:
    stops = StopTexts(["END"])
    assert [stops.push(piece) for piece in ("xE", "N", "x", "E")] == ["x", "", "ENx", ""]
    assert stops.end() == "E"


@pytest.mark.parametrize("stops", [["b", "ab"], ["ab", "b"]])
def test_the_first_place_counts(stops: list[str]) -> None:
    cut = StopTexts(stops)
    assert cut.push("xab") == "x" and cut.found
