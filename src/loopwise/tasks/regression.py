"""In-context regression: prompts (x_1, y_1, ..., x_n, y_n) of a function drawn anew for each, and what can be reached.

The settings of Garg et al. (2208.01066), which Yang et al. (2311.12424) loop: linear, sparse linear, decision tree,
two-layer ReLU network. A prediction of y_i sees x_1..x_i and y_1..y_{i-1}.

Shapes: B prompts, N points, I numbers per point, L levels of a tree, M hidden units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from loopwise.loop.config import Component, suggest
from loopwise.tasks.base import SPLITS


@dataclass(frozen=True, kw_only=True, eq=False)
class Points:
    """Prompts of regression.

    Attributes:
        xs_BNI: points, float32 `[B, N, I]`.
        ys_BN: values of the function of the prompt at its points, float32 `[B, N]`.

    Raises:
        ValueError: the shapes do not agree.
    """

    xs_BNI: np.ndarray
    ys_BN: np.ndarray

    def __post_init__(self) -> None:
        """Check the shapes."""
        if self.xs_BNI.ndim != 3 or self.ys_BN.shape != self.xs_BNI.shape[:2]:
            raise ValueError(f"xs_BNI {self.xs_BNI.shape} and ys_BN {self.ys_BN.shape} must share [B, N]")

    def __len__(self) -> int:
        return len(self.ys_BN)


@dataclass(frozen=True, kw_only=True)
class RegressionTask(Component):
    """Base of the four: points from N(0, 1) in every coordinate, one function for each prompt.

    Attributes:
        inputs: I.
        num_points: N.
        active: leading coordinates that are used, the others are 0 (a curriculum over dimensions); None uses all. The
            function depends on active ones only; in the published code the sparse support and the features of a tree
            come from all I, so that early in the curriculum many prompts are constant.
        noise: standard deviation of what is added to every y.
    """

    inputs: int = 20
    num_points: int = 41
    active: int | None = None
    noise: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("inputs", "num_points"):
            self.require(getattr(self, name) >= 1, name, "must be at least 1")
        self.require(1 <= self.num_active <= self.inputs, "active", f"must be from 1 to inputs ({self.inputs})")
        self.require(self.noise >= 0, "noise", "must be at least 0")

    @property
    def num_active(self) -> int:
        """Coordinates that are not 0."""
        return self.inputs if self.active is None else self.active

    @property
    def variance(self) -> float:
        """E[y^2], the squared error of predicting 0; errors are reported divided by it."""
        return self._variance() + self.noise**2

    def draw(self, rng: np.random.Generator, size: int) -> Points:
        """`size` prompts; nothing random but `rng`."""
        xs_BNI = rng.standard_normal((size, self.num_points, self.inputs), dtype=np.float32)
        xs_BNI[..., self.num_active :] = 0
        ys_BN = self._values(rng, xs_BNI[..., : self.num_active].astype(np.float64))
        if self.noise:
            ys_BN = ys_BN + self.noise * rng.standard_normal(ys_BN.shape)
        return Points(xs_BNI=xs_BNI, ys_BN=ys_BN.astype(np.float32))

    def _values(self, rng: np.random.Generator, xs_BNI: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _variance(self) -> float:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class LinearRegression(RegressionTask):
    """In-context regression of y = w.x, w from N(0, 1)."""

    kind: ClassVar[str | None] = "task.linear_regression"

    def _values(self, rng: np.random.Generator, xs_BNI: np.ndarray) -> np.ndarray:
        return np.einsum("bni,bi->bn", xs_BNI, rng.standard_normal((len(xs_BNI), self.num_active)))

    def _variance(self) -> float:
        return float(self.num_active)


@dataclass(frozen=True, kw_only=True)
class SparseRegression(RegressionTask):
    """In-context regression of y = w.x where few coordinates of w, chosen anew for each prompt, are not 0.

    Attributes:
        nonzero: how many coordinates of w are not 0.
    """

    kind: ClassVar[str | None] = "task.sparse_regression"
    nonzero: int = 3

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require(1 <= self.nonzero <= self.num_active, "nonzero", f"must be from 1 to {self.num_active}")

    def _values(self, rng: np.random.Generator, xs_BNI: np.ndarray) -> np.ndarray:
        place_BI = rng.random((len(xs_BNI), self.num_active)).argsort(axis=1).argsort(axis=1)
        weight_BI = np.where(place_BI < self.nonzero, rng.standard_normal(place_BI.shape), 0.0)
        return np.einsum("bni,bi->bn", xs_BNI, weight_BI)

    def _variance(self) -> float:
        return float(self.nonzero)


@dataclass(frozen=True, kw_only=True)
class TreeRegression(RegressionTask):
    """In-context regression of a full binary decision tree: nodes test the sign of a coordinate, leaves are N(0, 1).

    Attributes:
        levels: tests from the root to a leaf.
    """

    kind: ClassVar[str | None] = "task.tree_regression"
    num_points: int = 101
    levels: int = 4

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require(1 <= self.levels <= 16, "levels", "must be from 1 to 16")

    def _values(self, rng: np.random.Generator, xs_BNI: np.ndarray) -> np.ndarray:
        prompt_B1 = np.arange(len(xs_BNI))[:, None]
        point_1N = np.arange(xs_BNI.shape[1])[None]
        tested_BM = rng.integers(self.num_active, size=(len(xs_BNI), 2**self.levels - 1))
        leaf_BM = rng.standard_normal((len(xs_BNI), 2**self.levels))
        node_BN = np.zeros(xs_BNI.shape[:2], np.int64)
        for _ in range(self.levels):
            value_BN = xs_BNI[prompt_B1, point_1N, tested_BM[prompt_B1, node_BN]]
            node_BN = 2 * node_BN + 1 + (value_BN > 0)
        return leaf_BM[prompt_B1, node_BN - (2**self.levels - 1)]

    def _variance(self) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class ReluRegression(RegressionTask):
    """In-context regression of a two-layer ReLU network, y = sqrt(2 / M) a.relu(W x), all weights from N(0, 1).

    Attributes:
        hidden: M.
    """

    kind: ClassVar[str | None] = "task.relu_regression"
    num_points: int = 101
    hidden: int = 100

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require(self.hidden >= 1, "hidden", "must be at least 1")

    def _values(self, rng: np.random.Generator, xs_BNI: np.ndarray) -> np.ndarray:
        first_BIM = rng.standard_normal((len(xs_BNI), self.num_active, self.hidden))
        second_BM = rng.standard_normal((len(xs_BNI), self.hidden))
        hidden_BNM = np.maximum(xs_BNI @ first_BIM, 0.0)
        return np.sqrt(2 / self.hidden) * np.einsum("bnm,bm->bn", hidden_BNM, second_BM)

    def _variance(self) -> float:
        return float(self.num_active)


def points(
    task: RegressionTask, *, seed: int, index: int, size: int, split: Literal["train", "valid", "test"] | str = "train"
) -> Points:
    """Prompts of one split, a pure function of the arguments; splits are independent draws, never the same prompt.

    Args:
        task: the task.
        seed: seed of the stream, at least 0.
        index: number of the block of prompts within the stream, at least 0.
        size: prompts, at least 1.
        split: "train", "valid" or "test".

    Raises:
        ValueError: an argument is out of range.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}{suggest(split, SPLITS)}")
    for name, value, least in (("seed", seed, 0), ("index", index, 0), ("size", size, 1)):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    return task.draw(np.random.default_rng([seed, index, SPLITS.index(split)]), size)


