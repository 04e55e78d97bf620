"""What became of tokens that a decoder guessed before they were final."""

from __future__ import annotations

from collections.abc import Sequence


class Drafts:
    """The guesses at every new token, in the order in which they were made.

    Args:
        num_rows: B.
    """

    def __init__(self, num_rows: int):
        self._guesses: list[dict[int, list[int]]] = [{} for _ in range(num_rows)]

    def guess(self, row: int, index: int, token: int) -> None:
        """Note a guess at new token `index` of a row; the same guess again is no news."""
        guesses = self._guesses[row].setdefault(index, [])
        if guesses[-1:] != [token]:
            guesses.append(token)

    def notes(
        self, tokens: Sequence[Sequence[int]], reference: Sequence[Sequence[int]] | None = None
    ) -> dict[str, float]:
        """Counts over all tokens that came out.

        Args:
            tokens: the final tokens of every row.
            reference: tokens that count as right, such as those of sequential decoding at full depth, compared place by
                place; None takes the final ones, and then no change can end wrong.

        Returns:
            `drafted` tokens that were guessed before they were final; of these, `drafted_right` whose first guess was
            right and `tokens_revised` that changed; changes `wrong_to_right`, `right_to_wrong` and `wrong_to_wrong`.

        Raises:
            ValueError: the reference has another number of rows.
        """
        right = tokens if reference is None else reference
        if len(right) != len(tokens):
            raise ValueError(f"reference has {len(right)} rows, there are {len(tokens)} prompts")
        names = ("drafted", "drafted_right", "tokens_revised", "wrong_to_right", "right_to_wrong", "wrong_to_wrong")
        counts: dict[str, float] = {name: 0.0 for name in names}
        for final, wanted, guesses in zip(tokens, right, self._guesses, strict=True):
            for index, (token, target) in enumerate(zip(final, wanted, strict=False)):
                made = guesses.get(index, [])
                if not made:
                    continue
                counts["drafted"] += 1
                counts["drafted_right"] += made[0] == target
                path = made if made[-1] == token else [*made, token]
                counts["tokens_revised"] += len(path) > 1
                for old, new in zip(path, path[1:], strict=False):
                    kind = {(False, True): "wrong_to_right", (True, False): "right_to_wrong"}
                    counts[kind.get((old == target, new == target), "wrong_to_wrong")] += 1
        return counts
