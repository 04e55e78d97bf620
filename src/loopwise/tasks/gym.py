"""Any generator of the reasoning-gym library as a task over bytes.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import importlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from loopwise.loop.config import suggest
from loopwise.tasks.base import IGNORE, PAD, Rows, Task

_END, _ANSWER, _FIRST_BYTE = 1, 2, 3
_MAX_TRIES = 50
# Scoring an answer takes more than its question says; what was drawn last is remembered for it.
_REMEMBERED = 65536
_drawn: OrderedDict[tuple[str, str, bytes], tuple[Any, dict[str, Any]]] = OrderedDict()


@dataclass(frozen=True, kw_only=True)
class Gym(Task):
    """Answer the questions of any reasoning-gym generator by name, byte by byte.

    A row is the bytes of a question, a mark, the bytes of its answer, and an end. Needs the extra `loopwise[gym]`. An
    item whose answer only a scorer knows, or that is longer than `num_tokens`, is left out. "Right" is a score of 1:
    scorers give part of it to an answer that merely contains the right one.

    Attributes:
        dataset: name of the generator, such as "chain_sum".
        config: its own settings.
        num_tokens: T, bytes and two marks.
    """

    kind: ClassVar[str | None] = "task.gym"
    separator: ClassVar[str] = ""
    dataset: str
    config: dict = field(default_factory=dict)
    num_tokens: int = 512

    def __post_init__(self) -> None:
        """Check the ranges; whether the generator exists is seen when it is first used."""
        super().__post_init__()
        self.require(self.num_tokens >= 4, "num_tokens", "must be at least 4")
        for name in ("seed", "size"):
            self.require(name not in self.config, "config", f"must not hold {name!r}: rows choose it")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Padding, the end, the mark before the answer, and the 256 bytes; those that are no ASCII text as numbers."""
        shown = (chr(byte) if byte == 10 or 32 <= byte < 127 else f"\\x{byte:02x}" for byte in range(256))
        return ("<pad>", "<end>", "<answer>", *shown)

    @property
    def length(self) -> int:
        """T."""
        return self.num_tokens

    @property
    def chance(self) -> float:
        """Not known for a generator in general; answers are texts, so 0."""
        return 0.0

    def draw(self, rng: np.random.Generator, size: int) -> Rows:
        """Items of a dataset with a seed from `rng`.

        Raises:
            ValueError: reasoning-gym is not installed, has no such generator, refuses the settings, or hardly makes an
                item that fits.
        """
        made: list[Rows] = []
        missing = size
        for _ in range(_MAX_TRIES):
            data = self._dataset(int(rng.integers(2**31)), missing)
            encoded = [row for entry in data if (row := self._encode(data, entry)) is not None]
            if encoded:
                tokens_BT, targets_BT = (np.array([row[part] for row in encoded]) for part in (0, 1))
                made.append(Rows(tokens_BT=tokens_BT, targets_BT=targets_BT))
                missing -= len(encoded)
            if not missing:
                return Rows.join(made)
        raise ValueError(
            f"task.gym: only {size - missing} of {size} items of {self.dataset!r} fit num_tokens={self.num_tokens} and "
            f"have an answer after {_MAX_TRIES} tries; choose a larger num_tokens or another dataset"
        )

    def _dataset(self, seed: int, size: int) -> Any:
        library = _library()
        known = library.factory.DATASETS
        if self.dataset not in known:
            raise ValueError(f"task.gym: unknown dataset {self.dataset!r}{suggest(self.dataset, known)}")
        try:
            return library.create_dataset(self.dataset, seed=seed, size=size, **self.config)
        except (TypeError, AssertionError) as error:
            raise ValueError(f"task.gym: {self.dataset!r} refuses config={self.config}: {error}") from error

    def _encode(self, data: Any, entry: dict[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
        question, answer = entry["question"].encode(), entry["answer"]
        if not isinstance(answer, str) or len(question) + len(answer.encode()) + 2 > self.num_tokens:
            return None
        told = [*(byte + _FIRST_BYTE for byte in answer.encode()), _END]
        tokens = [*(byte + _FIRST_BYTE for byte in question), _ANSWER, *told]
        tokens_T = np.full(self.num_tokens, PAD)
        tokens_T[: len(tokens)] = tokens
        targets_T = np.full(self.num_tokens, IGNORE)
        targets_T[len(question) : len(question) + len(told)] = told
        _drawn[self._key(question)] = (data, entry)
        while len(_drawn) > _REMEMBERED:
            _drawn.popitem(last=False)
        return tokens_T, targets_T

    def _key(self, question: bytes) -> tuple[str, str, bytes]:
        return self.dataset, json.dumps(self.config, sort_keys=True), question

    def _entry(self, tokens_T: np.ndarray) -> tuple[Any, dict[str, Any]]:
        tokens = [int(token) for token in tokens_T]
        question = bytes(token - _FIRST_BYTE for token in tokens[: tokens.index(_ANSWER)])
        if self._key(question) not in _drawn:
            raise ValueError("task.gym: this row was not drawn lately in this process, draw it again before scoring it")
        return _drawn[self._key(question)]

    def solve(self, tokens_T: np.ndarray) -> tuple[int, ...]:
        """The answer that the generator gave.

        Raises:
            ValueError: the row was not drawn in this process, or too long ago.
        """
        _, entry = self._entry(tokens_T)
        return (*(byte + _FIRST_BYTE for byte in entry["answer"].encode()), _END)

    def verify(self, tokens_T: np.ndarray, answer: Sequence[int] | np.ndarray) -> bool:
        """Whether the generator's own scorer gives the answer, which must end in the end token, a full score.

        Raises:
            ValueError: see `solve`.
        """
        data, entry = self._entry(tokens_T)
        given = [int(token) for token in answer]
        if not given or given[-1] != _END or min(given[:-1], default=_FIRST_BYTE) < _FIRST_BYTE:
            return False
        text = bytes(token - _FIRST_BYTE for token in given[:-1]).decode(errors="replace")
        return data.score_answer(answer=text, entry=entry) >= 1.0


def _library() -> Any:
    try:
        return importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise ValueError("task.gym needs the reasoning-gym library: pip install 'loopwise[gym]'") from error
