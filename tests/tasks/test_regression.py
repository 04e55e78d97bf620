"""In-context regression against naive functions, closed forms and statistics."""

from __future__ import annotations

import numpy as np
import pytest

from loopwise.loop.config import from_dict, to_dict
from loopwise.tasks.regression import (
    LinearRegression,
    Points,
    RegressionTask,
    ReluRegression,
    SparseRegression,
    TreeRegression,
    least_squares,
    nearest,
    points,
    ridge,
    squared_error,
)

TASKS = [LinearRegression(), SparseRegression(), TreeRegression(), ReluRegression()]
every_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: str(task.kind))


@every_task
def test_draws_are_float32_and_a_pure_function_of_the_seed(task: RegressionTask) -> None:
    first = points(task, seed=3, index=5, size=6)
    again = points(task, seed=3, index=5, size=6)
    assert first.xs_BNI.dtype == first.ys_BN.dtype == np.float32
    assert first.xs_BNI.shape == (6, task.num_points, 20) and len(first) == 6
    assert np.array_equal(first.xs_BNI, again.xs_BNI) and np.array_equal(first.ys_BN, again.ys_BN)
    for other in ({"seed": 4}, {"index": 6}, {"split": "valid"}):
        assert not np.isin(points(task, **{"seed": 3, "index": 5, "size": 6, **other}).ys_BN, first.ys_BN).any()
    assert from_dict(to_dict(task)) == task


@every_task
def test_the_variance_is_that_of_the_draws(task: RegressionTask) -> None:
    drawn = task.draw(np.random.default_rng(0), 1500)
    assert (drawn.ys_BN.astype(np.float64) ** 2).mean() == pytest.approx(task.variance, rel=0.1)
    assert abs(drawn.ys_BN.mean()) < 0.1 * task.variance**0.5
    assert drawn.xs_BNI.var() == pytest.approx(1, rel=0.01)


@every_task
def test_inactive_coordinates_are_zero_and_do_not_matter(task: RegressionTask) -> None:
    some = type(task)(**{**{name: getattr(task, name) for name in ("num_points",)}, "active": 5})
    drawn = some.draw(np.random.default_rng(0), 300)
    assert (drawn.xs_BNI[..., 5:] == 0).all() and (drawn.xs_BNI[..., :5] != 0).all()
    assert (drawn.ys_BN.std(axis=1) > 0).mean() > 0.99, "the function looks at coordinates that vary"
    assert (drawn.ys_BN.astype(np.float64) ** 2).mean() == pytest.approx(some.variance, rel=0.3)


def test_a_sparse_function_is_linear_with_few_weights() -> None:
    task = SparseRegression(inputs=8, num_points=12, nonzero=2)
    drawn = task.draw(np.random.default_rng(0), 200)
    supports = set()
    for xs_NI, ys_N in zip(drawn.xs_BNI, drawn.ys_BN, strict=True):
        weight_I, *_ = np.linalg.lstsq(xs_NI, ys_N, rcond=None)
        support = np.flatnonzero(np.abs(weight_I) > 1e-4)
        assert len(support) <= 2
        supports |= {tuple(support)}
    assert len({pair for pair in supports if len(pair) == 2}) == 28, "every pair of 8 coordinates comes up"


def test_a_tree_is_a_function_of_few_signs() -> None:
    task = TreeRegression(inputs=4, num_points=200, levels=2)
    drawn = task.draw(np.random.default_rng(0), 50)
    for xs_NI, ys_N in zip(drawn.xs_BNI, drawn.ys_BN, strict=True):
        assert 1 <= len(np.unique(ys_N)) <= 4
        by_signs: dict[tuple[bool, ...], set[float]] = {}
        for x_I, y in zip(xs_NI, ys_N, strict=True):
            by_signs.setdefault(tuple(x_I > 0), set()).add(float(y))
        assert all(len(values) == 1 for values in by_signs.values())
        # some node at the root splits the leaves into two disjoint halves
        halves = ({True: set(ys_N[column > 0]), False: set(ys_N[column <= 0])} for column in xs_NI.T)
        assert any(not (half[True] & half[False]) and max(map(len, half.values())) <= 2 for half in halves)


def test_a_relu_network_is_positively_homogeneous_and_not_linear() -> None:
    class Fixed(ReluRegression):
        """The same network at points and at twice the points."""

        kind = None

        def _values(self, rng: np.random.Generator, xs_BNI: np.ndarray) -> np.ndarray:
            return super()._values(rng, np.concatenate([xs_BNI, 2 * xs_BNI, -xs_BNI], axis=1))

    task = Fixed(inputs=3, num_points=5, hidden=7)
    values = task._values(np.random.default_rng(0), np.random.default_rng(1).standard_normal((4, 5, 3)))
    assert np.allclose(values[:, 5:10], 2 * values[:, :5], rtol=1e-12)
    assert not np.allclose(values[:, 10:], -values[:, :5], atol=0.1)


