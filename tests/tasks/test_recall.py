"""Multi-query associative recall against look-up, and its gaps against draws one after the other."""

from __future__ import annotations

import numpy as np
import pytest

from loopwise.tasks.base import IGNORE, rows, text
from loopwise.tasks.recall import Recall

TASKS = [
    Recall(),
    Recall(num_symbols=20, num_tokens=24, num_pairs=4),
    Recall(num_symbols=9, num_tokens=12, num_pairs=3, random_filling=False),
    Recall(num_symbols=64, num_tokens=32, num_pairs=8, power=1.0),
]


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_targets_are_the_values_that_went_with_the_keys(task: Recall) -> None:
    drawn = rows(task, seed=0, index=0, size=50)
    for tokens_T, targets_T in zip(drawn.tokens_BT, drawn.targets_BT, strict=True):
        symbols, answers = text(task, tokens_T).split(), text(task, targets_T).split()
        table = {symbols[place]: symbols[place + 1] for place in range(0, 2 * task.num_pairs, 2)}
        assert len(table) == len(set(table.values())) == task.num_pairs
        assert all(key[0] == "k" and value[0] == "v" for key, value in table.items())
        asked = []
        for place, answer in enumerate(answers):
            symbol = symbols[place] if place < len(symbols) else "<pad>"
            if place >= 2 * task.num_pairs and symbol in table:
                assert answer == table[symbol] and place % 2 == 0
                asked.append(symbol)
            else:
                assert answer == "_"
        assert sorted(asked) == sorted(table), "every key is asked once"
        assert (tokens_T != 0).all() or not task.random_filling


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_verify(task: Recall) -> None:
    drawn = task.draw(np.random.default_rng(0), 10)
    for row in range(10):
        answer = drawn.answer(row)
        assert task.verify(drawn.tokens_BT[row], answer)
        assert not task.verify(drawn.tokens_BT[row], answer[::-1])
        assert not task.verify(drawn.tokens_BT[row], answer[:-1])


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_gaps_are_drawn_without_replacement_by_the_power_law(power: float) -> None:
    task = Recall(num_symbols=64, num_tokens=40, num_pairs=3, power=power)
    drawn = task.draw(np.random.default_rng(0), 4000)
    places = (np.argwhere(drawn.targets_BT != IGNORE)[:, 1] - 6) // 2
    # the naive way: one row after the other
    rng, num_places = np.random.default_rng(1), 17
    weight_S = np.arange(1, num_places + 1) ** (power - 1.0)
    naive = np.concatenate(
        [rng.choice(num_places, size=3, replace=False, p=weight_S / weight_S.sum()) for _ in range(4000)]
    )
    ours_S, naive_S = (np.bincount(some, minlength=num_places) / 4000 for some in (places, naive))
    assert np.abs(ours_S - naive_S).max() < 5 * np.sqrt(2 * 0.25 / 4000)
    assert (ours_S[0] > 3 * ours_S[-1]) == (power < 1)


def test_the_first_key_takes_its_place_by_the_law_itself() -> None:
    task = Recall(num_symbols=64, num_tokens=64, num_pairs=2)
    drawn = task.draw(np.random.default_rng(0), 4000)
    first_B = np.array([list(row).index(row[0], 1) for row in drawn.tokens_BT])
    share = 1 / np.sum(np.arange(1, 31) ** -0.99)
    assert (first_B == 4).mean() == pytest.approx(share, abs=5 * np.sqrt(share * (1 - share) / 4000))


def test_filling_is_uniform_over_everything_but_the_keys() -> None:
    task = Recall(num_symbols=12, num_tokens=40, num_pairs=2)
    drawn = task.draw(np.random.default_rng(0), 2000)
    counts = np.zeros(12)
    for row in drawn.tokens_BT:
        filling = row[5::2]
        assert not set(filling) & {row[0], row[2]} and filling.min() > 0
        counts += np.bincount(filling, minlength=12)
    # a value is there in every row, a key only where it is not one of the row's two of five
    assert counts[6:].std() < 0.05 * counts[6:].mean() and counts[1:6].std() < 0.05 * counts[1:6].mean()
    assert counts[1:6].mean() / counts[6:].mean() == pytest.approx(3 / 5, rel=0.05)


def test_rows_with_the_same_pairs_are_in_one_split() -> None:
    task = Recall(num_symbols=12, num_tokens=16, num_pairs=2)
    seen = {}
    for split in ("train", "valid", "test"):
        drawn = rows(task, seed=0, index=0, size=300, split=split)
        assert np.array_equal(drawn.tokens_BT, rows(task, seed=0, index=0, size=300, split=split).tokens_BT)
        seen[split] = {frozenset({(row[0], row[1]), (row[2], row[3])}) for row in drawn.tokens_BT.tolist()}
    assert not seen["train"] & seen["valid"] and not seen["train"] & seen["test"] and not seen["valid"] & seen["test"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_pairs": 0}, "num_pairs=0 must be at least 1"),
        ({"num_tokens": 63}, r"num_tokens=63 must be even and at least 4 \* num_pairs \(16\)"),
        ({"num_tokens": 14}, "num_tokens=14 must be even"),
        ({"num_symbols": 9}, r"num_symbols=9 must be more than 2 \* num_pairs \+ 1"),
        ({"power": 0.0}, "power=0.0 must be positive"),
    ],
)
def test_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recall(**values)
