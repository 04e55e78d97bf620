"""Moments that move with the parameters of an edit: the table by hand, and the identities that it claims."""

from __future__ import annotations

import pytest
import torch

from loopwise.train.moments import Origin, begin_with, move_moments
from loopwise.train.stage import Moments

UNTIE = {"out": Origin(("out",)), **{f"l.{n}": Origin((f"l.{s}",)) for n, s in enumerate((0, 1, 1, 1, 2))}}
TIE = {
    "out": Origin(("out",)),
    "l.0": Origin(("l.0",)),
    "l.1": Origin(("l.1", "l.2", "l.3")),
    "l.2": Origin(("l.4",)),
}


def adam(names: list[str], seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for number, name in enumerate(names):
        state[f"{name}/step"] = torch.tensor(float(10 + number))
        state[f"{name}/exp_avg"] = torch.randn(3, 2, generator=draw)
        state[f"{name}/exp_avg_sq"] = torch.rand(3, 2, generator=draw)
    return state


OLD = adam(["out", "l.0", "l.1", "l.2"])


def moments_of(state: dict[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    return state[f"{name}/exp_avg"], state[f"{name}/exp_avg_sq"], float(state[f"{name}/step"])


def test_copies_have_the_moments_of_their_source() -> None:
    moved = move_moments(OLD, UNTIE, "copy")
    for name, origin in UNTIE.items():
        for moved_one, old in zip(moments_of(moved, name), moments_of(OLD, origin.sources[0]), strict=True):
            assert torch.equal(torch.as_tensor(moved_one), torch.as_tensor(old))
    assert moved["l.1/exp_avg"].data_ptr() != moved["l.2/exp_avg"].data_ptr() != OLD["l.1/exp_avg"].data_ptr()


def test_zero_keeps_counts_and_the_first_copy() -> None:
    moved = move_moments(OLD, UNTIE, "zero")
    for name in ("out", "l.0", "l.1", "l.4"):
        first, second, _ = moments_of(moved, name)
        assert torch.equal(first, moments_of(OLD, UNTIE[name].sources[0])[0]) and second.any()
    for name in ("l.2", "l.3"):
        first, second, count = moments_of(moved, name)
        assert not first.any() and not second.any() and count == 12.0


def test_halve_gives_copies_their_share_and_leaves_the_rest() -> None:
    moved = move_moments(OLD, UNTIE, "halve")
    for name in ("l.1", "l.2", "l.3"):
        first, second, count = moments_of(moved, name)
        torch.testing.assert_close(first, OLD["l.1/exp_avg"] / 3)
        torch.testing.assert_close(second, OLD["l.1/exp_avg_sq"] / 9)
        assert count == 12.0
    assert torch.equal(moved["out/exp_avg"], OLD["out/exp_avg"])
    two = move_moments(OLD, {"a": Origin(("l.0",)), "b": Origin(("l.0",))}, "halve")
    assert torch.equal(two["a/exp_avg"], OLD["l.0/exp_avg"] / 2)
    assert torch.equal(two["a/exp_avg_sq"], OLD["l.0/exp_avg_sq"] / 4)


def test_untie_then_tie_gives_back_what_there_was() -> None:
    choices: tuple[Moments, ...] = ("copy", "halve")
    for moments in choices:
        again = move_moments(move_moments(OLD, UNTIE, moments), TIE, moments)
        assert again.keys() == OLD.keys()
        for name, tensor in again.items():
            torch.testing.assert_close(tensor, OLD[name], rtol=1e-6, atol=0)


def test_tie_has_the_mean_or_the_sum() -> None:
    untied = adam(["out", *(f"l.{n}" for n in range(5))], seed=1)
    firsts, seconds = (
        torch.stack([untied[f"l.{n}/{moment}"] for n in (1, 2, 3)]) for moment in ("exp_avg", "exp_avg_sq")
    )
    expected: dict[Moments, tuple[torch.Tensor, torch.Tensor]] = {
        "copy": (firsts.mean(0), seconds.mean(0)),
        "halve": (firsts.sum(0), 3 * seconds.sum(0)),
        "zero": (torch.zeros(3, 2), torch.zeros(3, 2)),
    }
    for moments, (first, second) in expected.items():
        moved = move_moments(untied, TIE, moments)
        torch.testing.assert_close(moved["l.1/exp_avg"], first)
        torch.testing.assert_close(moved["l.1/exp_avg_sq"], second)
        assert float(moved["l.1/step"]) == 14.0


@pytest.mark.parametrize("moments", ["copy", "zero", "halve"])
def test_a_zeroed_layer_keeps_scale_and_count_and_takes_no_share(moments) -> None:
    origins = {"l.0": Origin(("l.0",)), "l.1": Origin(("l.0",), zero=True)}
    moved = move_moments(OLD, origins, moments)
    for one, old in zip(moments_of(moved, "l.0"), moments_of(OLD, "l.0"), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(old))
    first, second, count = moments_of(moved, "l.1")
    assert not first.any() and torch.equal(second, OLD["l.0/exp_avg_sq"]) and count == 11.0


def test_new_parameters_and_reset_start_anew() -> None:
    origins = {"l.0": Origin(("l.0",)), "adapter": Origin(())}
    start = {key.replace("out", "adapter"): torch.ones_like(value) for key, value in OLD.items() if key < "l.1"}
    start |= {key.replace("l.0", "adapter"): value for key, value in start.items()}
    state = begin_with(move_moments(OLD, origins, "copy"), start)
    assert state.keys() == start.keys()
    assert torch.equal(state["l.0/exp_avg"], OLD["l.0/exp_avg"]) and not state["adapter/exp_avg"].any()
    assert all(not tensor.any() for tensor in begin_with(move_moments(OLD, origins, "reset"), start).values())


def test_unknown_moments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="keeps 'max_exp_avg_sq', which cannot be moved: use 'reset'"):
        move_moments({"l.0/max_exp_avg_sq": torch.ones(1)}, {"l.0": Origin(("l.0",))}, "copy")