def least_squares(prompts: Points) -> np.ndarray:
    """Prediction at every point by the smallest w that fits all earlier points best, float64 `[B, N]`.

    With no noise it is exact once there are as many points as coordinates in use: the floor of linear regression.
    """
    xs_BNI, ys_BN = prompts.xs_BNI.astype(np.float64), prompts.ys_BN.astype(np.float64)
    predicted_BN = np.zeros_like(ys_BN)
    for seen in range(1, ys_BN.shape[1]):
        weight_BI = np.linalg.pinv(xs_BNI[:, :seen]) @ ys_BN[:, :seen, None]
        predicted_BN[:, seen] = np.einsum("bi,bi->b", xs_BNI[:, seen], weight_BI[..., 0])
    return predicted_BN


def ridge(prompts: Points, penalty: float) -> np.ndarray:
    """Prediction at every point by argmin |y - X w|^2 + penalty |w|^2 over earlier points, float64 `[B, N]`.

    For `LinearRegression` the penalty noise^2 gives the posterior mean, so that no predictor has a smaller error.

    Raises:
        ValueError: the penalty is not positive.
    """
    if not penalty > 0:
        raise ValueError(f"penalty={penalty} must be positive; without one use least_squares")
    xs_BNI, ys_BN = prompts.xs_BNI.astype(np.float64), prompts.ys_BN.astype(np.float64)
    before_xx = np.cumsum(xs_BNI[..., :, None] * xs_BNI[..., None, :], axis=1)[:, :-1]
    before_xy = np.cumsum(xs_BNI * ys_BN[..., None], axis=1)[:, :-1]
    weight_BNI = np.linalg.solve(before_xx + penalty * np.eye(xs_BNI.shape[2]), before_xy[..., None])[..., 0]
    predicted_BN = np.zeros_like(ys_BN)
    predicted_BN[:, 1:] = np.einsum("bni,bni->bn", xs_BNI[:, 1:], weight_BNI)
    return predicted_BN


def nearest(prompts: Points, neighbours: int = 3) -> np.ndarray:
    """Prediction at every point by the mean y of the nearest earlier points, float64 `[B, N]`; 0 at the first point.

    Raises:
        ValueError: fewer than 1 neighbour.
    """
    if neighbours < 1:
        raise ValueError(f"neighbours={neighbours} must be at least 1")
    xs_BNI, ys_BN = prompts.xs_BNI.astype(np.float64), prompts.ys_BN.astype(np.float64)
    predicted_BN = np.zeros_like(ys_BN)
    for seen in range(1, ys_BN.shape[1]):
        distance_BN = ((xs_BNI[:, :seen] - xs_BNI[:, seen, None]) ** 2).sum(axis=-1)
        near_BN = distance_BN.argsort(axis=1)[:, :neighbours]
        predicted_BN[:, seen] = np.take_along_axis(ys_BN, near_BN, axis=1).mean(axis=1)
    return predicted_BN


def squared_error(prompts: Points, predicted_BN: np.ndarray) -> np.ndarray:
    """Mean squared error over the prompts at every point, float64 `[N]`; divide by `task.variance` to compare tasks.

    Raises:
        ValueError: the shape is not `[B, N]`.
    """
    if np.shape(predicted_BN) != prompts.ys_BN.shape:
        raise ValueError(f"predicted_BN must have the shape {prompts.ys_BN.shape}, got {np.shape(predicted_BN)}")
    return ((np.asarray(predicted_BN, np.float64) - prompts.ys_BN) ** 2).mean(axis=0)
