"""Group words against explicit permutations, arithmetic against Python's own evaluation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from loopwise.tasks.base import IGNORE, PAD, rows, text
from loopwise.tasks.state_tracking import GroupWord, ModularArithmetic, elements, multiplication

ORDERS = {"Z2": 2, "Z7": 7, "Z60": 60, "S3": 6, "S4": 24, "S5": 120, "A4": 12, "A5": 60, "A4xZ5": 60, "Z2xZ2xZ3": 12}


@pytest.mark.parametrize("group", ORDERS)
def test_the_table_is_a_group(group: str) -> None:
    table_GG = multiplication(group)
    order = ORDERS[group]
    assert table_GG.shape == (order, order) and len(set(elements(group))) == order
    assert np.array_equal(table_GG[0], np.arange(order)) and np.array_equal(table_GG[:, 0], np.arange(order))
    for line in (*table_GG, *table_GG.T):
        assert np.array_equal(np.sort(line), np.arange(order))
    # (ab)c = a(bc) for all triples
    assert np.array_equal(table_GG[table_GG], table_GG[:, table_GG])


@pytest.mark.parametrize(("group", "commutes"), [("Z60", True), ("S3", False), ("A5", False), ("A4xZ5", False)])
def test_who_commutes(group: str, commutes: bool) -> None:
    assert np.array_equal(multiplication(group), multiplication(group).T) == commutes


@pytest.mark.parametrize("group", ["S3", "S5", "A5"])
def test_permutations_act_in_the_order_of_reading(group: str) -> None:
    task = GroupWord(group=group, num_elements=9)
    drawn = rows(task, seed=0, index=0, size=20)
    size = int(group[1])
    for row in range(20):
        word, products = (text(task, part[row]).split() for part in (drawn.tokens_BT, drawn.targets_BT))
        where = list(range(1, size + 1))  # where each of 1..n is now
        for permutation, product in zip(word, products, strict=True):
            where = [int(permutation[place - 1]) for place in where]
            assert product == "".join(map(str, where))


def test_parity_and_sums() -> None:
    for modulus in (2, 5):
        task = GroupWord(group=f"Z{modulus}", num_elements=30)
        drawn = task.draw(np.random.default_rng(0), 50)
        assert np.array_equal(drawn.targets_BT - 1, (drawn.tokens_BT - 1).cumsum(axis=1) % modulus)


def test_products_of_groups_work_part_by_part() -> None:
    task = GroupWord(group="S3xZ4", num_elements=6)
    drawn = task.draw(np.random.default_rng(0), 20)
    for row in range(20):
        word, products = (text(task, part[row]).split() for part in (drawn.tokens_BT, drawn.targets_BT))
        assert [int(one.split("|")[1]) for one in products] == [
            total % 4 for total in itertools.accumulate(int(one.split("|")[1]) for one in word)
        ]


def test_lengths_and_the_final_position() -> None:
    task = GroupWord(group="S3", num_elements=12, min_elements=3, final=True)
    dense = GroupWord(group="S3", num_elements=12, min_elements=3)
    drawn, whole = (which.draw(np.random.default_rng(0), 400) for which in (task, dense))
    assert np.array_equal(drawn.tokens_BT, whole.tokens_BT)
    assert set(drawn.keys["elements"]) == set(range(3, 13))
    for row, num in enumerate(drawn.keys["elements"]):
        assert (drawn.tokens_BT[row, :num] != PAD).all() and (drawn.tokens_BT[row, num:] == PAD).all()
        assert np.flatnonzero(drawn.targets_BT[row] != IGNORE).tolist() == [num - 1]
        assert np.flatnonzero(whole.targets_BT[row] != IGNORE).tolist() == list(range(num))
        assert drawn.targets_BT[row, num - 1] == whole.targets_BT[row, num - 1]
        for which, kind in ((drawn, task), (whole, dense)):
            answer = which.answer(row)
            assert kind.verify(which.tokens_BT[row], answer)
            assert not kind.verify(which.tokens_BT[row], [*answer[:-1], answer[-1] % 6 + 1])
    assert task.chance == pytest.approx(1 / 6)


def test_every_product_is_equally_likely() -> None:
    drawn = GroupWord(group="A4", num_elements=5, final=True).draw(np.random.default_rng(0), 12000)
    counts = np.bincount(drawn.targets_BT[:, -1], minlength=13)[1:]
    assert np.abs(counts - 1000).max() < 5 * math.sqrt(1000)


ARITHMETIC = [
    ModularArithmetic(),
    ModularArithmetic(modulus=2, num_operands=9, min_operands=1),
    ModularArithmetic(modulus=12, num_operands=6),
    ModularArithmetic(num_operands=9, min_operands=2, brackets=True),
]


@pytest.mark.parametrize("task", ARITHMETIC, ids=["default", "lengths", "twelve", "brackets"])
def test_values_are_what_python_says(task: ModularArithmetic) -> None:
    drawn = rows(task, seed=0, index=0, size=200)
    for row in range(200):
        shown = text(task, drawn.tokens_BT[row])
        assert shown.endswith("=")
        value = eval(shown[:-1]) % task.modulus
        assert drawn.targets_BT[row, len(drawn.tokens_BT[row].nonzero()[0]) - 1] == value + 1
        assert (drawn.targets_BT[row] != IGNORE).sum() == 1
        assert task.verify(drawn.tokens_BT[row], [value + 1])
        assert not task.verify(drawn.tokens_BT[row], [(value + 1) % task.modulus + 1])
        digits = sum(token <= task.modulus for token in drawn.tokens_BT[row] if token)
        assert drawn.keys["operands"][row] == digits
        assert shown.count("(") == shown.count(")") == (digits - 1 if task.brackets else 0)


def test_dense_targets_are_the_values_of_prefixes() -> None:
    task = ModularArithmetic(num_operands=7, min_operands=1, final=False)
    drawn = task.draw(np.random.default_rng(0), 100)
    for row in range(100):
        shown = text(task, drawn.tokens_BT[row])
        for place, target in enumerate(drawn.targets_BT[row]):
            if place < len(shown) and (shown[place] == "=" or shown[place].isdigit()):
                assert target == eval(shown[:place] if shown[place] == "=" else shown[: place + 1]) % 5 + 1
            else:
                assert target == IGNORE
        assert task.verify(drawn.tokens_BT[row], drawn.answer(row))


@pytest.mark.parametrize(
    "task",
    [ModularArithmetic(num_operands=4), ModularArithmetic(num_operands=5, min_operands=3, brackets=True)],
    ids=["plain", "brackets"],
)
def test_chance_is_the_share_of_the_most_frequent_value(task: ModularArithmetic) -> None:
    drawn = task.draw(np.random.default_rng(0), 20000)
    shares = np.bincount(drawn.targets_BT[drawn.targets_BT != IGNORE], minlength=6)[1:] / 20000
    assert shares.max() == pytest.approx(task.chance, abs=0.015) and task.chance > 0.2


def test_the_vocabulary_is_that_of_the_field() -> None:
    assert len(ModularArithmetic().vocabulary) == 10 and len(ModularArithmetic(brackets=True).vocabulary) == 12


@pytest.mark.parametrize("task", [GroupWord(num_elements=5), *ARITHMETIC], ids=str)
def test_rows_are_reproducible_and_splits_disjoint(task: GroupWord | ModularArithmetic) -> None:
    again = [rows(task, seed=1, index=2, size=64).tokens_BT for _ in range(2)]
    assert np.array_equal(*again)
    seen = [
        {tuple(row) for row in rows(task, seed=0, index=0, size=64, split=name).tokens_BT} for name in ("train", "test")
    ]
    assert not seen[0] & seen[1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupWord(group="S6"), "group='S6' is not known: use one of Z2-Z1000 S2-S5 A3-A5"),
        (lambda: GroupWord(group="Z1"), "group='Z1' is not known"),
        (lambda: GroupWord(group="S5xZ20"), "more than 1000 elements"),
        (lambda: GroupWord(num_elements=0), "num_elements=0 must be at least 1"),
        (lambda: GroupWord(min_elements=17), "min_elements=17 must be from 1 to num_elements"),
        (lambda: ModularArithmetic(modulus=1), "modulus=1 must be from 2 to 100"),
        (lambda: ModularArithmetic(num_operands=0), "num_operands=0 must be at least 1"),
        (lambda: ModularArithmetic(min_operands=0), "min_operands=0 must be from 1"),
        (lambda: ModularArithmetic(brackets=True, final=False), "final=False must be true with brackets"),
    ],
)
def test_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