def test_least_squares_is_the_closed_form_and_exact_after_enough_points() -> None:
    task = LinearRegression(inputs=6, num_points=15)
    prompts = task.draw(np.random.default_rng(0), 20)
    predicted_BN = least_squares(prompts)
    for row in range(20):
        xs_NI, ys_N = prompts.xs_BNI[row].astype(np.float64), prompts.ys_BN[row].astype(np.float64)
        for seen in range(15):
            weight_I = np.linalg.lstsq(xs_NI[:seen], ys_N[:seen], rcond=None)[0] if seen else np.zeros(6)
            assert predicted_BN[row, seen] == pytest.approx(xs_NI[seen] @ weight_I, abs=1e-8)
    error_N = squared_error(prompts, predicted_BN) / task.variance
    assert error_N[6:].max() < 1e-9 and error_N[:5].min() > 0.05


def test_ridge_is_the_closed_form_and_the_floor_under_noise() -> None:
    task = LinearRegression(inputs=5, num_points=12, noise=0.7)
    prompts = task.draw(np.random.default_rng(0), 4000)
    best_BN = ridge(prompts, task.noise**2)
    xs_NI, ys_N = prompts.xs_BNI[7].astype(np.float64), prompts.ys_BN[7].astype(np.float64)
    for seen in range(12):
        seen_NI = xs_NI[:seen]
        weight_I = np.linalg.inv(seen_NI.T @ seen_NI + 0.49 * np.eye(5)) @ seen_NI.T @ ys_N[:seen]
        assert best_BN[7, seen] == pytest.approx(xs_NI[seen] @ weight_I, abs=1e-9)
    error_N = squared_error(prompts, best_BN)
    for other_BN in (least_squares(prompts), ridge(prompts, 3.0), ridge(prompts, 0.05), 0 * best_BN):
        assert error_N.mean() < squared_error(prompts, other_BN).mean()
    assert error_N[0] == pytest.approx(task.variance, rel=0.1) and error_N[-1] > task.noise**2


def test_ridge_with_a_tiny_penalty_is_least_squares() -> None:
    prompts = LinearRegression(inputs=3, num_points=9).draw(np.random.default_rng(0), 10)
    assert np.allclose(ridge(prompts, 1e-9)[:, 4:], least_squares(prompts)[:, 4:], atol=1e-5)


def test_nearest_is_the_mean_of_the_nearest() -> None:
    prompts = TreeRegression(inputs=3, num_points=9).draw(np.random.default_rng(0), 5)
    predicted_BN = nearest(prompts, 2)
    for row, seen in np.ndindex(5, 9):
        xs_NI = prompts.xs_BNI[row].astype(np.float64)
        near = sorted(range(seen), key=lambda at: ((xs_NI[at] - xs_NI[seen]) ** 2).sum())[:2]  # noqa: B023
        assert predicted_BN[row, seen] == pytest.approx(prompts.ys_BN[row, near].mean() if near else 0, abs=1e-6)


def test_predictions_see_earlier_points_only() -> None:
    prompts = LinearRegression(inputs=4, num_points=10).draw(np.random.default_rng(0), 3)
    changed = Points(xs_BNI=prompts.xs_BNI.copy(), ys_BN=prompts.ys_BN.copy())
    changed.ys_BN[:, 6:] += 100
    for predict in (least_squares, nearest, lambda some: ridge(some, 0.1)):
        assert np.array_equal(predict(prompts)[:, :7], predict(changed)[:, :7])
        assert not np.allclose(predict(prompts)[:, 7:], predict(changed)[:, 7:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearRegression(inputs=0), "inputs=0 must be at least 1"),
        (lambda: LinearRegression(num_points=0), "num_points=0 must be at least 1"),
        (lambda: LinearRegression(active=21), r"active=21 must be from 1 to inputs \(20\)"),
        (lambda: LinearRegression(noise=-0.1), "noise=-0.1 must be at least 0"),
        (lambda: SparseRegression(nonzero=6, active=5), "nonzero=6 must be from 1 to 5"),
        (lambda: TreeRegression(levels=0), "levels=0 must be from 1 to 16"),
        (lambda: ReluRegression(hidden=0), "hidden=0 must be at least 1"),
        (lambda: points(TASKS[0], seed=0, index=0, size=1, split="vaild"), "did you mean 'valid'"),
        (lambda: points(TASKS[0], seed=-1, index=0, size=1), "seed=-1 must be at least 0"),
        (lambda: points(TASKS[0], seed=0, index=0, size=0), "size=0 must be at least 1"),
        (lambda: ridge(points(TASKS[0], seed=0, index=0, size=1), 0.0), "penalty=0.0 must be positive"),
        (lambda: nearest(points(TASKS[0], seed=0, index=0, size=1), 0), "neighbours=0 must be at least 1"),
        (lambda: squared_error(points(TASKS[0], seed=0, index=0, size=1), np.zeros(3)), "must have the shape"),
        (lambda: Points(xs_BNI=np.zeros((2, 3, 4)), ys_BN=np.zeros((2, 4))), r"must share \[B, N\]"),
    ],
)
def test_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
