"""The one exception of the plan language, and how it quotes text that may be long or unprintable."""

from __future__ import annotations

_PLAN_QUOTE_WIDTH = 60


def quote_plan_text(text: str, position: int = 0, width: int = _PLAN_QUOTE_WIDTH) -> tuple[str, int]:
    """Cut `text` to one printable line of about `width` characters that contains `position`.

    Returns the line and the offset of `position` in it. Every character keeps one column (unprintable ones become
    `?`, white space becomes a blank), so the offset is where a caret belongs.
    """
    start = max(0, min(position - width // 2, len(text) - width))
    end = min(len(text), start + width)
    line = "".join(" " if c in " \t\r\n" else c if c.isprintable() else "?" for c in text[start:end])
    head, tail = "..." if start else "", "..." if end < len(text) else ""
    return head + line + tail, position - start + len(head)


class PlanError(ValueError):
    """A plan that cannot be read or does not fit. `str(error)` is one line.

    Attributes: `reason` (what is wrong, without the plan), `text` (the plan text or None), `position` (0-based index
    into `text`, None when the plan did not come from text).
    """

    def __init__(self, reason: str, *, text: str | None = None, position: int | None = None):
        self.reason, self.text, self.position = reason, text, position
        if text is None:
            line = reason
        else:
            where = "" if position is None else f" (column {position + 1})"
            line = f"bad plan '{quote_plan_text(text, position or 0)[0]}': {reason}{where}"
        super().__init__(line)

    @property
    def pointer(self) -> str:
        """Two lines, the text and a caret under the character at fault; empty when there is no position."""
        if self.text is None or self.position is None:
            return ""
        line, offset = quote_plan_text(self.text, self.position)
        return f"{line}\n{' ' * offset}^"
