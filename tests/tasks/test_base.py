"""Laws that hold for every task, and the pieces of the base: splits, scores, text, names."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopwise.loop.config import from_dict, to_dict
from loopwise.tasks.addition import Addition
from loopwise.tasks.assignment import Assignment
from loopwise.tasks.base import (
    IGNORE,
    PAD,
    SPLITS,
    Rows,
    Task,
    named,
    names,
    padded,
    rows,
    score,
    split_of,
    text,
    wilson,
)
from loopwise.tasks.depo import Depo
from loopwise.tasks.igsm import Igsm
from loopwise.tasks.induction import Induction
from loopwise.tasks.mano import Mano
from loopwise.tasks.maths import Maths
from loopwise.tasks.p_hop import PHop
from loopwise.tasks.pointer import Pointer

TASKS: tuple[Task, ...] = (
    Addition(operands=(2, 3, 5)),
    Addition(operands=(2, 4), reverse=True),
    Assignment(),
    Assignment(depths=(1,), shots=2, surface="code"),
    Depo(nodes=8, hops=4, queries=3, name_sizes=(1, 2), pieces=6),
    Igsm(variables=(5, 6)),
    Induction(),
    Induction(symbols=40, distinct=True),
    Mano(operations=(1, 4)),
    Maths(),
    PHop(context=20, hops=(0, 1, 3)),
    PHop(context=40, hops=(2, 4), dense=False),
    Pointer(nodes=5, hops=(1, 3), queries=2),
    Pointer(nodes=5, hops=(0, 2), queries=2, dense=False, bijective=False),
)
# So small that independent draws meet the same prompts again and again.
TINY: tuple[Task, ...] = (
    Addition(operands=(2,), digits=1),
    Assignment(depths=(0,), variables=(2,), values=2),
    Depo(nodes=3, hops=2, queries=1, pieces=6, name_sizes=(1,)),
    Igsm(variables=(2,), levels=2, entities=2, terms=1, modulus=3),
    Induction(symbols=3, sizes=(2, 3)),
    Mano(operations=(1,), modulus=3),
    Maths(operands=(1,), variables=1, limit=2),
    PHop(context=4, hops=(0, 1, 2)),
    PHop(context=6, hops=(1,), dense=False),
    Pointer(nodes=3, hops=(1, 2)),
)


def label(task: Task) -> str:
    return str(task.kind).removeprefix("task.")


def same(left: Rows, right: Rows) -> bool:
    pairs = [(left.tokens_BT, right.tokens_BT), (left.targets_BT, right.targets_BT)]
    pairs += [(left.keys[name], right.keys[name]) for name in left.keys | right.keys]
    return all(np.array_equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("task", TASKS, ids=label)
def test_rows_have_the_declared_form(task: Task) -> None:
    drawn = rows(task, seed=1, index=2, size=40)
    assert drawn.tokens_BT.shape == drawn.targets_BT.shape == (40, task.length)
    assert drawn.tokens_BT.dtype == drawn.targets_BT.dtype == np.int64
    assert all(key_B.shape == (40,) and key_B.dtype == np.int64 for key_B in drawn.keys.values())
    assert len(set(task.vocabulary)) == len(task.vocabulary)
    assert drawn.tokens_BT.min() >= 0 and drawn.tokens_BT.max() < len(task.vocabulary)
    scored_BT = drawn.targets_BT != IGNORE
    assert scored_BT.any(axis=1).all()
    assert drawn.targets_BT[scored_BT].min() > PAD and drawn.targets_BT[scored_BT].max() < len(task.vocabulary)
    for tokens_T, scored_T in zip(drawn.tokens_BT, scored_BT, strict=True):
        used = np.flatnonzero(tokens_T != PAD).max()
        assert (tokens_T[: used + 1] != PAD).all() and not scored_T[used + 1 :].any()
    assert 0 <= task.chance <= 1


@pytest.mark.parametrize("task", TASKS, ids=label)
def test_the_longest_row_is_as_long_as_declared(task: Task) -> None:
    drawn = rows(task, seed=0, index=0, size=400)
    reached = int((drawn.tokens_BT != PAD).sum(axis=1).max())
    # Depo names and i-GSM definitions are random in length, all of them longest in hardly any row.
    assert reached == task.length or (isinstance(task, Depo | Igsm) and 0.6 * task.length < reached <= task.length)


@pytest.mark.parametrize("task", TASKS, ids=label)
def test_verify_takes_the_target_and_nothing_else(task: Task) -> None:
    drawn = rows(task, seed=3, index=0, size=20)
    rng = np.random.default_rng(0)
    for row in range(20):
        answer = drawn.answer(row)
        assert task.verify(drawn.tokens_BT[row], answer)
        wrong = answer.copy()
        place = rng.integers(len(answer))
        wrong[place] = (wrong[place] + rng.integers(1, len(task.vocabulary))) % len(task.vocabulary)
        assert not task.verify(drawn.tokens_BT[row], wrong)
        assert not task.verify(drawn.tokens_BT[row], answer[:-1])
        assert not task.verify(drawn.tokens_BT[row], [*answer, answer[-1]])


@pytest.mark.parametrize("task", TASKS, ids=label)
def test_rows_are_a_pure_function_of_their_arguments(task: Task) -> None:
    first = rows(task, seed=5, index=1, size=16)
    np.random.seed(1)
    assert same(first, rows(task, seed=5, index=1, size=16))
    for change in ({"seed": 6}, {"index": 2}, {"split": "test"}):
        arguments = {"seed": 5, "index": 1, "size": 16} | change
        assert not same(first, rows(task, **arguments))


@pytest.mark.parametrize("task", TINY, ids=label)
def test_no_prompt_is_in_two_splits(task: Task) -> None:
    prompts: dict[str, set[bytes]] = {}
    for split in SPLITS:
        found = [rows(task, seed=seed, index=0, size=200, split=split) for seed in (0, 1)]
        prompts[split] = {prompt_T.tobytes() for part in found for prompt_T in task.prompt(part)}
    assert len(prompts["train"]) < 400, "the task must be so small that prompts repeat"
    assert not prompts["train"] & prompts["valid"]
    assert not prompts["train"] & prompts["test"]
    assert not prompts["valid"] & prompts["test"]


@pytest.mark.parametrize("task", TASKS, ids=label)
def test_shares_of_the_splits(task: Task) -> None:
    drawn = task.draw(np.random.default_rng(0), 2000)
    shares = np.bincount(split_of(task.prompt(drawn)), minlength=3) / 2000
    assert shares == pytest.approx([0.75, 0.125, 0.125], abs=0.05)


@pytest.mark.parametrize("task", TASKS, ids=label)
def test_a_config_survives_json(task: Task) -> None:
    assert from_dict(to_dict(task)) == task


def test_the_split_of_a_prompt_does_not_depend_on_the_longest_row() -> None:
    short, long = Addition(operands=(2,)), Addition(operands=(2, 32))
    drawn = short.draw(np.random.default_rng(0), 300)
    wider = padded(list(drawn.tokens_BT), long.length), padded(list(drawn.targets_BT), long.length, IGNORE)
    again = Rows(tokens_BT=wider[0], targets_BT=wider[1])
    assert np.array_equal(split_of(short.prompt(drawn)), split_of(long.prompt(again)))


def test_the_answer_does_not_take_part_in_the_split() -> None:
    task = Induction(sizes=(4,))
    drawn = task.draw(np.random.default_rng(0), 200)
    other = drawn.tokens_BT.copy()
    other[:, 5:] = np.where(other[:, 5:] == 2, 3, 2)
    targets_BT = drawn.targets_BT.copy()
    targets_BT[:, 4:7] = other[:, 5:]
    assert np.array_equal(task.prompt(drawn), task.prompt(Rows(tokens_BT=other, targets_BT=targets_BT)))


def test_order_of_tokens_matters_to_the_split() -> None:
    prompts = np.random.default_rng(0).integers(1, 5, size=(500, 6))
    assert (split_of(prompts) != split_of(prompts[:, ::-1])).mean() > 0.2


PRINT_DIGEST = """
import sys
from tests.tasks import test_base
print(test_base.digest(), "torch" in sys.modules)
"""


def digest() -> str:
    total = hashlib.sha256()
    for task in TASKS:
        drawn = rows(task, seed=7, index=3, size=10, split="valid")
        total.update(drawn.tokens_BT.tobytes() + drawn.targets_BT.tobytes())
    return total.hexdigest()


def test_a_fresh_process_draws_the_same_rows_and_needs_no_torch() -> None:
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(["src", *sys.path])}
    done = subprocess.run([sys.executable, "-c", PRINT_DIGEST], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == [digest(), "False"], done.stderr


@dataclass(frozen=True, kw_only=True)
class Constant(Task):
    """The same row always."""

    vocabulary = ("<pad>", "a", "b")
    length = 3
    chance = 1.0

    def draw(self, rng: np.random.Generator, size: int) -> Rows:
        return Rows(tokens_BT=np.full((size, 3), 1), targets_BT=np.tile([IGNORE, 1, 2], (size, 1)))


def test_a_split_without_prompts_is_an_error_and_no_endless_loop() -> None:
    task = Constant()
    of_row = SPLITS[split_of(task.prompt(task.draw(np.random.default_rng(0), 1)))[0]]
    assert len(rows(task, seed=0, index=0, size=5, split=of_row)) == 5
    for split in set(SPLITS) - {of_row}:
        with pytest.raises(ValueError, match=f"split '{split}' has 0 of 5 rows .* choose larger sizes"):
            rows(task, seed=0, index=0, size=5, split=split)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "vaild"}, "split='vaild'; did you mean 'valid'?"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"index": -2}, "index=-2 must be at least 0"),
        ({"size": 0}, "size=0 must be at least 1"),
    ],
)
def test_refused_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        rows(Maths(), **({"seed": 0, "index": 0, "size": 1} | arguments))
    assert str(caught.value) == message


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_score_equals_counting(data: st.DataObject) -> None:
    size, length = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    targets_BT = np.where(rng.random((size, length)) < 0.4, IGNORE, rng.integers(1, 3, (size, length)))
    targets_BT[:, 0] = 1
    predicted_BT, key_B = rng.integers(1, 3, (size, length)), rng.integers(3, size=size)
    result = score(Rows(tokens_BT=targets_BT, targets_BT=targets_BT, keys={"k": key_B}), predicted_BT)
    exact, right, scored = [], 0, 0
    for targets_T, predicted_T in zip(targets_BT, predicted_BT, strict=True):
        hits = [int(t == p) for t, p in zip(targets_T, predicted_T, strict=True) if t != IGNORE]
        exact.append(all(hits))
        right, scored = right + sum(hits), scored + len(hits)
    assert result.num == size
    assert result.exact == pytest.approx(sum(exact) / size)
    assert result.token == pytest.approx(right / scored)
    for value in set(key_B.tolist()):
        group = [hit for hit, key in zip(exact, key_B, strict=True) if key == value]
        assert result.by["k"][value] == pytest.approx(sum(group) / len(group))
        assert result.num_by["k"][value] == len(group)
        inside = (targets_BT != IGNORE) & (key_B == value)[:, None]
        assert result.token_by["k"][value] == pytest.approx((predicted_BT == targets_BT)[inside].mean())
    assert result.interval == wilson(sum(exact), size)


def test_the_targets_score_one_and_nothing_scores_zero() -> None:
    drawn = rows(Addition(), seed=0, index=0, size=30)
    assert score(drawn, drawn.targets_BT).exact == score(drawn, drawn.targets_BT).token == 1
    assert score(drawn, np.zeros_like(drawn.targets_BT)).token == 0


def test_score_refuses() -> None:
    drawn = rows(Maths(), seed=0, index=0, size=4)
    with pytest.raises(ValueError, match="predicted_BT must have the shape"):
        score(drawn, drawn.targets_BT[:, 1:])
    with pytest.raises(ValueError, match="scored position"):
        score(replace(drawn, targets_BT=np.full_like(drawn.targets_BT, IGNORE)), drawn.tokens_BT)
    with pytest.raises(ValueError, match="scored position"):
        score(drawn[:0], drawn.tokens_BT[:0])


@pytest.mark.parametrize(("successes", "num"), [(0, 10), (1, 10), (5, 10), (10, 10), (997, 1000)])
def test_wilson_bounds_are_where_the_score_test_rejects(successes: int, num: int) -> None:
    z, share = 1.959964, successes / num
    low, high = wilson(successes, num)
    assert low <= share <= high
    for bound in (low, high):
        if 1e-9 < bound < 1 - 1e-9:
            assert abs(share - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / num), abs=1e-12)


def test_wilson_refuses() -> None:
    with pytest.raises(ValueError, match="successes=3, num=2"):
        wilson(3, 2)


def test_rows_refuse_shapes_that_disagree() -> None:
    tokens_BT = np.ones((2, 3), dtype=np.int64)
    with pytest.raises(ValueError, match="share a shape"):
        Rows(tokens_BT=tokens_BT, targets_BT=tokens_BT[:, 1:])
    with pytest.raises(ValueError, match=r"keys\['hops'\] must have the shape \(2,\)"):
        Rows(tokens_BT=tokens_BT, targets_BT=tokens_BT, keys={"hops": np.ones(3)})


def test_rows_can_be_cut_and_joined() -> None:
    drawn = rows(Maths(), seed=0, index=0, size=10)
    assert same(Rows.join([drawn[:3], drawn[3:]]), drawn)
    assert same(drawn[drawn.keys["operands"] == 1], drawn[np.flatnonzero(drawn.keys["operands"] == 1)])


def test_text_of_tokens_and_of_targets() -> None:
    assert text(Constant(), [1, 2, 0, 0]) == "a b"
    assert text(Constant(), [IGNORE, 0, 2]) == "_ <pad> b"
    with pytest.raises(ValueError, match="token 3 is not among the 3"):
        text(Constant(), [3])


def test_padded() -> None:
    assert padded([[1, 2], []], 3, 7).tolist() == [[1, 2, 7], [7, 7, 7]]


def test_names_and_named() -> None:
    known = names()
    assert list(known) == sorted(known)
    assert {label(task) for task in TASKS} <= set(known)
    for task in TASKS:
        values = {item.name: getattr(task, item.name) for item in fields(task)}
        as_json = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        assert named(label(task), **as_json) == named(str(task.kind), **values) == task


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("p_hopp", {}, "unknown task 'p_hopp'; did you mean 'p_hop'?"),
        ("p_hop", {"contxt": 3}, "task.p_hop: unknown field 'contxt'; did you mean 'context'?"),
        ("p_hop", {"context": 0}, "task.p_hop: context=0 must be at least 2"),
        ("p_hop", {"context": "3"}, "task.p_hop: context='3' must be an integer"),
    ],
)
def test_named_refuses(name: str, values: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        named(name, **values)
    assert str(caught.value) == message
