"""Text from tokens as they come: pieces that are final, and stop texts wherever the borders of tokens lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\ufffd"
# Bytes of a character that is not finished yet: at most three of four, each shown as one replacement by some decoders.
_UNFINISHED = 3
_CONTEXT_TOKENS = 6
_LONGEST_WINDOW = 64


class TextStream:
    """Decodes token after token; all pieces together are the text of all tokens.

    A piece ends before a character whose bytes have not all come. Decoders look at what came before (a space at the
    start, joined bytes), so each step decodes a window that starts some tokens earlier, not the whole text.

    Args:
        tokenizer: of transformers.
        before: token ids in front of the text; their end decides whether the text starts with a space.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._tokens = list(before[-_CONTEXT_TOKENS:])
        self._read = len(self._tokens)
        self._shown = self._decode()

    def push(self, token: int) -> str:
        """What is final with this token; often nothing."""
        self._tokens.append(token)
        text = self._decode()
        ending = len(text) - len(text.rstrip(_REPLACEMENT))
        if ending and len(self._tokens) < _LONGEST_WINDOW:
            final = text[: len(text) - min(ending, _UNFINISHED)]
            piece = final[len(self._shown) :]
            self._shown += piece
            return piece
        piece = text[len(self._shown) :]
        self._tokens = self._tokens[self._read :]
        self._read = len(self._tokens)
        self._shown = self._decode()
        return piece

    def end(self) -> str:
        """What was held back, unfinished bytes as replacement characters."""
        text = self._decode()
        piece, self._shown = text[len(self._shown) :], text
        return piece

    def _decode(self) -> str:
        # Cleaning up spaces changes text that was shown already.
        return self._tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopTexts:
    """Ends a text before the first of some stop texts, and holds back what may become one.

    Args:
        stops: the stop texts; none of them is empty.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = list(stops)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """What may be shown with this piece; nothing after a stop text."""
        if self.found:
            return ""
        text = self._held + piece
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def end(self) -> str:
        """What was held back, now that no stop text can follow."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text with which a stop text begins, shorter than the stop text."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
