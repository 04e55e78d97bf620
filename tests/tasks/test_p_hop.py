"""p-hop induction against searches in strings, and against the published definition with positions from 1."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from loopwise.tasks.base import IGNORE, rows, text
from loopwise.tasks.p_hop import PHop, find


def oracle(row: str, hops: int) -> str:
    """Labels of every letter of a string, hop by hop: cut the string before the letter, search it from the right."""
    labels = ""
    for place in range(len(row)):
        at: int | None = place
        for _ in range(hops):
            if at is not None:
                before = row[:at].rfind(row[at])
                at = before + 1 if before >= 0 else None
        labels += "~" if at is None else row[at]
    return labels


def definition(v: list[str], p: int) -> str:
    """Saunshi et al.: find_1(v, i) = max{j <= i: v_{j-1} = v_i} or 0, positions from 1; the letter at find_p(v, n)."""

    def find_1(i: int) -> int:
        return max((j for j in range(2, i + 1) if i and v[j - 2] == v[i - 1]), default=0)

    i = len(v)
    for _ in range(p):
        i = find_1(i)
    return v[i - 1] if i else "~"


@pytest.mark.parametrize("alphabet", [3, 4, 9])
def test_dense_labels_are_what_the_search_finds(alphabet: int) -> None:
    task = PHop(alphabet=alphabet, context=40, hops=tuple(range(9)))
    drawn = rows(task, seed=0, index=0, size=120)
    assert (drawn.targets_BT[:, 0] == IGNORE).all()
    for row in range(120):
        hops, *letters = text(task, drawn.tokens_BT[row]).split()
        assert int(hops) == drawn.keys["hops"][row]
        assert "".join(text(task, drawn.targets_BT[row, 1:]).split()) == oracle("".join(letters), int(hops))


def test_first_letters_may_be_left_out() -> None:
    whole = PHop(context=20, hops=(0, 2)).draw(np.random.default_rng(3), 40)
    late = PHop(context=20, hops=(0, 2), scored_from=7).draw(np.random.default_rng(3), 40)
    assert (late.tokens_BT == whole.tokens_BT).all()
    assert (late.targets_BT[:, :8] == IGNORE).all()
    assert (late.targets_BT[:, 8:] == whole.targets_BT[:, 8:]).all()
    task = PHop(context=20, hops=(0, 2), scored_from=7)
    assert all(task.solve(late.tokens_BT[row]) == tuple(late.answer(row)) for row in range(40))


@pytest.mark.parametrize("hops", [1, 2, 5])
def test_the_last_letter_follows_the_published_definition(hops: int) -> None:
    task = PHop(context=48, hops=(hops,), dense=False)
    drawn = rows(task, seed=1, index=0, size=100)
    assert (drawn.targets_BT[:, :-1] == IGNORE).all()
    for row in range(100):
        _, *letters = text(task, drawn.tokens_BT[row]).split()
        assert text(task, drawn.targets_BT[row, -1:]) == definition(letters, hops) == oracle("".join(letters), hops)[-1]


def test_find_by_hand() -> None:
    letters_BN = np.array([[0, 1, 2, 0, 1, 0]])
    assert find(letters_BN, 3).tolist() == [[6, 6, 6, 1, 2, 4]]


def test_no_letter_follows_itself_and_every_letter_is_as_likely() -> None:
    letters_BN = rows(PHop(context=64), seed=0, index=0, size=500).tokens_BT[:, 1:]
    assert (letters_BN[:, 1:] != letters_BN[:, :-1]).all()
    assert np.bincount(letters_BN.ravel())[2:] / letters_BN.size == pytest.approx([0.25] * 4, abs=0.01)


def test_hop_counts_are_drawn_uniformly_even_where_few_rows_have_many() -> None:
    # 8 hops in 24 letters seldom exist: rows are drawn again, but not their number of hops.
    task = PHop(context=24, hops=(0, 8))
    assert (task.draw(np.random.default_rng(0), 600).targets_BT[:, -1] == 1).mean() > 0.3
    drawn = rows(replace(task, dense=False), seed=0, index=0, size=600)
    assert (drawn.keys["hops"] == 8).mean() == pytest.approx(0.5, abs=0.08)


def test_the_answer_behind_many_hops_is_spread_over_the_alphabet() -> None:
    task = PHop(context=100, hops=(8,), dense=False)
    answers = rows(task, seed=0, index=0, size=2000).targets_BT[:, -1]
    assert max(Counter(answers.tolist()).values()) / 2000 == pytest.approx(task.chance, abs=0.04)
    one_hop = rows(PHop(context=100, hops=(1,), dense=False), seed=0, index=0, size=300)
    assert (one_hop.targets_BT[:, -1] != one_hop.tokens_BT[:, -1]).all()


def test_random_repeats_break_a_planted_chain() -> None:
    """Why labels are computed: a letter planted as the answer is wrong as soon as an earlier one repeats."""
    row = "a b c a".replace(" ", "")
    assert oracle(row, 1)[-1] == "b"
    assert oracle("ab" + "ad" + "a", 1)[-1] == "d"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alphabet": 2}, "alphabet=2 must be 3 to 26"),
        ({"alphabet": 27}, "alphabet=27 must be 3 to 26"),
        ({"context": 1}, "context=1 must be at least 2"),
        ({"context": 20, "scored_from": 20}, "scored_from=20 must be 0 to 19"),
        ({"scored_from": 5, "dense": False}, "scored_from=5 goes with dense rows"),
        ({"hops": ()}, r"hops=\(\) must be different, 0 to 100"),
        ({"hops": (3, 3)}, r"hops=\(3, 3\) must be different, 0 to 100"),
        ({"hops": (101,)}, "must be different, 0 to 100"),
    ],
)
def test_refused_sizes(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PHop(**fields)


def test_more_hops_than_fit_is_an_error_when_drawing() -> None:
    with pytest.raises(ValueError, match=r"context=20 is too short for hops=19: .* goes back about 3 letters"):
        rows(PHop(context=20, hops=(19,), dense=False), seed=0, index=0, size=4)
